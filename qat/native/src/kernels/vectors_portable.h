// "Vectors" of one number, for any processor.
#pragma once

#include <cstdint>

namespace bnext {
namespace {

struct V {
  using F = float;
  using I = int32_t;
  static constexpr int lanes = 1, most_groups = 4;
  static constexpr int pixels_of_4 = 2, pixels_of_2 = 2, pixels_of_1 = 4;

  static F set(float value) { return value; }
  static F load(const float* from) { return *from; }
  static F load_i8(const int8_t* from) { return static_cast<float>(*from); }
  static void store_i8(int8_t* to, F value) { *to = static_cast<int8_t>(value); }
  static F mul(F a, F b) { return a * b; }
  static F add(F a, F b) { return a + b; }
  static F exact_multiply_add(F a, F b, F sum) { return a * b + sum; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F round(F a) { return __builtin_rintf(a); }
  static F where_negative(F q, F negative, F otherwise) { return q < 0 ? negative : otherwise; }

  // Sums wrap around, as vectors' do.
  static I zero() { return 0; }
  static I load_i32(const int32_t* from) { return *from; }
  static void store_i32(int32_t* to, I value) { *to = value; }
  static I add(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
  static I to_int(F a) { return static_cast<I>(__builtin_rintf(a)); }
  static F to_float(I a) { return static_cast<F>(a); }
  static I minus_128_times(I a, I b) {
    return static_cast<I>(static_cast<uint32_t>(a) - 128 * static_cast<uint32_t>(b));
  }
  static int to_integer(float value) { return static_cast<int>(__builtin_rintf(value)); }
  // x[0] w[2 i] + x[1] w[2 i + 1] in lane i.
  static I pair_products(const int8_t* w, const int16_t* x) { return w[0] * x[0] + w[1] * x[1]; }

  static I load_words(const uint32_t* from) { return static_cast<I>(*from); }
  static I broadcast(uint32_t word) { return static_cast<I>(word); }
  using Count = I;
  static constexpr int most_steps = 0;
  static Count count(Count counts, I x, I w) {
    uint32_t bits = static_cast<uint32_t>(x ^ w);
    bits -= (bits >> 1) & 0x55555555u;
    bits = (bits & 0x33333333u) + ((bits >> 2) & 0x33333333u);
    bits = (bits + (bits >> 4)) & 0x0f0f0f0fu;
    return counts + static_cast<I>((bits * 0x01010101u) >> 24);
  }
  static I counted(Count counts) { return counts; }

  struct Bytes {
    int8_t values[32];
  };
  static Bytes load_bytes(const int8_t* from) {
    Bytes bytes;
    for (int i = 0; i < 32; ++i) bytes.values[i] = from[i];
    return bytes;
  }
  static uint32_t at_least(const Bytes& x, const Bytes& threshold) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(x.values[i] >= threshold.values[i]) << i;
    return bits;
  }
  struct ByteSums {
    int32_t parts[32];
  };
  static ByteSums no_sums() { return {}; }
  static void add_bytes(ByteSums& sums, const Bytes& x) {
    for (int i = 0; i < 32; ++i) sums.parts[i] += x.values[i];
  }
  static void store_sums(int32_t* to, const ByteSums& sums) {
    for (int i = 0; i < 32; ++i) to[i] = sums.parts[i];
  }
};

}  // namespace
}  // namespace bnext
