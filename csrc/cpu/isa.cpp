#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <stdexcept>

namespace cgpt {
namespace {

#if defined(__x86_64__)
// Whether this process may use AMX's tiles on bf16: the processor has them (CPUID), the system keeps their state when
// it switches threads (XCR0) and has granted them to us, which Linux does on request, once for all threads. gcc 12's
// __builtin_cpu_supports has no word for any of it.
bool tiles_granted() {
    unsigned a, b, c, d;
    constexpr unsigned kXsaveOn = 1u << 27, kBf16 = 1u << 22, kTile = 1u << 24;  // leaf 1, ecx; leaf 7, edx
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kXsaveOn)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
    constexpr unsigned kStates = 3u << 17;  // a tile's shape and its data
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & kStates) != kStates) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

struct Candidate {
    const char* name;
    Isa isa;
    bool runs;
};

std::vector<Candidate> candidates() {
    std::vector<Candidate> all = {{"scalar", Isa::scalar, true}};
#if defined(__x86_64__)
    all.push_back({"avx2", Isa::avx2,
                   __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")});
    all.push_back({"avx512", Isa::avx512,
                   all.back().runs && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")});
    all.push_back({"avx512bf16", Isa::avx512bf16, all.back().runs && __builtin_cpu_supports("avx512bf16")});
    static const bool tiles = tiles_granted();
    all.push_back({"amx", Isa::amx, all.back().runs && tiles});
#endif
    return all;
}

Isa best() {
    Isa isa = Isa::scalar;
    for (const Candidate& c : candidates())
        if (c.runs) isa = c.isa;
    return isa;
}

std::atomic<Isa>& chosen() {
    static std::atomic<Isa> isa{best()};
    return isa;
}

}  // namespace

Isa cpu_isa() { return chosen().load(std::memory_order_relaxed); }

std::string cpu_isa_name() {
    for (const Candidate& c : candidates())
        if (c.isa == cpu_isa()) return c.name;
    return "";
}

std::vector<std::string> cpu_isas() {
    std::vector<std::string> names;
    for (const Candidate& c : candidates())
        if (c.runs) names.push_back(c.name);
    return names;
}

void set_cpu_isa(const std::string& name) {
    std::string known;
    for (const Candidate& c : candidates()) {
        if (!c.runs) continue;
        if (name == c.name) {
            chosen() = c.isa;
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(c.name);
    }
    throw std::invalid_argument("cpu_isa: name must be one of " + known + " on this machine, got " + name);
}

}  // namespace cgpt
