#include "threads.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace cgpt {
namespace {

constexpr int64_t kMostThreads = 4096;

// libgomp's stable entry points; LLVM's and Intel's runtimes export the same names.
struct OpenMP {
    void (*parallel)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);
    int (*max_threads)();
    int (*in_parallel)();
    int (*team)();
    void (*set_threads)(int);
};

const OpenMP& openmp() {
    static const OpenMP found = {
        reinterpret_cast<decltype(OpenMP::parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
        reinterpret_cast<decltype(OpenMP::max_threads)>(dlsym(RTLD_DEFAULT, "omp_get_max_threads")),
        reinterpret_cast<decltype(OpenMP::in_parallel)>(dlsym(RTLD_DEFAULT, "omp_in_parallel")),
        reinterpret_cast<decltype(OpenMP::team)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads")),
        reinterpret_cast<decltype(OpenMP::set_threads)>(dlsym(RTLD_DEFAULT, "omp_set_num_threads")),
    };
    return found;
}

bool have_openmp() {
    const OpenMP& all = openmp();
    return all.parallel && all.max_threads && all.in_parallel && all.team && all.set_threads;
}

thread_local int own_count = 0;  // without OpenMP, what set_thread_count() said; else OpenMP keeps it, as one a thread

struct Job {
    int64_t n, threads;
    const std::function<void(int64_t)>& body;
    std::atomic<int64_t> next{0};
    std::exception_ptr error{};
    std::mutex error_mutex{};

#if defined(__SANITIZE_THREAD__)
    // ThreadSanitizer does not see into the OpenMP runtime, so it is told the two orders that a region gives: what came
    // before it is before every task, and every task is before what comes after. Between two tasks there is none. They
    // are dealt in turn here, since one thread may take all of a short region's and would race with nobody.
    char begun{}, ended{};  // one address each: a thread's end is not before another's beginning
    std::atomic<int64_t> seats{0};

    void begin() { __tsan_release(&begun); }
    void work() {
        __tsan_acquire(&begun);
        int64_t i = seats.fetch_add(1, std::memory_order_relaxed);
        const int64_t team = have_openmp() ? openmp().team() : threads;
        run([&] { return std::exchange(i, i + team); });
        __tsan_release(&ended);
    }
    void end() { __tsan_acquire(&ended); }
#else
    void begin() {}
    void work() {
        run([this] { return next.fetch_add(1, std::memory_order_relaxed); });
    }
    void end() {}
#endif

    template <class Take>
    void run(Take take) {
        try {
            for (int64_t i; (i = take()) < n;) body(i);
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
    Job job{n, threads, body};
    job.begin();
    if (have_openmp()) {
        openmp().parallel([](void* p) { static_cast<Job*>(p)->work(); }, &job, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int64_t i = 1; i < threads; ++i) others.emplace_back([&] { job.work(); });
        job.work();
        for (std::thread& t : others) t.join();
    }
    job.end();
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace cgpt
