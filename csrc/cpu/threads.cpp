#include "threads.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace cgpt {
namespace {

constexpr int64_t kMostThreads = 4096;

// libgomp's stable entry points; LLVM's and Intel's runtimes export the same names.
struct OpenMP {
    void (*parallel)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);
    int (*max_threads)();
    int (*in_parallel)();
    void (*set_threads)(int);
};

const OpenMP& openmp() {
    static const OpenMP found = {
        reinterpret_cast<decltype(OpenMP::parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
        reinterpret_cast<decltype(OpenMP::max_threads)>(dlsym(RTLD_DEFAULT, "omp_get_max_threads")),
        reinterpret_cast<decltype(OpenMP::in_parallel)>(dlsym(RTLD_DEFAULT, "omp_in_parallel")),
        reinterpret_cast<decltype(OpenMP::set_threads)>(dlsym(RTLD_DEFAULT, "omp_set_num_threads")),
    };
    return found;
}

bool have_openmp() { return openmp().parallel && openmp().max_threads && openmp().in_parallel && openmp().set_threads; }

thread_local int own_count = 0;  // without OpenMP, what set_thread_count() said; else OpenMP keeps it, as one a thread

struct Job {
    int64_t n;
    const std::function<void(int64_t)>& body;
    std::atomic<int64_t> next{0};
    std::exception_ptr error{};
    std::mutex error_mutex{};

    void work() {
        try {
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(i);
        } catch (...) {  // an exception must not cross the OpenMP runtime; bad_alloc of a scratch buffer is
                         // the likely one
            std::lock_guard lock(error_mutex);
            error = std::current_exception();
            next = n;
        }
    }
};

}  // namespace

int num_threads() {
    if (have_openmp()) return openmp().max_threads();
    if (own_count > 0) return own_count;
    return std::max(1u, std::thread::hardware_concurrency());
}

int set_thread_count(int64_t n) {
    if (n < 1 || n > kMostThreads)
        throw std::invalid_argument("set_thread_count: n must be from 1 to " + std::to_string(kMostThreads) + ", got " +
                                    std::to_string(n));
    const int before = num_threads();
    if (have_openmp())
        openmp().set_threads(static_cast<int>(n));
    else
        own_count = static_cast<int>(n);
    return before;
}

void parallel_for(int64_t n, const std::function<void(int64_t)>& body) {
    const int64_t threads = std::min<int64_t>(n, num_threads());
    if (threads <= 1 || (have_openmp() && openmp().in_parallel())) {
        for (int64_t i = 0; i < n; ++i) body(i);
        return;
    }
    Job job{n, body};
    if (have_openmp()) {
        openmp().parallel([](void* p) { static_cast<Job*>(p)->work(); }, &job, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int64_t i = 1; i < threads; ++i) others.emplace_back([&] { job.work(); });
        job.work();
        for (std::thread& t : others) t.join();
    }
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace cgpt
