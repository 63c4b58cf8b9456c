#include "training/passes_impl.h"
#include "training/signs_impl.h"

namespace bnext {
extern const NamedPass* const passes_avx2;
extern const SignWork* const signs_avx2;
const NamedPass* const passes_avx2 = kPasses;
const SignWork* const signs_avx2 = kSigns;
}  // namespace bnext
