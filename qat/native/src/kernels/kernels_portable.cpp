#include "kernels/vectors_portable.h"
// V comes first.
#include "kernels/kernels_impl.h"

namespace bnext {
extern const Kernels kernels_portable;
const Kernels kernels_portable = table("portable");
}  // namespace bnext
