// How attention is shared out: tasks of unequal work, the longest first, so that the last threads end together.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "attention_blocks.h"
#include "threads.h"

namespace cgpt::CGPT_ISA {

// Tasks for each thread, where a shape has so many: what the longest-first order leaves uneven is about half a task.
inline constexpr int64_t kTasks = 4;

// Of query blocks [i0, i1) and key blocks [j0, j1), the pairs that meet: what a task's time goes by.
template <int64_t kKeys>
int64_t block_pairs(const AttentionShape& s, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    int64_t pairs = 0;
    for (int64_t i = i0; i < i1; ++i) {
        const int64_t query = i * kQueries, last = std::min(s.Tq, query + kQueries) - 1;
        const int64_t from = first_key(s, query) / kKeys, to = blocks_of(end_key(s, last), kKeys);
        pairs += std::max<int64_t>(0, std::min(j1, to) - std::max(j0, from));
    }
    return pairs;
}

template <class Task>
class Tasks {
  public:
    void add(const Task& task, int64_t work) { tasks_.emplace_back(work, task); }
    template <class F>
    void run(const F& f) {
        std::stable_sort(tasks_.begin(), tasks_.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
        parallel_for(static_cast<int64_t>(tasks_.size()), [&](int64_t i) { f(tasks_[i].second); });
    }

  private:
    std::vector<std::pair<int64_t, Task>> tasks_;
};

}  // namespace cgpt::CGPT_ISA
