#define BNEXT_VPOPCNTDQ
#include "kernels/vectors_avx512.h"
// V comes first.
#include "kernels/kernels_impl.h"

namespace bnext {
extern const Kernels kernels_avx512_vpopcntdq;
const Kernels kernels_avx512_vpopcntdq = table("avx512_vpopcntdq");
}  // namespace bnext
