#include "kernels/binary_layout.h"

#include <algorithm>

namespace bnext {
namespace {

int64_t bits_in(uint32_t word) {
  word -= (word >> 1) & 0x55555555u;
  word = (word & 0x33333333u) + ((word >> 2) & 0x33333333u);
  return (((word + (word >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24;
}

}  // namespace

// A padded pixel's bits are 0, so its products count like those of -1: popcount of the weights in that tap. The
// constant part of the sum takes them out again, and is another one for each set of edges that a window crosses.
void BinaryWeights::sum_constants(int64_t channel, int32_t bias) {
  const int64_t taps = kernel * kernel, kinds = kernel == 1 ? 1 : 16;
  int64_t set[9] = {};
  for (int64_t tap = 0; tap < taps; ++tap) {
    const uint32_t* from = at(channel, tap);
    for (int64_t word = 0; word < words; ++word) set[tap] += bits_in(from[word * wide]);
  }
  for (int64_t edges = 0; edges < kinds; ++edges) {
    int64_t total = bias;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t ky = tap / kernel, kx = tap % kernel;
      const bool outside = kinds == 16 && ((ky == 0 && (edges & 1)) || (ky == 2 && (edges & 2)) ||
                                           (kx == 0 && (edges & 4)) || (kx == 2 && (edges & 8)));
      total += outside ? 2 * kUnit * set[tap] : kUnit * inputs;
    }
    // Wraps around as the specification's int32 does.
    totals[static_cast<size_t>(edges * padded_channels + channel)] = static_cast<int32_t>(static_cast<uint32_t>(total));
  }
}

void clear_edges(uint32_t* bits, int64_t height, int64_t width, int64_t words, int64_t first_row, int64_t last_row) {
  const int64_t row_words = (width + 2) * words;
  if (first_row == 0) std::fill_n(bits, row_words, 0u);
  if (last_row == height) std::fill_n(bits + (height + 1) * row_words, row_words, 0u);
  for (int64_t row = first_row + 1; row <= last_row; ++row) {
    std::fill_n(bits + row * row_words, words, 0u);
    std::fill_n(bits + (row + 1) * row_words - words, words, 0u);
  }
}

}  // namespace bnext
