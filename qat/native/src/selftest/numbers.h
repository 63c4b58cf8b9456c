// Numbers of each type of tensor, in memory of their own, so that a sanitizer sees what is read beyond them.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "selftest/selftest.h"
#include "training/shared.h"

namespace bnext {

using Bytes = std::vector<unsigned char>;

inline size_t size_of(int type) { return type == kFloat ? 4 : type == kDouble ? 8 : 2; }

// Coefficients and sums beside tensors of a type.
inline int sum_type(int type) { return type == kDouble ? kDouble : kFloat; }

// Number i of a type, bfloat16 without its last bits.
inline void put_number(Bytes& bytes, int64_t i, int type, double number) {
  const float single = static_cast<float>(number);
  unsigned char* to = bytes.data() + static_cast<size_t>(i) * size_of(type);
  if (type == kDouble) {
    std::memcpy(to, &number, 8);
  } else if (type == kFloat) {
    std::memcpy(to, &single, 4);
  } else {
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    const uint16_t half = static_cast<uint16_t>(bits >> 16);
    std::memcpy(to, &half, 2);
  }
}

// Random numbers of a type, zeros and repetitions among them.
inline Bytes random_numbers(int64_t count, int type) {
  Bytes bytes(static_cast<size_t>(count) * size_of(type));
  for (int64_t i = 0; i < count; ++i) {
    put_number(bytes, i, type,
               chance(0.1) ? static_cast<double>(between(-2, 2)) : std::normal_distribution<double>()(generator));
  }
  return bytes;
}

// Ends the self-test.
[[noreturn]] inline void fail(const char* what, int64_t at) {
  std::printf("%s: %s[%ld] differs from portable\n", place.c_str(), what, static_cast<long>(at));
  std::exit(1);
}

}  // namespace bnext
