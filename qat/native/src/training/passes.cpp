// What Python calls for the passes of a training step, and how they are shared among threads.

#include "training/passes.h"

#include <cstring>

#include "kernels/export.h"
#include "kernels/kernels.h"
#include "kernels/share.h"

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

// Values that a thread takes at once: they stay in its cache from the first pass over them to the last.
constexpr int64_t kPortion = 1 << 14;

}  // namespace
}  // namespace bnext

// Runs a pass, which training/shared.def lists under this number, over a tensor of so many values on so many
// threads. `arguments` points to the struct of the pass; `parallel` may be nullptr, for one thread.
BNEXT_EXPORT void bnext_qat_run_pass(int number, int type, int64_t values, int64_t channels, int64_t pixels,
                                     void* arguments, bnext::Parallel parallel, unsigned threads) {
  using namespace bnext;
  static const NamedPass* const chosen = passes_of(training_kernels().name);
  const Run run = chosen[number].run[type];
  const int64_t planes = values > 0 ? (values + pixels - 1) / pixels : 0;
  const int64_t portion = pixels > 0 && pixels < kPortion ? kPortion / pixels : 1;
  share(parallel, threads, (planes + portion - 1) / portion, [&](int64_t part) {
    const int64_t first = part * portion, last = first + portion;
    run(arguments, {first, last < planes ? last : planes, channels, pixels, values});
  });
}
