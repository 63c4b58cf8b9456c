// bnext_qat.ChannelAttention: from the sums of a sub-block's input and of y to the gain of each channel.
#pragma once

#include "operator.h"

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
  struct Linear {
    int64_t outputs = 0, inputs = 0;
    std::vector<int8_t> weight;
    std::vector<int32_t> bias;
    std::vector<float> multiplier;
    float low = 0, high = 0;
  };
  static Linear linear(const Info& info, size_t index, const std::string& name, const std::string& grid);
  void apply(const Linear& layer, const int16_t* x, int16_t* out, int32_t* products) const;

  const Kernels& kernels_;
  Linear reduce_, expand_;
  float low_, high_;
  std::vector<float> x_multiplier_, y_multiplier_, gain_;
  std::vector<uint8_t> table_;
};

}  // namespace bnext
