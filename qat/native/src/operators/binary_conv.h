// bnext_qat.BinaryConv: threshold, binary convolution, requantization, PReLU, and the sums of input and result.
#pragma once

#include <optional>

#include "kernels/binary_layout.h"
#include "operators/operator.h"

namespace bnext {

class BinaryConv {
 public:
  static constexpr const char* kName = "BinaryConv";
  static constexpr Slot kInputs[] = {
      {ort::kInt8}, {ort::kUint8}, {ort::kInt16}, {ort::kInt32}, {ort::kFloat}, {ort::kInt8},
  };
  static constexpr Slot kOutputs[] = {
      {ort::kInt8},
      {ort::kInt32, ort::kOptional},
      {ort::kInt32, ort::kOptional},
  };

  explicit BinaryConv(const Info& info);
  void compute(const Run& run) const;

 private:
  void pack_weight(const Tensor<uint8_t>& weight, const std::vector<int32_t>& bias);

  const Kernels& kernels_;
  int64_t stride_;
  float low_, high_;
  std::optional<BinaryWeights> weights_;
  std::vector<uint32_t> live_;
  std::vector<int8_t> threshold_;
  std::vector<float> multiplier_, slopes_;
};

}  // namespace bnext
