// What Python calls for the passes of a training step, and how they are shared among threads.

#include "passes.h"

#include <atomic>
#include <cstring>

#include "export.h"
#include "kernels.h"

namespace bnext {

extern const NamedPass* const passes_portable;
#if defined(__x86_64__)
extern const NamedPass *const passes_avx512, *const passes_avx2;
#endif

const NamedPass* passes_of(const char* kernels) {
#if defined(__x86_64__)
  if (std::strncmp(kernels, "avx512", 6) == 0) return passes_avx512;
  if (std::strcmp(kernels, "avx2") == 0) return passes_avx2;
#else
  (void)kernels;
#endif
  return passes_portable;
}

namespace {

// GOMP_parallel: calls `work` with `data` on so many threads and waits. PyTorch's own, so that both share one
// team of threads: a second one would spin beside the first.
using Parallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// Values that a thread takes at once: they stay in its cache from the first pass over them to the last.
constexpr int64_t kPortion = 1 << 14;

// Never throws, since what calls has no word for it: Python looks at BNEXT_QAT_KERNELS before.
const NamedPass* passes() noexcept {
  try {
    return passes_of(kernels().name);
  } catch (...) {
    return passes_portable;
  }
}

struct Work {
  Pass& pass;
  Run run;
  int64_t portion;
  std::atomic<int64_t> next{0};
};

void take(void* data) {
  Work& work = *static_cast<Work*>(data);
  for (;;) {
    const int64_t first = work.next.fetch_add(work.portion, std::memory_order_relaxed);
    if (first >= work.pass.planes) return;
    const int64_t last = first + work.portion;
    work.run(work.pass, first, last < work.pass.planes ? last : work.pass.planes);
  }
}

}  // namespace
}  // namespace bnext

// Name of pass number i, nullptr beyond the last; and the size of the struct that both sides must agree on.
BNEXT_EXPORT const char* bnext_qat_pass_name(int i) { return bnext::passes_portable[i].name; }
BNEXT_EXPORT int64_t bnext_qat_pass_bytes() { return sizeof(bnext::Pass); }

// Runs pass number i over tensors of a type (bnext::Type) on so many threads. `parallel` may be nullptr, for one.
BNEXT_EXPORT void bnext_qat_run_pass(int i, int type, bnext::Pass* pass, bnext::Parallel parallel, unsigned threads) {
  using namespace bnext;
  static const NamedPass* const chosen = passes();
  const Run run = chosen[i].run[type];
  pass->outside = 0;
  const int64_t pixels = pass->pixels > 0 ? pass->pixels : 1;
  Work work{*pass, run, kPortion > pixels ? kPortion / pixels : 1};
  if (parallel == nullptr || threads < 2 || work.portion >= pass->planes) {
    run(*pass, 0, pass->planes);
  } else {
    parallel(take, &work, threads, 0);
  }
}
