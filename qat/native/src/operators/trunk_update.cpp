#include "operators/trunk_update.h"

#include <algorithm>

namespace bnext {
namespace {

// Elements of one task.
constexpr int64_t kTaskElements = 1 << 14;

}  // namespace

TrunkUpdate::TrunkUpdate(const Info& info)
    : kernels_(kernels()),
      stride_(info.integer("stride", 1, 2)),
      scales_(info.integer("scales", 0, 1) != 0),
      residual_low_(static_cast<float>(info.integer("residual_low", -128, 0))),
      residual_high_(static_cast<float>(info.integer("residual_high", 0, 127))),
      first_(info.real("first")) {
  const auto low = [&](const char* name) { return static_cast<float>(info.integer(name, -128, 0)); };
  const auto high = [&](const char* name) { return static_cast<float>(info.integer(name, 0, 127)); };
  update_.stride = stride_;
  update_.scales = scales_;
  update_.product_low = low("product_low");
  update_.product_high = high("product_high");
  update_.second = info.real("second");
  update_.branch_low = low("branch_low");
  update_.branch_high = high("branch_high");
  update_.branch_multiplier = info.real("branch_multiplier");
  update_.residual_multiplier = info.real("residual_multiplier");
  update_.low = low("low");
  update_.high = high("high");
  const Tensor<int8_t> offset = info.constant<int8_t>(3, "offset", false);
  const Tensor<int8_t> slopes = info.constant<int8_t>(4, "residual_slopes", false);
  for (const auto* constant : {&offset, &slopes}) {
    if (!*constant) continue;
    require(constant->shape.size() == 1 && constant->shape[0] > 0, "a vector has shape " + text_of(constant->shape));
    require(channels_ == 0 || channels_ == constant->shape[0], "offset and residual_slopes differ in length");
    channels_ = constant->shape[0];
  }
  if (offset) offset_ = info.vector<int8_t, float>(3, "offset", channels_);
  const auto shift = static_cast<int>(info.integer("residual_shift", -24, 24));
  if (slopes) {
    slopes_ = info.vector<int8_t, float>(4, "residual_slopes", channels_);
    for (float& slope : slopes_) slope *= std::ldexp(1.0f, -shift);
  }
}

void TrunkUpdate::compute(const Run& run) const {
  const Tensor<int8_t> y = run.activations<int8_t>(0, "y"), x = run.activations<int8_t>(1, "x");
  const int64_t images = x.shape[0], height = x.shape[1], width = x.shape[2], channels = x.shape[3];
  const int64_t out_height = (height + stride_ - 1) / stride_, out_width = (width + stride_ - 1) / stride_;
  const Shape shape{images, out_height, out_width, channels};
  require(y.shape == shape, "y has shape " + text_of(y.shape) + ", x of shape " + text_of(x.shape) + " needs " +
                                text_of(shape));
  require(channels_ == 0 || channels == channels_,
          "x has shape " + text_of(x.shape) + ", need " + std::to_string(channels_) + " channels");
  // An optional input may arrive in a run without having been a constant before.
  require(!offset_.empty() || !run.input<int8_t>(3, "offset"), "offset must be a constant");
  require(!slopes_.empty() || !run.input<int8_t>(4, "residual_slopes"), "residual_slopes must be a constant");
  const Tensor<int8_t> gain = run.input<int8_t>(2, "gain");
  require(!offset_.empty() == static_cast<bool>(gain), "gain and offset go together");
  const bool fits = !gain || gain.shape == Shape{images, channels} || gain.shape == Shape{1, channels};
  require(fits, "gain has shape " + text_of(gain.shape) + ", need (" + std::to_string(images) + " or 1, " +
                    std::to_string(channels) + ")");
  int8_t* out = run.output<int8_t>(0, shape);
  if (images == 0) return;

  // Gains in real numbers, padded for the kernels.
  const int64_t width_of_gains = padded(channels), gains = gain ? gain.shape[0] : 0;
  std::vector<float> scaled(static_cast<size_t>(gains * width_of_gains));
  for (int64_t image = 0; image < gains; ++image) {
    for (int64_t i = 0; i < channels; ++i) {
      const auto value = static_cast<float>(gain.data[image * channels + i]);
      scaled[static_cast<size_t>(image * width_of_gains + i)] = value * first_;
    }
  }
  const int64_t pixels = out_height * out_width;
  const int64_t strips = parts_of(pixels * channels, kTaskElements, out_height);
  run.parallel(images * strips, [&](int64_t task) {
    const int64_t image = task / strips, strip = task % strips;
    Update update = update_;
    update.y = y.data + image * pixels * channels;
    update.x = x.data + image * height * width * channels;
    update.height = height;
    update.width = width;
    update.out_width = out_width;
    update.channels = channels;
    update.residual = {slopes_.empty() ? nullptr : slopes_.data(), residual_low_, residual_high_};
    update.gain = gains == 0 ? nullptr : scaled.data() + (gains == 1 ? 0 : image * width_of_gains);
    update.offset = offset_.data();
    update.out = out + image * pixels * channels;
    kernels_.update(update, cut(out_height, strips, strip), cut(out_height, strips, strip + 1));
  });
}

}  // namespace bnext
