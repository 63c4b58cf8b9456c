// bnext_qat.ChannelAttention: from the sums of a sub-block's input and of y to the gain of each channel.
#pragma once

#include "operators/operator.h"

namespace bnext {

class ChannelAttention {
 public:
  static constexpr const char* kName = "ChannelAttention";
  static constexpr Slot kInputs[] = {
      {ort::kInt32}, {ort::kInt32},                                // sums of x and y
      {ort::kFloat}, {ort::kFloat},                                // their multipliers
      {ort::kInt8},  {ort::kInt32}, {ort::kFloat},                 // reduce
      {ort::kInt8},  {ort::kInt32}, {ort::kFloat},                 // expand
      {ort::kUint8}, {ort::kFloat},                                // sigmoid, gain
  };
  static constexpr Slot kOutputs[] = {{ort::kInt8}};

  explicit ChannelAttention(const Info& info);
  void compute(const Run& run) const;

 private:
  struct Layer {
    int64_t outputs = 0, inputs = 0;
    std::vector<int8_t> weight;
    std::vector<int32_t> bias;
    std::vector<float> multiplier;
    float low = 0, high = 0;

    operator Linear() const {
      return {weight.data(), outputs, (inputs + 1) / 2, bias.data(), multiplier.data(), low, high};
    }
  };
  Layer layer(const Info& info, size_t index, const std::string& name, const std::string& grid) const;

  const Kernels& kernels_;
  Layer reduce_, expand_;
  float low_, high_;
  std::vector<float> x_multiplier_, y_multiplier_, gain_, table_;
};

}  // namespace bnext
