#include "training/passes_impl.h"
#include "training/signs_impl.h"

namespace bnext {
extern const NamedPass* const passes_avx512;
extern const SignWork* const signs_avx512;
const NamedPass* const passes_avx512 = kPasses;
const SignWork* const signs_avx512 = kSigns;
}  // namespace bnext
