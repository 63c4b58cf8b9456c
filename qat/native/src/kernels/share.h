// Work shared among threads, and cut into parts for them.
#pragma once

#include <atomic>
#include <cstdint>

namespace bnext {

// GOMP_parallel: calls `work` with `data` on so many threads and waits. PyTorch's own, so that both share one
// team of threads: a second one would spin beside the first.
using Parallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// Calls `task(i)` for i < tasks; on this thread alone where `parallel` is nullptr.
template <typename Task>
void share(Parallel parallel, unsigned threads, int64_t tasks, const Task& task) {
  if (parallel == nullptr || threads < 2 || tasks < 2) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  struct Work {
    const Task& task;
    const int64_t tasks;
    std::atomic<int64_t> next{0};
  } work{task, tasks};
  parallel(
      [](void* data) {
        Work& mine = *static_cast<Work*>(data);
        for (int64_t i; (i = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.tasks;) mine.task(i);
      },
      &work, threads, 0);
}

// Into how many parts to cut work: of about `unit` each, at most `most`, and in fours, so that two threads and
// four get equal shares.
inline int64_t parts_of(int64_t work, int64_t unit, int64_t most) {
  const int64_t parts = work / unit;
  if (parts <= 1) return 1;
  const int64_t even = (parts + 3) / 4 * 4;
  return even < most ? even : most;
}

// Begin and end of part `index` when `total` items are cut into `parts`.
inline int64_t cut(int64_t total, int64_t parts, int64_t index) { return total * index / parts; }

}  // namespace bnext
