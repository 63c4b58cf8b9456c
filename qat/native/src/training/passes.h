// Passes over images of a training step: what one reading and one writing of memory can hold. Tensors are
// [planes][pixels], a plane one channel of one image; planes are independent, so that results don't depend on
// the number of threads.
#pragma once

#include <cstdint>

#include "training/shared.h"

namespace bnext {

// The planes that a pass works on at once.
struct Planes {
  int64_t first, last;  // from the first to the one before the last
  int64_t channels;     // plane p is of channel p % channels
  int64_t pixels;       // of each plane
  int64_t values;       // of the whole tensor. Flat memory is cut into planes, of which the last may be shorter
};

// `arguments` points to the struct of the pass.
using Run = void (*)(void* arguments, Planes planes);

struct NamedPass {
  const char* name;  // nullptr ends the list
  Run run[kTypes];
};

// Those compiled for a set of kernels, by its name.
const NamedPass* passes_of(const char* kernels);

}  // namespace bnext
