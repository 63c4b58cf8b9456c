#include "passes_impl.h"

namespace bnext {
extern const NamedPass* const passes_avx512;
const NamedPass* const passes_avx512 = kPasses;
}  // namespace bnext
