// Vectors of AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace bnext {
namespace {

struct V {
  using F = __m256;
  using I = __m256i;
  static constexpr int lanes = 8, most_groups = 2;
  static constexpr int pixels_of_4 = 1, pixels_of_2 = 4, pixels_of_1 = 6;

  static F set(float value) { return _mm256_set1_ps(value); }
  static F load(const float* from) { return _mm256_loadu_ps(from); }
  static F load_i8(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  static void store_i8(int8_t* to, F value) {
    const I wide = _mm256_cvtps_epi32(value);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(half, half));
  }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F exact_multiply_add(F a, F b, F sum) { return add(mul(a, b), sum); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F where_negative(F q, F negative, F otherwise) { return _mm256_blendv_ps(otherwise, negative, q); }

  static I zero() { return _mm256_setzero_si256(); }
  static I load_i32(const int32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const I*>(from)); }
  static void store_i32(int32_t* to, I value) { _mm256_storeu_si256(reinterpret_cast<I*>(to), value); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I to_int(F a) { return _mm256_cvtps_epi32(a); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static I minus_128_times(I a, I b) { return _mm256_sub_epi32(a, _mm256_slli_epi32(b, 7)); }
  static int to_integer(float value) { return _mm_cvtss_si32(_mm_set_ss(value)); }
  // x[0] w[2 i] + x[1] w[2 i + 1] in lane i.
  static I pair_products(const int8_t* w, const int16_t* x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, 4);
    const I weights = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
    return _mm256_madd_epi16(weights, _mm256_set1_epi32(pair));
  }

  static I load_words(const uint32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const I*>(from)); }
  static I broadcast(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }

  // Counts of nibbles looked up, in bytes.
  using Count = I;
  static constexpr int most_steps = 31;  // of at most 8 in a byte
  static Count count(Count counts, I x, I w) {
    const I nibbles = _mm256_set1_epi8(15);
    const I table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const I bits = _mm256_xor_si256(x, w);
    const I lower = _mm256_shuffle_epi8(table, _mm256_and_si256(bits, nibbles));
    const I upper = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi32(bits, 4), nibbles));
    return _mm256_add_epi8(counts, _mm256_add_epi8(lower, upper));
  }
  static I counted(Count counts) {
    const I pairs = _mm256_maddubs_epi16(counts, _mm256_set1_epi8(1));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }

  using Bytes = I;
  static Bytes load_bytes(const int8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const I*>(from)); }
  static uint32_t at_least(Bytes x, Bytes threshold) {
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpgt_epi8(threshold, x)));
  }
  struct ByteSums {
    I parts[4];
  };
  static ByteSums no_sums() { return {{zero(), zero(), zero(), zero()}}; }
  static void add_bytes(ByteSums& sums, Bytes x) {
    const __m128i low = _mm256_castsi256_si128(x), high = _mm256_extracti128_si256(x, 1);
    sums.parts[0] = add(sums.parts[0], _mm256_cvtepi8_epi32(low));
    sums.parts[1] = add(sums.parts[1], _mm256_cvtepi8_epi32(_mm_srli_si128(low, 8)));
    sums.parts[2] = add(sums.parts[2], _mm256_cvtepi8_epi32(high));
    sums.parts[3] = add(sums.parts[3], _mm256_cvtepi8_epi32(_mm_srli_si128(high, 8)));
  }
  static void store_sums(int32_t* to, const ByteSums& sums) {
    for (int i = 0; i < 4; ++i) store_i32(to + 8 * i, sums.parts[i]);
  }
};

}  // namespace
}  // namespace bnext
