// Memory that a kernel works in, cut from one buffer of the calling thread. One Scratch at a time on a thread: a second
// would cut the same buffer anew, or move it.
#pragma once

#include <cstdint>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#endif

namespace cgpt::CGPT_ISA {

#if !defined(__SANITIZE_ADDRESS__)

// Pieces of this thread's scratch, as they were left by the last to use it. Each begins on a cache line where all
// before it are multiples of one. The buffer lives as long as the thread: fresh memory costs a page fault every 4 KiB.
class Scratch {
  public:
    explicit Scratch(int64_t floats) {
        static thread_local std::vector<float> memory;
        if (static_cast<int64_t>(memory.size()) < floats + kLine) memory = {}, memory.resize(floats + kLine);
        const auto address = reinterpret_cast<uintptr_t>(memory.data());
        next_ = memory.data() + (kLine * 4 - address % (kLine * 4)) % (kLine * 4) / 4;
    }
    template <class E = float>
    E* take(int64_t elements) {
        static_assert(sizeof(E) == sizeof(float));
        float* p = next_;
        next_ += elements;
        return reinterpret_cast<E*>(p);
    }

  private:
    static constexpr int64_t kLine = 16;  // floats in a cache line
    float* next_;
};

#else

// For AddressSanitizer, which knows the ends of allocations and not of pieces: each piece is one, and what it holds is
// what .ci/sanitize has fresh memory filled with, NaNs. The two rules that a buffer breaks in silence are kept here.
class Scratch {
  public:
    explicit Scratch(int64_t floats) : left_(floats) {
        if (live()) throw std::logic_error("scratch: wanted one at a time on a thread, got a second");
        live() = true;
    }
    ~Scratch() { live() = false; }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    template <class E = float>
    E* take(int64_t elements) {
        static_assert(sizeof(E) == sizeof(float));
        if ((left_ -= elements) < 0)
            throw std::logic_error("scratch: wanted no more than was asked for, got " + std::to_string(-left_) +
                                   " floats more");
        pieces_.emplace_back(::operator new(elements * sizeof(E), kLine));
        return static_cast<E*>(pieces_.back().get());
    }

  private:
    static constexpr std::align_val_t kLine{64};
    struct Free {
        void operator()(void* p) const { ::operator delete(p, kLine); }
    };
    static bool& live() {
        static thread_local bool now = false;
        return now;
    }
    int64_t left_;
    std::vector<std::unique_ptr<void, Free> > pieces_;
};

#endif

}  // namespace cgpt::CGPT_ISA
