// bnext_qat.ChannelSums: sums of PReLU(x) over the pixels of each image.
#pragma once

#include "operators/operator.h"

namespace bnext {

class ChannelSums {
 public:
  static constexpr const char* kName = "ChannelSums";
  static constexpr Slot kInputs[] = {{ort::kInt8}, {ort::kInt8}};
  static constexpr Slot kOutputs[] = {{ort::kInt32}};

  explicit ChannelSums(const Info& info);
  void compute(const Run& run) const;

 private:
  const Kernels& kernels_;
  int64_t channels_ = 0;
  float low_, high_;
  std::vector<float> slopes_;
};

}  // namespace bnext
