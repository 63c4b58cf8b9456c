// bnext_qat.Stem: 3×3 convolution of a uint8 image, requantized and written channels-last.
#pragma once

#include "operators/operator.h"

namespace bnext {

class Stem {
 public:
  static constexpr const char* kName = "Stem";
  static constexpr Slot kInputs[] = {{ort::kUint8}, {ort::kInt8}, {ort::kInt32}, {ort::kFloat}};
  static constexpr Slot kOutputs[] = {{ort::kInt8}};

  explicit Stem(const Info& info);
  void compute(const Run& run) const;

 private:
  const Kernels& kernels_;
  int64_t stride_, channels_ = 0;
  float zero_point_, low_, high_;
  std::vector<float> weight_, multiplier_;
  std::vector<int32_t> bias_;
};

}  // namespace bnext
