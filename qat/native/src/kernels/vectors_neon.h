// Vectors of NEON on aarch64, little endian.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace bnext {
namespace {

struct V {
  using F = float32x4_t;
  using I = int32x4_t;
  static constexpr int lanes = 4, most_groups = 4;
  static constexpr int pixels_of_4 = 4, pixels_of_2 = 6, pixels_of_1 = 8;

  static F set(float value) { return vdupq_n_f32(value); }
  static F load(const float* from) { return vld1q_f32(from); }
  static F load_i8(const int8_t* from) {
    uint32_t four;
    __builtin_memcpy(&four, from, 4);
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
  }
  static void store_i8(int8_t* to, F value) {
    const int16x4_t half = vqmovn_s32(vcvtnq_s32_f32(value));
    const uint32_t four = vget_lane_u32(vreinterpret_u32_s8(vqmovn_s16(vcombine_s16(half, half))), 0);
    __builtin_memcpy(to, &four, 4);
  }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F exact_multiply_add(F a, F b, F sum) { return vfmaq_f32(sum, a, b); }
  // Of a number and no number, the number.
  static F min(F a, F b) { return vminnmq_f32(a, b); }
  static F max(F a, F b) { return vmaxnmq_f32(a, b); }
  static F round(F a) { return vrndnq_f32(a); }
  static F where_negative(F q, F negative, F otherwise) { return vbslq_f32(vcltzq_f32(q), negative, otherwise); }

  static I zero() { return vdupq_n_s32(0); }
  static I load_i32(const int32_t* from) { return vld1q_s32(from); }
  static void store_i32(int32_t* to, I value) { vst1q_s32(to, value); }
  static I add(I a, I b) { return vaddq_s32(a, b); }
  static I to_int(F a) { return vcvtnq_s32_f32(a); }
  static F to_float(I a) { return vcvtq_f32_s32(a); }
  static I minus_128_times(I a, I b) { return vsubq_s32(a, vshlq_n_s32(b, 7)); }
  static int to_integer(float value) { return vcvtns_s32_f32(value); }
  // x[0] w[2 i] + x[1] w[2 i + 1] in lane i.
  static I pair_products(const int8_t* w, const int16_t* x) {
    const int16x8_t weights = vmovl_s8(vld1_s8(w));
    const int16x4_t pair = vld1_dup_s16(x), second = vld1_dup_s16(x + 1);
    const int16x4_t both = vzip1_s16(pair, second);
    return vpaddq_s32(vmull_s16(vget_low_s16(weights), both), vmull_s16(vget_high_s16(weights), both));
  }

  static I load_words(const uint32_t* from) { return vreinterpretq_s32_u32(vld1q_u32(from)); }
  static I broadcast(uint32_t word) { return vreinterpretq_s32_u32(vdupq_n_u32(word)); }

  // Counts of bytes, in bytes.
  using Count = I;
  static constexpr int most_steps = 31;  // of at most 8 in a byte
  static Count count(Count counts, I x, I w) {
    const uint8x16_t bits = vcntq_u8(vreinterpretq_u8_s32(veorq_s32(x, w)));
    return vreinterpretq_s32_u8(vaddq_u8(vreinterpretq_u8_s32(counts), bits));
  }
  static I counted(Count counts) {
    return vreinterpretq_s32_u32(vpaddlq_u16(vpaddlq_u8(vreinterpretq_u8_s32(counts))));
  }

  using Bytes = int8x16x2_t;
  static Bytes load_bytes(const int8_t* from) { return {{vld1q_s8(from), vld1q_s8(from + 16)}}; }
  static uint32_t at_least(const Bytes& x, const Bytes& threshold) {
    const uint8_t places[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t place = vld1q_u8(places);
    const uint8x16_t a = vandq_u8(vcgeq_s8(x.val[0], threshold.val[0]), place);
    const uint8x16_t b = vandq_u8(vcgeq_s8(x.val[1], threshold.val[1]), place);
    // Three times the sums of neighbours: the first four bytes are the 32 bits.
    const uint8x16_t once = vpaddq_u8(a, b), twice = vpaddq_u8(once, once);
    return vgetq_lane_u32(vreinterpretq_u32_u8(vpaddq_u8(twice, twice)), 0);
  }
  struct ByteSums {
    I parts[8];
  };
  static ByteSums no_sums() { return {{zero(), zero(), zero(), zero(), zero(), zero(), zero(), zero()}}; }
  static void add_bytes(ByteSums& sums, const Bytes& x) {
    for (int half = 0; half < 2; ++half) {
      const int16x8_t low = vmovl_s8(vget_low_s8(x.val[half])), high = vmovl_high_s8(x.val[half]);
      I* parts = sums.parts + 4 * half;
      parts[0] = vaddw_s16(parts[0], vget_low_s16(low));
      parts[1] = vaddw_high_s16(parts[1], low);
      parts[2] = vaddw_s16(parts[2], vget_low_s16(high));
      parts[3] = vaddw_high_s16(parts[3], high);
    }
  }
  static void store_sums(int32_t* to, const ByteSums& sums) {
    for (int i = 0; i < 8; ++i) store_i32(to + 4 * i, sums.parts[i]);
  }
};

}  // namespace
}  // namespace bnext
