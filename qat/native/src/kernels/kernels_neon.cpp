#include "kernels/vectors_neon.h"
// V comes first.
#include "kernels/kernels_impl.h"

namespace bnext {
extern const Kernels kernels_neon;
const Kernels kernels_neon = table("neon");
}  // namespace bnext
