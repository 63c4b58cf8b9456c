#include "operators/attention.h"

#include <algorithm>

namespace bnext {
ChannelAttention::ChannelAttention(const Info& info)
    : kernels_(kernels()),
      reduce_(layer(info, 4, "reduce", "hidden")),
      expand_(layer(info, 7, "expand", "logits")),
      low_(static_cast<float>(info.integer("pooled_low", -128, 0))),
      high_(static_cast<float>(info.integer("pooled_high", 0, 127))) {
  const int64_t channels = reduce_.inputs;
  require(expand_.inputs == reduce_.outputs && expand_.outputs == channels,
          "expand is " + std::to_string(expand_.outputs) + "×" + std::to_string(expand_.inputs) + ", reduce " +
              std::to_string(reduce_.outputs) + "×" + std::to_string(channels));
  require(expand_.low >= -128 && expand_.high <= 127, "logits beyond -128 to 127 have no place in the table");
  x_multiplier_ = info.vector<float>(2, "x_multiplier", channels);
  y_multiplier_ = info.vector<float>(3, "y_multiplier", channels);
  gain_ = info.vector<float>(11, "gain", channels);
  for (const auto* values : {&x_multiplier_, &y_multiplier_, &gain_}) {
    for (const float value : *values) require(std::isfinite(value), "a multiplier is not finite");
  }
  const Tensor<uint8_t> table = info.constant<uint8_t>(10, "table");
  require(table.shape == Shape{256}, "table has shape " + text_of(table.shape) + ", need (256)");
  table_.assign(table.data, table.data + 256);
}

ChannelAttention::Layer ChannelAttention::layer(
    const Info& info, size_t index, const std::string& name, const std::string& grid) const {
  const Tensor<int8_t> weight = info.constant<int8_t>(index, (name + "_weight").c_str());
  const Shape& shape = weight.shape;
  require(shape.size() == 2 && shape[0] > 0 && shape[1] > 0, name + "_weight has shape " + text_of(shape));
  Layer layer;
  layer.outputs = shape[0];
  layer.inputs = shape[1];
  // Products of int8 with integers below 256: sums fit into int32.
  require(layer.inputs <= 1 << 16, name + "_weight has more than 65536 inputs");
  const int64_t lanes = kernels_.lanes, pairs = (layer.inputs + 1) / 2;
  layer.weight.assign(static_cast<size_t>((layer.outputs + lanes - 1) / lanes * pairs * lanes * 2), 0);
  for (int64_t output = 0; output < layer.outputs; ++output) {
    int8_t* to = layer.weight.data() + (output / lanes * pairs * lanes + output % lanes) * 2;
    for (int64_t input = 0; input < layer.inputs; ++input) {
      to[input / 2 * lanes * 2 + input % 2] = weight.data[output * layer.inputs + input];
    }
  }
  layer.bias = info.vector<int32_t>(index + 1, (name + "_bias").c_str(), layer.outputs);
  layer.multiplier = info.vector<float>(index + 2, (name + "_multiplier").c_str(), layer.outputs);
  for (const float value : layer.multiplier) require(std::isfinite(value), name + ": a multiplier is not finite");
  layer.low = static_cast<float>(info.integer((grid + "_low").c_str(), -128, 0));
  layer.high = static_cast<float>(info.integer((grid + "_high").c_str(), 0, 255));
  return layer;
}

void ChannelAttention::compute(const Run& run) const {
  const int64_t channels = reduce_.inputs;
  const Tensor<int32_t> x = run.input<int32_t>(0, "x_sum"), y = run.input<int32_t>(1, "y_sum");
  const bool fits = x.shape.size() == 2 && x.shape[1] == channels && y.shape == x.shape;
  require(fits, "sums have shapes " + text_of(x.shape) + " and " + text_of(y.shape) + ", need (images, " +
                    std::to_string(channels) + ")");
  const int64_t images = x.shape[0];
  int8_t* out = run.output<int8_t>(0, {images, channels});
  const int64_t longest = padded(std::max(channels, reduce_.outputs));
  std::vector<int32_t> sums(static_cast<size_t>(longest));
  std::vector<int16_t> vectors(static_cast<size_t>(2 * longest));
  for (int64_t image = 0; image < images; ++image) {
    kernels_.attention({x.data + image * channels, y.data + image * channels, channels, x_multiplier_.data(),
                        y_multiplier_.data(), low_, high_, reduce_, expand_, table_.data(), gain_.data(),
                        out + image * channels, sums.data(), vectors.data()});
  }
}

}  // namespace bnext
