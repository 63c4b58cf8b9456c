#include "training/passes_impl.h"
#include "training/signs_impl.h"

namespace bnext {
extern const NamedPass* const passes_portable;
extern const SignWork* const signs_portable;
const NamedPass* const passes_portable = kPasses;
const SignWork* const signs_portable = kSigns;
}  // namespace bnext
