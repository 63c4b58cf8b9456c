#include "operators/binary_conv.h"

#include <algorithm>
#include <memory>

namespace bnext {
namespace {

// Binary products of one task: some microseconds, so that threads share the work evenly and a task's weights
// stay in the cache.
constexpr int64_t kTaskProducts = 2 << 20;
// What it costs to requantize one sum, in words of 32 products.
constexpr int64_t kWordsOfRequantization = 8;
// Inputs that one task packs.
constexpr int64_t kTaskInputs = 1 << 14;

}  // namespace

BinaryConv::BinaryConv(const Info& info)
    : kernels_(kernels()),
      stride_(info.integer("stride", 1, 2)),
      low_(static_cast<float>(info.integer("low", -128, 0))),
      high_(static_cast<float>(info.integer("high", 0, 127))) {
  const Tensor<uint8_t> weight = info.constant<uint8_t>(1, "weight");
  const Tensor<int16_t> threshold = info.constant<int16_t>(2, "threshold");
  require(threshold.shape.size() == 1 && threshold.shape[0] > 0, "threshold has shape " + text_of(threshold.shape));
  const int64_t inputs = threshold.shape[0];
  const Shape& shape = weight.shape;
  const bool fits = shape.size() == 4 && shape[0] > 0 && (shape[1] == 1 || shape[1] == 3) && shape[1] == shape[2] &&
                    shape[3] == (inputs + 7) / 8;
  require(fits, "weight has shape " + text_of(shape) + ", need (outputs, k, k, " +
                    std::to_string((inputs + 7) / 8) + ") with k 1 or 3");
  const int64_t channels = shape[0];
  // The largest sum must fit: 64 * 9 * channels.
  require(inputs <= 1 << 20 && channels <= 1 << 20, "more than 1048576 channels");
  weights_.emplace(kernels_, inputs, channels, shape[1]);

  live_.assign(static_cast<size_t>(weights_->words), 0);
  threshold_.assign(static_cast<size_t>(padded(inputs)), 0);
  for (int64_t i = 0; i < inputs; ++i) {
    const int16_t value = threshold.data[i];
    require(value >= -128 && value <= 128, "threshold " + std::to_string(value) + ", allowed are -128 to 128");
    threshold_[static_cast<size_t>(i)] = static_cast<int8_t>(std::min<int16_t>(value, 127));
    if (value <= 127) live_[static_cast<size_t>(i / 32)] |= 1u << (i % 32);
  }
  multiplier_ = info.vector<float>(4, "multiplier", channels);
  for (const float value : multiplier_) require(std::isfinite(value), "a multiplier is not finite");
  slopes_ = info.vector<int8_t, float>(5, "slopes", channels);
  const float step = std::ldexp(1.0f, -static_cast<int>(info.integer("slope_shift", -24, 24)));
  for (float& slope : slopes_) slope *= step;
  pack_weight(weight, info.vector<int32_t>(3, "bias", channels));
}

void BinaryConv::pack_weight(const Tensor<uint8_t>& weight, const std::vector<int32_t>& bias) {
  BinaryWeights& to = *weights_;
  const int64_t taps = to.kernel * to.kernel, bytes = weight.shape[3];
  for (int64_t channel = 0; channel < to.channels; ++channel) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const uint8_t* from = weight.data + (channel * taps + tap) * bytes;
      uint32_t* words = to.at(channel, tap);
      for (int64_t byte = 0; byte < bytes; ++byte) {
        uint32_t value = from[byte];
        const int64_t used = to.inputs - 8 * byte;
        if (used < 8) value &= (1u << used) - 1;
        words[byte / 4 * to.wide] |= value << (8 * (byte % 4));
      }
    }
    to.sum_constants(channel, bias[static_cast<size_t>(channel)]);
  }
}

void BinaryConv::compute(const Run& run) const {
  const BinaryWeights& w = *weights_;
  const Tensor<int8_t> x = run.activations<int8_t>(0, "x");
  const int64_t images = x.shape[0], height = x.shape[1], width = x.shape[2];
  require(x.shape[3] == w.inputs,
          "x has shape " + text_of(x.shape) + ", need " + std::to_string(w.inputs) + " channels");
  const int64_t out_height = (height + stride_ - 1) / stride_, out_width = (width + stride_ - 1) / stride_;
  int8_t* y = run.output<int8_t>(0, {images, out_height, out_width, w.channels});
  int32_t* y_sum = run.output<int32_t>(1, {images, w.channels});
  int32_t* x_sum = run.output<int32_t>(2, {images, w.inputs});
  if (images == 0) return;

  const int64_t pad = w.kernel / 2, padded_height = height + 2 * pad, padded_width = width + 2 * pad;
  const int64_t image_words = padded_height * padded_width * w.words, padded_inputs = padded(w.inputs);
  const std::unique_ptr<uint32_t[]> bits(new uint32_t[static_cast<size_t>(images * image_words)]);
  const std::unique_ptr<int32_t[]> rows(
      x_sum != nullptr ? new int32_t[static_cast<size_t>(images * height * padded_inputs)] : nullptr);
  const auto pack_of = [&](int64_t image) {
    return Pack{x.data + image * height * width * w.inputs, height, width, w.inputs, threshold_.data(), live_.data(),
                bits.get() + image * image_words, w.words, pad, stride_ == 2,
                rows ? rows.get() + image * height * padded_inputs : nullptr};
  };
  const int64_t strips = parts_of(height * width * w.inputs, kTaskInputs, height);
  run.parallel(images * strips, [&](int64_t task) {
    const int64_t image = task / strips, strip = task % strips;
    uint32_t* const packed = bits.get() + image * image_words;
    const int64_t first = cut(height, strips, strip), last = cut(height, strips, strip + 1);
    if (pad != 0) clear_edges(packed, height, width, w.words, first, last);
    kernels_.pack(pack_of(image), first, last);
  });

  const int64_t wide = w.wide, tiles = w.tiles;
  const int64_t pixels = out_height * out_width;
  const int64_t products = (w.kernel * w.kernel * w.words + kWordsOfRequantization) * 32 * wide;
  const int64_t chunks = parts_of(pixels * products, kTaskProducts, std::max<int64_t>(pixels / 32, 1));
  const std::unique_ptr<int32_t[]> partial(
      y_sum != nullptr ? new int32_t[static_cast<size_t>(images * chunks * tiles * wide)]() : nullptr);
  run.parallel(images * chunks * tiles, [&](int64_t task) {
    const int64_t image = task / (chunks * tiles), tile = task / chunks % tiles, chunk = task % chunks;
    const Convolution convolution{bits.get() + image * image_words, w.bits.data(), w.words, w.kernel, stride_,
                                  padded_width, height, width, out_width, w.channels, image_words, pixels,
                                  w.padded_channels, w.totals.data(), multiplier_.data(),
                                  Prelu{slopes_.data(), low_, high_}, y + image * pixels * w.channels};
    int32_t* sums = partial ? partial.get() + ((image * chunks + chunk) * tiles + tile) * wide : nullptr;
    kernels_.convolve(convolution, w.groups, tile, cut(pixels, chunks, chunk), cut(pixels, chunks, chunk + 1), sums);
  });

  const auto add_up = [images](int32_t* to, const int32_t* from, int64_t parts, int64_t step, int64_t channels) {
    for (int64_t image = 0; image < images; ++image, to += channels) {
      std::fill_n(to, channels, 0);
      for (int64_t part = 0; part < parts; ++part, from += step) {
        for (int64_t channel = 0; channel < channels; ++channel) to[channel] += from[channel];
      }
    }
  };
  if (y_sum != nullptr) add_up(y_sum, partial.get(), chunks, tiles * wide, w.channels);
  if (x_sum != nullptr) add_up(x_sum, rows.get(), height, padded_inputs, w.inputs);
}

}  // namespace bnext
