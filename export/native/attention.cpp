#include "attention.h"

#include <algorithm>

namespace bnext {
namespace {

// Clamp first, then round half to even: what export/reference.py does, within int16. The order of max's arguments
// makes the difference of two infinities `low`.
int16_t saturate(float value, float low, float high) {
  return static_cast<int16_t>(std::nearbyintf(std::min(std::max(low, value), high)));
}

}  // namespace

ChannelAttention::ChannelAttention(const Info& info)
    : kernels_(kernels()),
      reduce_(linear(info, 4, "reduce", "hidden")),
      expand_(linear(info, 7, "expand", "logits")),
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

ChannelAttention::Linear ChannelAttention::linear(
    const Info& info, size_t index, const std::string& name, const std::string& grid) {
  const Tensor<int8_t> weight = info.constant<int8_t>(index, (name + "_weight").c_str());
  const Shape& shape = weight.shape;
  require(shape.size() == 2 && shape[0] > 0 && shape[1] > 0, name + "_weight has shape " + text_of(shape));
  Linear layer;
  layer.outputs = shape[0];
  layer.inputs = shape[1];
  // Products of int8 with integers below 256: sums fit into int32.
  require(layer.inputs <= 1 << 16, name + "_weight has more than 65536 inputs");
  layer.weight.assign(weight.data, weight.data + weight.size());
  layer.bias = info.vector<int32_t>(index + 1, (name + "_bias").c_str(), layer.outputs);
  layer.multiplier = info.vector<float>(index + 2, (name + "_multiplier").c_str(), layer.outputs);
  for (const float value : layer.multiplier) require(std::isfinite(value), name + ": a multiplier is not finite");
  layer.low = static_cast<float>(info.integer((grid + "_low").c_str(), -128, 0));
  layer.high = static_cast<float>(info.integer((grid + "_high").c_str(), 0, 255));
  return layer;
}

void ChannelAttention::apply(const Linear& layer, const int16_t* x, int16_t* out, int32_t* products) const {
  kernels_.matvec(layer.weight.data(), x, layer.outputs, layer.inputs, products);
  for (int64_t i = 0; i < layer.outputs; ++i) {
    const auto at = static_cast<size_t>(i);
    const uint32_t total = static_cast<uint32_t>(products[i]) + static_cast<uint32_t>(layer.bias[at]);
    out[i] = saturate(static_cast<float>(static_cast<int32_t>(total)) * layer.multiplier[at], layer.low, layer.high);
  }
}

void ChannelAttention::compute(const Run& run) const {
  const int64_t channels = reduce_.inputs;
  const Tensor<int32_t> x = run.input<int32_t>(0, "x_sum"), y = run.input<int32_t>(1, "y_sum");
  const bool fits = x.shape.size() == 2 && x.shape[1] == channels && y.shape == x.shape;
  require(fits, "sums have shapes " + text_of(x.shape) + " and " + text_of(y.shape) + ", need (images, " +
                    std::to_string(channels) + ")");
  const int64_t images = x.shape[0];
  int8_t* out = run.output<int8_t>(0, {images, channels});
  std::vector<int16_t> pooled(static_cast<size_t>(channels)), hidden(static_cast<size_t>(reduce_.outputs)),
      logits(static_cast<size_t>(channels));
  std::vector<int32_t> products(static_cast<size_t>(std::max(channels, reduce_.outputs)));
  for (int64_t image = 0; image < images; ++image, out += channels) {
    const int32_t *xs = x.data + image * channels, *ys = y.data + image * channels;
    for (int64_t i = 0; i < channels; ++i) {
      const auto at = static_cast<size_t>(i);
      const float from_x = static_cast<float>(xs[i]) * x_multiplier_[at];
      const float from_y = static_cast<float>(ys[i]) * y_multiplier_[at];
      pooled[at] = saturate(from_x + from_y, low_, high_);
    }
    apply(reduce_, pooled.data(), hidden.data(), products.data());
    apply(expand_, hidden.data(), logits.data(), products.data());
    for (int64_t i = 0; i < channels; ++i) {
      const auto at = static_cast<size_t>(i);
      const float share = static_cast<float>(table_[static_cast<size_t>(logits[at] + 128)]);
      out[i] = static_cast<int8_t>(saturate(share * gain_[at], -128.0f, 127.0f));
    }
  }
}

}  // namespace bnext
