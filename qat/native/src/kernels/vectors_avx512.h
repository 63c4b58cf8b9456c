// Vectors of AVX-512 (F, BW, VL, DQ), and with BNEXT_VPOPCNTDQ of its population count.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace bnext {
namespace {

struct V {
  using F = __m512;
  using I = __m512i;
  static constexpr int lanes = 16, most_groups = 4;
  static constexpr int pixels_of_4 = 4, pixels_of_2 = 8, pixels_of_1 = 8;

  static F set(float value) { return _mm512_set1_ps(value); }
  static F load(const float* from) { return _mm512_loadu_ps(from); }
  static F load_i8(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static void store_i8(int8_t* to, F value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(value)));
  }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F exact_multiply_add(F a, F b, F sum) { return _mm512_fmadd_ps(a, b, sum); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F where_negative(F q, F negative, F otherwise) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(q)), otherwise, negative);
  }

  static I zero() { return _mm512_setzero_si512(); }
  static I load_i32(const int32_t* from) { return _mm512_loadu_si512(from); }
  static void store_i32(int32_t* to, I value) { _mm512_storeu_si512(to, value); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I to_int(F a) { return _mm512_cvtps_epi32(a); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I minus_128_times(I a, I b) { return _mm512_sub_epi32(a, _mm512_slli_epi32(b, 7)); }
  static int to_integer(float value) { return _mm_cvtss_si32(_mm_set_ss(value)); }
  // x[0] w[2 i] + x[1] w[2 i + 1] in lane i.
  static I pair_products(const int8_t* w, const int16_t* x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, 4);
    const I weights = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
    return _mm512_madd_epi16(weights, _mm512_set1_epi32(pair));
  }

  static I load_words(const uint32_t* from) { return _mm512_loadu_si512(from); }
  static I broadcast(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }

  using Count = I;
#ifdef BNEXT_VPOPCNTDQ
  static constexpr int most_steps = 0;  // counters are as wide as totals
  static Count count(Count counts, I x, I w) {
    return _mm512_add_epi32(counts, _mm512_popcnt_epi32(_mm512_xor_si512(x, w)));
  }
  static I counted(Count counts) { return counts; }
#else
  static constexpr int most_steps = 31;  // of at most 8 in a byte
  static Count count(Count counts, I x, I w) {
    const I nibbles = _mm512_set1_epi8(15);
    const I table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const I bits = _mm512_xor_si512(x, w);
    const I lower = _mm512_shuffle_epi8(table, _mm512_and_si512(bits, nibbles));
    const I upper = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi32(bits, 4), nibbles));
    return _mm512_add_epi8(counts, _mm512_add_epi8(lower, upper));
  }
  static I counted(Count counts) {
    const I pairs = _mm512_maddubs_epi16(counts, _mm512_set1_epi8(1));
    return _mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
  }
#endif

  using Bytes = __m256i;
  static Bytes load_bytes(const int8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static uint32_t at_least(Bytes x, Bytes threshold) { return _mm256_cmpge_epi8_mask(x, threshold); }
  struct ByteSums {
    I low, high;
  };
  static ByteSums no_sums() { return {zero(), zero()}; }
  static void add_bytes(ByteSums& sums, Bytes x) {
    sums.low = add(sums.low, _mm512_cvtepi8_epi32(_mm256_castsi256_si128(x)));
    sums.high = add(sums.high, _mm512_cvtepi8_epi32(_mm256_extracti128_si256(x, 1)));
  }
  static void store_sums(int32_t* to, const ByteSums& sums) {
    store_i32(to, sums.low);
    store_i32(to + 16, sums.high);
  }
};

}  // namespace
}  // namespace bnext
