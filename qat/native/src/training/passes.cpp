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

// Name of pass number i, nullptr beyond the last; and the size of the struct that both sides must agree on.
BNEXT_EXPORT const char* bnext_qat_pass_name(int i) { return bnext::passes_portable[i].name; }
BNEXT_EXPORT int64_t bnext_qat_run_pass_bytes() { return sizeof(bnext::Pass); }

// Runs pass number i over tensors of a type (bnext::Type) on so many threads. `parallel` may be nullptr, for one.
BNEXT_EXPORT void bnext_qat_run_pass(int i, int type, bnext::Pass* pass, bnext::Parallel parallel, unsigned threads) {
  using namespace bnext;
  static const NamedPass* const chosen = passes_of(training_kernels().name);
  const Run run = chosen[i].run[type];
  pass->outside = 0;
  const int64_t pixels = pass->pixels > 0 ? pass->pixels : 1;
  const int64_t portion = kPortion > pixels ? kPortion / pixels : 1;
  share(parallel, threads, (pass->planes + portion - 1) / portion, [&](int64_t part) {
    const int64_t first = part * portion, last = first + portion;
    run(*pass, first, last < pass->planes ? last : pass->planes);
  });
}
