// What an instruction set has to implement, and the data it works on. Activations are channels-last int8,
// packed signs and weights 32 channels to a word, bit c % 32 of word c / 32, set for +1.
#pragma once

#include <cstdint>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed signs are bytes of little-endian words here"
#endif

namespace bnext {

// Constants per channel are padded with zeros to a multiple of this, so that kernels read whole vectors.
constexpr int64_t kPadding = 64;
// Static, like all that kernels share with others: each file has its own, compiled for its processor.
static constexpr int64_t padded(int64_t channels) { return (channels + kPadding - 1) / kPadding * kPadding; }

// PReLU on integers of a grid: q >= 0 ? q : clamp(rint(q * slope)).
struct Prelu {
  const float* slopes;  // [padded channels], nullptr for none
  float low, high;
};

// Signs of the rows of one image.
struct Pack {
  const int8_t* x;          // [height][width][channels]
  int64_t height, width, channels;
  const int8_t* threshold;  // [padded channels], +1 where x >= threshold
  const uint32_t* live;     // [words], 0 in channels whose threshold no x reaches, and beyond the last
  uint32_t* bits;           // [height + 2 pad][width + 2 pad][words], edges are 0 already
  int64_t words, pad;
  bool to_even;             // a last odd row or column counts twice in the sums
  int32_t* sums;            // [height][padded channels], sums of x over each row, or nullptr
};

// A binary convolution of one image, requantized: see export/qat_export/integer/reference.py.
struct Convolution {
  const uint32_t* bits;    // from Pack
  const uint32_t* weight;  // [tile][kernel * kernel * words][tile channels]
  int64_t words, kernel, stride, padded_width;
  int64_t height, width;          // of the input
  int64_t out_width, channels;    // of the output
  // Where several images lie one behind the other, output pixels are counted on: words of one, output pixels.
  int64_t image_words, image_pixels;
  int64_t padded_channels;        // of `totals`
  // [16][padded channels]: bias and constant part of the sum, one row for each set of edges that a window
  // crosses (1 top, 2 bottom, 4 left, 8 right).
  const int32_t* totals;
  const float* multiplier;  // [padded channels]
  Prelu prelu;              // its grid is y's
  int8_t* y;                // [out height][out width][channels]
};

// From y to the next trunk tensor, one image.
struct Update {
  const int8_t* y;  // [out height][out width][channels]
  const int8_t* x;  // [height][width][channels]
  int64_t height, width, out_width, channels, stride;
  Prelu residual;        // of x
  const float* gain;     // [padded channels] gain times its multiplier; nullptr: y is the branch
  const float* offset;   // [padded channels]
  bool scales;           // the residual is a factor of the branch
  float product_low, product_high, second;
  float branch_low, branch_high;
  float branch_multiplier, residual_multiplier;
  float low, high;       // of the result
  int8_t* out;           // [out height][out width][channels]
};

// 3×3 convolution of a uint8 image of three channels, requantized.
struct StemRows {
  const uint8_t* image;  // [3][height][width]
  int64_t height, width;
  float zero_point;
  const float* weight;  // [27][padded channels], in the order (row, color, column)
  const int32_t* bias;
  const float* multiplier;
  float low, high;
  int64_t out_width, channels, stride;
  int8_t* out;  // [out height][out width][channels]
  float* rows;  // [9][width + 2], to work in
};

// A layer of channel attention: clamp(rint(float(weight · x + bias) * multiplier)).
struct Linear {
  const int8_t* weight;  // [vector of outputs][pair of inputs][lanes][2]
  int64_t outputs, pairs;
  const int32_t* bias;      // [padded outputs]
  const float* multiplier;  // [padded outputs]
  float low, high;
};

// Channel attention of one image: see export/qat_export/integer/reference.py.
struct Attention {
  const int32_t *x_sum, *y_sum;  // [channels]
  int64_t channels;
  const float *x_multiplier, *y_multiplier;  // [padded channels]
  float low, high;                           // of the pooled vector
  Linear reduce, expand;
  const float* table;  // [256] attention of logit `index - 128`
  const float* gain;   // [padded channels]
  int8_t* out;         // [channels]
  int32_t* sums;       // [padded, as many as the longest vector], to work in
  int16_t* vectors;    // [2][the same], 0 at first
};

struct Kernels {
  const char* name;
  int lanes;        // 32-bit numbers of a vector
  int most_groups;  // vectors of channels in a tile, at most
  void (*pack)(const Pack&, int64_t first_row, int64_t last_row);
  // One tile of `groups` vectors of output channels over a range of output pixels (row by row); adds the sums
  // of y to `sums` [tile channels] unless it is nullptr.
  void (*convolve)(const Convolution&, int groups, int64_t tile, int64_t first, int64_t last, int32_t* sums);
  // The same pixels' sums as they are: [last - first][tile channels].
  void (*sums)(const Convolution&, int groups, int64_t tile, int64_t first, int64_t last, int32_t* to);
  void (*update)(const Update&, int64_t first_row, int64_t last_row);
  void (*stem)(const StemRows&, int64_t first_row, int64_t last_row);
  // Sums of PReLU(x) over rows of a channels-last tensor: [padded channels], added.
  void (*sum)(const int8_t* x, int64_t pixels, int64_t channels, const Prelu&, int32_t* sums);
  void (*attention)(const Attention&);
};

// The best set this processor runs, or the one that the environment variable BNEXT_QAT_KERNELS names.
// Throws std::runtime_error where that names none that runs here.
const Kernels& kernels();

// Chosen at the first call, for training. Never throws, since what calls has no word for it: Python looks at
// BNEXT_QAT_KERNELS before.
const Kernels& training_kernels() noexcept;

// Sets built into this library; nullptr ends the list, best first. `supported` asks the processor.
struct Choice {
  const Kernels* kernels;
  bool (*supported)();
};
const Choice* choices();

}  // namespace bnext
