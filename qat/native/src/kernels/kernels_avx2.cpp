#include "kernels/vectors_avx2.h"
// V comes first.
#include "kernels/kernels_impl.h"

namespace bnext {
extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = table("avx2");
}  // namespace bnext
