#include "binaryconv.h"

#include <algorithm>
#include <memory>

namespace bnext {
namespace {

// An accumulator counts in units of 1/64 of a product (qat.dyadic.ACCUMULATOR_UNIT).
constexpr int64_t kUnit = 64;
// Binary products of one task: some microseconds, so that threads share the work evenly and a task's weights
// stay in the cache.
constexpr int64_t kTaskProducts = 2 << 20;
// What it costs to requantize one sum, in words of 32 products.
constexpr int64_t kWordsOfRequantization = 8;
// Inputs that one task packs.
constexpr int64_t kTaskInputs = 1 << 14;

int bits_in(uint8_t byte) {
  int count = 0;
  for (; byte != 0; byte &= static_cast<uint8_t>(byte - 1)) ++count;
  return count;
}

}  // namespace

BinaryConv::BinaryConv(const Info& info)
    : kernels_(kernels()),
      stride_(info.integer("stride", 1, 2)),
      low_(static_cast<float>(info.integer("low", -128, 0))),
      high_(static_cast<float>(info.integer("high", 0, 127))) {
  const Tensor<uint8_t> weight = info.constant<uint8_t>(1, "weight");
  const Tensor<int16_t> threshold = info.constant<int16_t>(2, "threshold");
  require(threshold.shape.size() == 1 && threshold.shape[0] > 0, "threshold has shape " + text_of(threshold.shape));
  inputs_ = threshold.shape[0];
  const Shape& shape = weight.shape;
  const bool fits = shape.size() == 4 && shape[0] > 0 && (shape[1] == 1 || shape[1] == 3) && shape[1] == shape[2] &&
                    shape[3] == (inputs_ + 7) / 8;
  require(fits, "weight has shape " + text_of(shape) + ", need (outputs, k, k, " +
                    std::to_string((inputs_ + 7) / 8) + ") with k 1 or 3");
  channels_ = shape[0];
  kernel_ = shape[1];
  words_ = (inputs_ + 31) / 32;
  // The largest sum must fit: 64 * 9 * channels.
  require(inputs_ <= 1 << 20 && channels_ <= 1 << 20, "more than 1048576 channels");

  live_.assign(static_cast<size_t>(words_), 0);
  threshold_.assign(static_cast<size_t>(padded(inputs_)), 0);
  for (int64_t i = 0; i < inputs_; ++i) {
    const int16_t value = threshold.data[i];
    require(value >= -128 && value <= 128, "threshold " + std::to_string(value) + ", allowed are -128 to 128");
    threshold_[static_cast<size_t>(i)] = static_cast<int8_t>(std::min<int16_t>(value, 127));
    if (value <= 127) live_[static_cast<size_t>(i / 32)] |= 1u << (i % 32);
  }
  multiplier_ = info.vector<float>(4, "multiplier", channels_);
  for (const float value : multiplier_) require(std::isfinite(value), "a multiplier is not finite");
  slopes_ = info.vector<int8_t, float>(5, "slopes", channels_);
  const float step = std::ldexp(1.0f, -static_cast<int>(info.integer("slope_shift", -24, 24)));
  for (float& slope : slopes_) slope *= step;
  padded_ = padded(channels_);
  sum_constants(weight, info.vector<int32_t>(3, "bias", channels_));
  pack_weight(weight);
}

// Weights of a tile of channels side by side, one word of each in a vector.
void BinaryConv::pack_weight(const Tensor<uint8_t>& weight) {
  const int64_t lanes = kernels_.lanes;
  while (groups_ < kernels_.most_groups && groups_ * lanes < channels_) groups_ *= 2;
  const int64_t wide = groups_ * lanes, tiles = (channels_ + wide - 1) / wide;
  const int64_t taps = kernel_ * kernel_, bytes = weight.shape[3];
  weight_.assign(static_cast<size_t>(tiles * taps * words_ * wide), 0);
  for (int64_t channel = 0; channel < channels_; ++channel) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const uint8_t* from = weight.data + (channel * taps + tap) * bytes;
      uint32_t* to = weight_.data() + ((channel / wide * taps + tap) * words_) * wide + channel % wide;
      for (int64_t byte = 0; byte < bytes; ++byte) {
        uint32_t value = from[byte];
        const int64_t used = inputs_ - 8 * byte;
        if (used < 8) value &= (1u << used) - 1;
        to[byte / 4 * wide] |= value << (8 * (byte % 4));
      }
    }
  }
}

// A padded pixel's bits are 0, so its products count like those of -1: popcount of the weights in that tap. The
// constant part of the sum takes them out again, and is another one for each set of edges that a window crosses.
void BinaryConv::sum_constants(const Tensor<uint8_t>& weight, const std::vector<int32_t>& bias) {
  const int64_t taps = kernel_ * kernel_, bytes = weight.shape[3];
  const int64_t kinds = kernel_ == 1 ? 1 : 16;
  totals_.assign(static_cast<size_t>(kinds * padded_), 0);
  for (int64_t channel = 0; channel < channels_; ++channel) {
    int64_t set[9] = {};
    for (int64_t tap = 0; tap < taps; ++tap) {
      const uint8_t* from = weight.data + (channel * taps + tap) * bytes;
      for (int64_t byte = 0; byte < bytes; ++byte) {
        const int64_t used = inputs_ - 8 * byte;
        const uint8_t mask = used < 8 ? static_cast<uint8_t>((1u << used) - 1) : uint8_t{255};
        set[tap] += bits_in(from[byte] & mask);
      }
    }
    for (int64_t edges = 0; edges < kinds; ++edges) {
      int64_t total = bias[static_cast<size_t>(channel)];
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t ky = tap / kernel_, kx = tap % kernel_;
        const bool outside = kinds == 16 && ((ky == 0 && (edges & 1)) || (ky == 2 && (edges & 2)) ||
                                             (kx == 0 && (edges & 4)) || (kx == 2 && (edges & 8)));
        total += outside ? 2 * kUnit * set[tap] : kUnit * inputs_;
      }
      // Wraps around as the specification's int32 does.
      totals_[static_cast<size_t>(edges * padded_ + channel)] = static_cast<int32_t>(static_cast<uint32_t>(total));
    }
  }
}

void BinaryConv::compute(const Run& run) const {
  const Tensor<int8_t> x = run.activations<int8_t>(0, "x");
  const int64_t images = x.shape[0], height = x.shape[1], width = x.shape[2];
  require(x.shape[3] == inputs_, "x has shape " + text_of(x.shape) + ", need " + std::to_string(inputs_) + " channels");
  const int64_t out_height = (height + stride_ - 1) / stride_, out_width = (width + stride_ - 1) / stride_;
  int8_t* y = run.output<int8_t>(0, {images, out_height, out_width, channels_});
  int32_t* y_sum = run.output<int32_t>(1, {images, channels_});
  int32_t* x_sum = run.output<int32_t>(2, {images, inputs_});
  if (images == 0) return;

  const int64_t pad = kernel_ / 2, padded_height = height + 2 * pad, padded_width = width + 2 * pad;
  const int64_t image_words = padded_height * padded_width * words_, padded_inputs = padded(inputs_);
  const std::unique_ptr<uint32_t[]> bits(new uint32_t[static_cast<size_t>(images * image_words)]);
  const std::unique_ptr<int32_t[]> rows(
      x_sum != nullptr ? new int32_t[static_cast<size_t>(images * height * padded_inputs)] : nullptr);
  const auto pack_of = [&](int64_t image) {
    return Pack{x.data + image * height * width * inputs_, height, width, inputs_, threshold_.data(), live_.data(),
                bits.get() + image * image_words, words_, pad, stride_ == 2,
                rows ? rows.get() + image * height * padded_inputs : nullptr};
  };
  const int64_t strips = parts_of(height * width * inputs_, kTaskInputs, height);
  run.parallel(images * strips, [&](int64_t task) {
    const int64_t image = task / strips, strip = task % strips;
    uint32_t* const packed = bits.get() + image * image_words;
    const int64_t first = cut(height, strips, strip), last = cut(height, strips, strip + 1);
    if (pad != 0) {
      const int64_t row_words = padded_width * words_;
      if (first == 0) std::fill_n(packed, row_words, 0u);
      if (last == height) std::fill_n(packed + (padded_height - 1) * row_words, row_words, 0u);
      for (int64_t row = first + pad; row < last + pad; ++row) {
        std::fill_n(packed + row * row_words, words_, 0u);
        std::fill_n(packed + (row + 1) * row_words - words_, words_, 0u);
      }
    }
    kernels_.pack(pack_of(image), first, last);
  });

  const int64_t wide = groups_ * kernels_.lanes, tiles = (channels_ + wide - 1) / wide;
  const int64_t pixels = out_height * out_width;
  const int64_t products = (kernel_ * kernel_ * words_ + kWordsOfRequantization) * 32 * wide;
  const int64_t chunks = parts_of(pixels * products, kTaskProducts, std::max<int64_t>(pixels / 32, 1));
  const std::unique_ptr<int32_t[]> partial(
      y_sum != nullptr ? new int32_t[static_cast<size_t>(images * chunks * tiles * wide)]() : nullptr);
  run.parallel(images * chunks * tiles, [&](int64_t task) {
    const int64_t image = task / (chunks * tiles), tile = task / chunks % tiles, chunk = task % chunks;
    const Convolution convolution{bits.get() + image * image_words, weight_.data(), words_, kernel_, stride_,
                                  padded_width, height, width, out_width, channels_, padded_, totals_.data(),
                                  multiplier_.data(), Prelu{slopes_.data(), low_, high_},
                                  y + image * pixels * channels_};
    int32_t* sums = partial ? partial.get() + ((image * chunks + chunk) * tiles + tile) * wide : nullptr;
    kernels_.convolve(convolution, groups_, tile, cut(pixels, chunks, chunk), cut(pixels, chunks, chunk + 1), sums);
  });

  const auto add_up = [images](int32_t* to, const int32_t* from, int64_t parts, int64_t step, int64_t channels) {
    for (int64_t image = 0; image < images; ++image, to += channels) {
      std::fill_n(to, channels, 0);
      for (int64_t part = 0; part < parts; ++part, from += step) {
        for (int64_t channel = 0; channel < channels; ++channel) to[channel] += from[channel];
      }
    }
  };
  if (y_sum != nullptr) add_up(y_sum, partial.get(), chunks, tiles * wide, channels_);
  if (x_sum != nullptr) add_up(x_sum, rows.get(), height, padded_inputs, inputs_);
}

}  // namespace bnext
