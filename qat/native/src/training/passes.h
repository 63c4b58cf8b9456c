// Passes over images of a training step: what one reading and one writing of memory can hold. Tensors are
// [planes][pixels], a plane one channel of one image; planes are independent, so that results don't depend on
// the number of threads.
#pragma once

#include <cstdint>

namespace bnext {

// A grid of integers: a value is clamp(round(x inverse)) scale.
struct Grid {
  double low, high, scale, inverse;
};

// What a pass works on; each uses some of it. Coefficients and sums are float, or double beside double tensors.
struct Pass {
  int64_t planes, channels, pixels;
  const void *x, *other, *grad;
  void *out, *other_out;
  uint8_t* inside;  // [planes][pixels], 1 where a gradient passes
  // Of a channel: [channels]. `shift` is of a plane in `scale`.
  const void *gain, *offset, *slope, *center, *tilt, *shift;
  const void* factor;  // [planes]
  void *sums, *products, *slopes;  // [planes]
  Grid grid, inner;
  double clip;
  int64_t last;  // pixels of the last plane, where memory is cut into planes of its own accord
  int32_t positive_zero;
  int32_t outside;  // written: whether any value lay outside
};

enum Type { kFloat, kDouble, kBfloat16, kTypes };

using Run = void (*)(Pass&, int64_t first_plane, int64_t last_plane);

struct NamedPass {
  const char* name;  // nullptr ends the list
  Run run[kTypes];
};

// Those compiled for a set of kernels, by its name.
const NamedPass* passes_of(const char* kernels);

}  // namespace bnext
