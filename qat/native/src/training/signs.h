// A binary convolution of a training step: signs as floats in, sums as floats out. What has to be compiled for
// an instruction set; the products themselves are `Kernels::sums`.
#pragma once

#include <cstdint>

#include "kernels/share.h"
#include "training/shared.h"

namespace bnext {

struct SignWork {
  // Signs of rows of one image [channels][height][width], +1 and -1, to bits as `Pack` lays them; false where a
  // value is neither.
  bool (*pack)(const void* x, int64_t channels, int64_t height, int64_t width, int64_t words, int64_t pad,
               int64_t first_row, int64_t last_row, uint32_t* bits);
  // Signs of one output channel's weights [inputs][taps], taps 1 or 9, to words [taps][words], `step` apart; 0
  // before. The same answer.
  bool (*weigh)(const void* weight, int64_t inputs, int64_t taps, int64_t words, int64_t step, uint32_t* bits);
  // Sums in 1/64, [count][step], of which the first so many channels go to planes of `pixels`.
  void (*write)(const int32_t* sums, int64_t count, int64_t step, int64_t channels, int64_t pixels, void* out);
};

// By the type of the tensors. Those compiled for a set of kernels, by its name.
const SignWork* sign_work_of(const char* kernels);

// kSummed, or kNotSigns where a value is neither +1 nor -1: then what was written means nothing. Throws where there
// is no memory.
SignStatus sign_sums(const SignSums& s, Parallel parallel, unsigned threads);

}  // namespace bnext
