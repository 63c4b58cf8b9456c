// Which kernels run on this processor.

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels/kernels.h"

namespace bnext {

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx512_vpopcntdq, kernels_avx512, kernels_avx2;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_vpopcntdq() { return has_avx512() && __builtin_cpu_supports("avx512vpopcntdq"); }
#endif

const Choice kChoices[] = {
#if defined(__x86_64__)
    {&kernels_avx512_vpopcntdq, has_vpopcntdq},
    {&kernels_avx512, has_avx512},
    {&kernels_avx2, has_avx2},
#elif defined(__aarch64__)
    {&kernels_neon, always},
#endif
    {&kernels_portable, always},
    {nullptr, nullptr},
};

}  // namespace

const Choice* choices() { return kChoices; }

const Kernels& kernels() {
  const char* wanted = std::getenv("BNEXT_QAT_KERNELS");
  if (wanted != nullptr && *wanted == '\0') wanted = nullptr;
  std::string names;
  for (const Choice* choice = kChoices; choice->kernels != nullptr; ++choice) {
    if (!choice->supported()) continue;
    if (wanted == nullptr || std::string(wanted) == choice->kernels->name) return *choice->kernels;
    names += std::string(names.empty() ? "" : ", ") + choice->kernels->name;
  }
  throw std::runtime_error("BNEXT_QAT_KERNELS is '" + std::string(wanted) + "', this processor runs " + names);
}

const Kernels& training_kernels() noexcept {
  static const Kernels& chosen = []() -> const Kernels& {
    try {
      return kernels();
    } catch (...) {
      return kernels_portable;
    }
  }();
  return chosen;
}

}  // namespace bnext
