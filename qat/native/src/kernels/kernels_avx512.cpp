#include "kernels/vectors_avx512.h"
// V comes first.
#include "kernels/kernels_impl.h"

namespace bnext {
extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = table("avx512");
}  // namespace bnext
