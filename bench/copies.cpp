// What memory can do: copies of 64-byte lines with ordinary stores and with stores past the caches, and an update in
// place, which reads and writes the same lines as an optimizer does. Compiled by copies.py.
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef uint64_t line __attribute__((vector_size(64)));

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void copy(line* to, const line* from, size_t lines) {
    for (size_t i = 0; i < lines; ++i) to[i] = from[i];
}

EXPORT void copy_past_caches(line* to, const line* from, size_t lines) {
#if defined(__AVX512F__)
    for (size_t i = 0; i < lines; ++i)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), reinterpret_cast<const __m512i*>(from)[i]);
    _mm_sfence();
#elif defined(__x86_64__)
    for (size_t i = 0; i < 4 * lines; ++i)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, reinterpret_cast<const __m128i*>(from)[i]);
    _mm_sfence();
#else
    for (size_t i = 0; i < lines; ++i) __builtin_memcpy(to + i, from + i, 64);
#endif
}

EXPORT void update(line* in_place, const line*, size_t lines) {
    for (size_t i = 0; i < lines; ++i) in_place[i] += 1;
}
