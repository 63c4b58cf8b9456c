#include "passes_impl.h"

namespace bnext {
extern const NamedPass* const passes_portable;
const NamedPass* const passes_portable = kPasses;
}  // namespace bnext
