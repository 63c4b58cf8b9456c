// Binary convolutions of a training step: what has to be compiled for an instruction set, in passes_*.cpp too.

#include "training/numbers_impl.h"
#include "training/signs.h"

namespace bnext {
namespace {

// Pixels whose words are gathered at once.
constexpr int64_t kRun = 64;

// The number 1 in memory, but for its sign.
template <typename T>
struct One;
template <>
struct One<float> {
  using Bits = uint32_t;
  static constexpr Bits value = 0x3f800000;
};
template <>
struct One<double> {
  using Bits = uint64_t;
  static constexpr Bits value = 0x3ff0000000000000;
};
template <>
struct One<Bfloat16> {
  using Bits = uint16_t;
  static constexpr Bits value = 0x3f80;
};

template <typename T>
struct Signs {
  using S = typename Numbers<T>::Sum;
  using Bits = typename One<T>::Bits;
  static constexpr int kSign = 8 * sizeof(Bits) - 1;

  static Bits bits_of(T value) {
    Bits bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
  }
  static uint32_t positive(Bits bits) { return 1 ^ static_cast<uint32_t>(bits >> kSign); }
  // Not 0 where the value is neither +1 nor -1.
  static Bits difference(Bits bits) {
    return static_cast<Bits>((bits & static_cast<Bits>(~(Bits{1} << kSign))) ^ One<T>::value);
  }

  static bool pack(const void* from, int64_t channels, int64_t height, int64_t width, int64_t words, int64_t pad,
                   int64_t first_row, int64_t last_row, uint32_t* bits) {
    const T* const x = static_cast<const T*>(from);
    const int64_t first = first_row * width, last = last_row * width;
    Bits wrong = 0;
    for (int64_t start = first; start < last; start += kRun) {
      const int64_t count = last - start < kRun ? last - start : kRun;
      for (int64_t word = 0; word < words; ++word) {
        const int64_t used = channels - 32 * word < 32 ? channels - 32 * word : 32;
        uint32_t found[kRun] = {};
        for (int64_t channel = 0; channel < used; ++channel) {
          const T* const plane = x + (32 * word + channel) * height * width + start;
#pragma omp simd reduction(| : wrong)
          for (int64_t i = 0; i < count; ++i) {
            const Bits value = bits_of(plane[i]);
            found[i] |= positive(value) << channel;
            wrong |= difference(value);
          }
        }
        int64_t row = start / width, column = start % width;
        for (int64_t i = 0; i < count; ++i) {
          bits[((row + pad) * (width + 2 * pad) + column + pad) * words + word] = found[i];
          if (++column == width) {
            column = 0;
            ++row;
          }
        }
      }
    }
    return wrong == 0;
  }

  // Taps in a vector of eight, and one by itself.
  static bool weigh_9(const T* weight, int64_t inputs, int64_t words, int64_t step, uint32_t* bits) {
    Bits wrong[8] = {}, wrong_last = 0;
    for (int64_t word = 0; word < words; ++word) {
      const int64_t used = inputs - 32 * word < 32 ? inputs - 32 * word : 32;
      uint32_t found[8] = {}, last = 0;
      for (int64_t input = 0; input < used; ++input, weight += 9) {
#pragma omp simd
        for (int tap = 0; tap < 8; ++tap) {
          const Bits value = bits_of(weight[tap]);
          found[tap] |= positive(value) << input;
          wrong[tap] |= difference(value);
        }
        last |= positive(bits_of(weight[8])) << input;
        wrong_last |= difference(bits_of(weight[8]));
      }
      for (int tap = 0; tap < 8; ++tap) bits[(tap * words + word) * step] = found[tap];
      bits[(8 * words + word) * step] = last;
    }
    for (const Bits one : wrong) wrong_last |= one;
    return wrong_last == 0;
  }

  static bool weigh_1(const T* weight, int64_t inputs, int64_t words, int64_t step, uint32_t* bits) {
    Bits wrong = 0;
    for (int64_t word = 0; word < words; ++word, weight += 32) {
      const int64_t used = inputs - 32 * word < 32 ? inputs - 32 * word : 32;
      uint32_t found = 0;
#pragma omp simd reduction(| : found, wrong)
      for (int64_t input = 0; input < used; ++input) {
        const Bits value = bits_of(weight[input]);
        found |= positive(value) << input;
        wrong |= difference(value);
      }
      bits[word * step] = found;
    }
    return wrong == 0;
  }

  static bool weigh(const void* weight, int64_t inputs, int64_t taps, int64_t words, int64_t step, uint32_t* bits) {
    const T* const from = static_cast<const T*>(weight);
    return taps == 1 ? weigh_1(from, inputs, words, step, bits) : weigh_9(from, inputs, words, step, bits);
  }

  static void write(const int32_t* sums, int64_t count, int64_t step, int64_t channels, int64_t pixels, void* out) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      T* const to = static_cast<T*>(out) + channel * pixels;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        to[i] = Numbers<T>::store(static_cast<S>(sums[i * step + channel]) * static_cast<S>(1.0 / 64));
      }
    }
  }
};

#define BNEXT_SIGNS(T) {Signs<T>::pack, Signs<T>::weigh, Signs<T>::write}
constexpr SignWork kSigns[] = {BNEXT_SIGNS(float), BNEXT_SIGNS(double), BNEXT_SIGNS(Bfloat16)};
#undef BNEXT_SIGNS
static_assert(sizeof kSigns == kTypes * sizeof(SignWork), "one of each type");

}  // namespace
}  // namespace bnext
