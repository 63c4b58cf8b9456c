// bnext_qat.TrunkUpdate: gain, residual, batch normalization's offset and sum: the next trunk tensor.
#pragma once

#include "operators/operator.h"

namespace bnext {

class TrunkUpdate {
 public:
  static constexpr const char* kName = "TrunkUpdate";
  static constexpr Slot kInputs[] = {
      {ort::kInt8},
      {ort::kInt8},
      {ort::kInt8, ort::kOptional},
      {ort::kInt8, ort::kOptional},
      {ort::kInt8, ort::kOptional},
  };
  static constexpr Slot kOutputs[] = {{ort::kInt8}};

  explicit TrunkUpdate(const Info& info);
  void compute(const Run& run) const;

 private:
  const Kernels& kernels_;
  int64_t stride_, channels_ = 0;
  bool scales_;
  float residual_low_, residual_high_, first_;
  Update update_{};
  std::vector<float> offset_, slopes_;
};

}  // namespace bnext
