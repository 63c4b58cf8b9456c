// The memory of a binary convolution as kernels read it: weights, and signs of images with their edges.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels/kernels.h"

namespace bnext {

// An accumulator counts in units of 1/64 of a product (qat.quantize.dyadic.ACCUMULATOR_UNIT).
constexpr int64_t kUnit = 64;

struct BinaryWeights {
  int64_t inputs, channels, kernel, words, padded_channels;
  int groups = 1;
  int64_t wide, tiles;
  // [tile][kernel * kernel * words][tile channels], 0 at first
  std::vector<uint32_t> bits;
  // [1 or 16][padded channels]: see `Convolution`.
  std::vector<int32_t> totals;

  BinaryWeights(const Kernels& kernels, int64_t in, int64_t out, int64_t size)
      : inputs(in), channels(out), kernel(size), words((in + 31) / 32), padded_channels(padded(out)) {
    while (groups < kernels.most_groups && groups * kernels.lanes < channels) groups *= 2;
    wide = groups * kernels.lanes;
    tiles = (channels + wide - 1) / wide;
    bits.assign(static_cast<std::size_t>(tiles * kernel * kernel * words * wide), 0);
    totals.assign(static_cast<std::size_t>((kernel == 1 ? 1 : 16) * padded_channels), 0);
  }

  // The first word of a channel's tap, the next one is `wide` further.
  uint32_t* at(int64_t channel, int64_t tap) {
    return bits.data() + (channel / wide * kernel * kernel + tap) * words * wide + channel % wide;
  }

  // Fills in the totals of a channel, whose bits are there.
  void sum_constants(int64_t channel, int32_t bias);
};

// Makes the edge of one pixel around rows of an image's signs 0.
void clear_edges(uint32_t* bits, int64_t height, int64_t width, int64_t words, int64_t first_row, int64_t last_row);

}  // namespace bnext
