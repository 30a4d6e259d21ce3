// Work sharing for the CPU kernels on torch's own OpenMP threads. A second pool beside torch's would fight it
// for the cores: idle OpenMP threads spin for about a millisecond after every region. The runtime that torch
// loaded is found by name at run time, so nothing here links to OpenMP; without one, std::thread serves.
#pragma once

#include <cstdint>
#include <functional>

namespace cgpt {

int num_threads();  // what torch.get_num_threads() says

// Threads for the work that the calling thread starts from now on, and for nobody else's. Returns the count before.
int set_thread_count(int64_t n);

// Calls body(i) for every i in [0, n), each once, on any thread. Tasks are handed out one at a time, so `n`
// should be tens to hundreds; results must not depend on which thread runs a task, and then they do not
// depend on the count.
void parallel_for(int64_t n, const std::function<void(int64_t)>& body);

// Splits [0, n) into ranges of `grain` (the last may be shorter) and calls body(begin, end) for each in
// parallel. The split depends on n and grain alone.
inline void parallel_ranges(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    const int64_t count = (n + grain - 1) / grain;
    parallel_for(count, [&](int64_t i) { body(i * grain, i * grain + grain < n ? i * grain + grain : n); });
}

}  // namespace cgpt
