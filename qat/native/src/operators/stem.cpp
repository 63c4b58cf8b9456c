#include "operators/stem.h"

#include <algorithm>

namespace bnext {
namespace {

constexpr int64_t kColors = 3, kTaps = 9;
// Output pixels of one task.
constexpr int64_t kTaskPixels = 1024;

}  // namespace

Stem::Stem(const Info& info)
    : kernels_(kernels()),
      stride_(info.integer("stride", 1, 2)),
      zero_point_(static_cast<float>(info.integer("zero_point", 0, 255))),
      low_(static_cast<float>(info.integer("low", -128, 0))),
      high_(static_cast<float>(info.integer("high", 0, 127))) {
  const Tensor<int8_t> weight = info.constant<int8_t>(1, "weight");
  const Shape& shape = weight.shape;
  const bool fits = shape.size() == 4 && shape[0] > 0 && shape[1] == kColors && shape[2] == 3 && shape[3] == 3;
  require(fits, "weight has shape " + text_of(shape) + ", need (channels, 3, 3, 3)");
  channels_ = shape[0];
  bias_ = info.vector<int32_t>(2, "bias", channels_);
  multiplier_ = info.vector<float>(3, "multiplier", channels_);
  for (const float value : multiplier_) require(std::isfinite(value), "a multiplier is not finite");
  const auto padded = static_cast<int64_t>(multiplier_.size());
  weight_.assign(static_cast<size_t>(kTaps * kColors * padded), 0.0f);
  for (int64_t channel = 0; channel < channels_; ++channel) {
    for (int64_t color = 0; color < kColors; ++color) {
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        const int64_t place = (tap / 3 * kColors + color) * 3 + tap % 3;
        weight_[static_cast<size_t>(place * padded + channel)] =
            static_cast<float>(weight.data[(channel * kColors + color) * kTaps + tap]);
      }
    }
  }
}

void Stem::compute(const Run& run) const {
  const Tensor<uint8_t> x = run.activations<uint8_t>(0, "x");
  require(x.shape[1] == kColors, "x has shape " + text_of(x.shape) + ", need (images, 3, height, width)");
  const int64_t images = x.shape[0], height = x.shape[2], width = x.shape[3];
  const int64_t out_height = (height + stride_ - 1) / stride_, out_width = (width + stride_ - 1) / stride_;
  int8_t* out = run.output<int8_t>(0, {images, out_height, out_width, channels_});
  if (images == 0) return;
  const int64_t pixels = out_height * out_width;
  const int64_t strips = parts_of(pixels, kTaskPixels, out_height);
  std::vector<float> work(static_cast<size_t>(images * strips * kTaps * (width + 2)));
  run.parallel(images * strips, [&](int64_t task) {
    const int64_t image = task / strips, strip = task % strips;
    float* const scratch = work.data() + task * kTaps * (width + 2);
    const StemRows rows{x.data + image * kColors * height * width, height, width, zero_point_, weight_.data(),
                        bias_.data(), multiplier_.data(), low_, high_, out_width, channels_, stride_,
                        out + image * pixels * channels_, scratch};
    kernels_.stem(rows, cut(out_height, strips, strip), cut(out_height, strips, strip + 1));
  });
}

}  // namespace bnext
