#include "operators/channel_sums.h"

#include <algorithm>

namespace bnext {

ChannelSums::ChannelSums(const Info& info)
    : kernels_(kernels()),
      low_(static_cast<float>(info.integer("low", -128, 0))),
      high_(static_cast<float>(info.integer("high", 0, 127))) {
  const Tensor<int8_t> slopes = info.constant<int8_t>(1, "slopes");
  require(slopes.shape.size() == 1 && slopes.shape[0] > 0, "slopes has shape " + text_of(slopes.shape));
  channels_ = slopes.shape[0];
  slopes_ = info.vector<int8_t, float>(1, "slopes", channels_);
  const auto shift = static_cast<int>(info.integer("slope_shift", -24, 24));
  for (float& slope : slopes_) slope *= std::ldexp(1.0f, -shift);
}

void ChannelSums::compute(const Run& run) const {
  const Tensor<int8_t> x = run.activations<int8_t>(0, "x");
  require(x.shape[3] == channels_,
          "x has shape " + text_of(x.shape) + ", need " + std::to_string(channels_) + " channels");
  const int64_t images = x.shape[0], pixels = x.shape[1] * x.shape[2];
  int32_t* out = run.output<int32_t>(0, {images, channels_});
  const auto padded = static_cast<int64_t>(slopes_.size());
  std::vector<int32_t> sums(static_cast<size_t>(images * padded));
  run.parallel(images, [&](int64_t image) {
    const Prelu prelu{slopes_.data(), low_, high_};
    kernels_.sum(x.data + image * pixels * channels_, pixels, channels_, prelu, sums.data() + image * padded);
  });
  for (int64_t image = 0; image < images; ++image) {
    std::copy_n(sums.data() + image * padded, channels_, out + image * channels_);
  }
}

}  // namespace bnext
