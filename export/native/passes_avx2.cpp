#include "passes_impl.h"

namespace bnext {
extern const NamedPass* const passes_avx2;
const NamedPass* const passes_avx2 = kPasses;
}  // namespace bnext
