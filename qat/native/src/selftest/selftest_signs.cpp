// Compares the convolutions of signs of a training step, and what surrounds them.

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "selftest/numbers.h"
#include "selftest/selftest.h"
#include "training/signs.h"

namespace bnext {

void compare_signs(const char* kernels) {
  const int type = static_cast<int>(between(0, kTypes - 1));
  const SignWork &tried = sign_work_of(kernels)[type], &portable = sign_work_of("portable")[type];
  const int64_t channels = between(1, 100), height = between(1, 12), width = between(1, 12), pad = between(0, 1);
  const int64_t taps = chance(0.5) ? 1 : 9, words = (channels + 31) / 32, step = between(1, 20);
  place = std::string(kernels) + " signs of type " + std::to_string(type) + ", " + std::to_string(channels) +
          " channels of " + std::to_string(height) + "×" + std::to_string(width);
  const auto signs = [type](int64_t count) {
    const double wrong[] = {0.0, -0.0, 0.5, 2.0, HUGE_VAL, std::nan("")};
    const bool all_right = chance(0.7);
    Bytes bytes(static_cast<size_t>(count) * size_of(type));
    for (int64_t i = 0; i < count; ++i) {
      const bool is_wrong = !all_right && chance(0.01);
      put_number(bytes, i, type, is_wrong ? wrong[between(0, 5)] : chance(0.5) ? 1.0 : -1.0);
    }
    return bytes;
  };
  const Bytes x = signs(channels * height * width), weight = signs(channels * taps);
  const int64_t count = between(1, 70), wide = between(1, 64), planes = between(1, wide);
  const int64_t pixels = count + between(0, 9);
  std::vector<int32_t> sums(static_cast<size_t>(count * wide));
  for (int32_t& sum : sums) sum = static_cast<int32_t>(64 * between(-9216, 9216));
  bool answers[2][3];
  std::vector<uint32_t> bits[2], words_of[2];
  Bytes out[2];
  for (int i = 0; i < 2; ++i) {
    const SignWork& used = i == 0 ? tried : portable;
    bits[i].resize(static_cast<size_t>((height + 2 * pad) * (width + 2 * pad) * words));
    words_of[i].resize(static_cast<size_t>(taps * words * step));
    out[i].resize(static_cast<size_t>(planes * pixels) * size_of(type));
    const int64_t half = height / 2;
    answers[i][0] = used.pack(x.data(), channels, height, width, words, pad, 0, half, bits[i].data());
    answers[i][1] = used.pack(x.data(), channels, height, width, words, pad, half, height, bits[i].data());
    answers[i][2] = used.weigh(weight.data(), channels, taps, words, step, words_of[i].data());
    used.write(sums.data(), count, wide, planes, pixels, out[i].data());
  }
  for (int k = 0; k < 3; ++k) {
    if (answers[0][k] != answers[1][k]) fail("answer", k);
  }
  if (bits[0] != bits[1]) fail("bits", 0);
  if (words_of[0] != words_of[1]) fail("words", 0);
  if (out[0] != out[1]) fail("out", 0);
}

// A whole convolution against its definition; by the kernels that training would take.
void check_sign_sums() {
  const int x_type = static_cast<int>(between(0, kTypes - 1)), weight_type = static_cast<int>(between(0, kTypes - 1));
  const int64_t images = between(1, 5), inputs = chance(0.1) ? between(200, 600) : between(1, 70);
  const int64_t height = between(1, 11), width = between(1, 11), channels = between(1, 70);
  const int64_t kernel = chance(0.5) ? 1 : 3, stride = between(1, 3), pad = kernel / 2;
  const int64_t out_height = (height + stride - 1) / stride, out_width = (width + stride - 1) / stride;
  place = "sums of signs, " + std::to_string(images) + " images of " + std::to_string(height) + "×" +
          std::to_string(width) + "×" + std::to_string(inputs) + " to " + std::to_string(channels) + ", kernel " +
          std::to_string(kernel) + " stride " + std::to_string(stride);
  const auto signs = [](int64_t count, int type, std::vector<int>& as_integers) {
    Bytes bytes(static_cast<size_t>(count) * size_of(type));
    for (int64_t i = 0; i < count; ++i) {
      as_integers.push_back(chance(0.5) ? 1 : -1);
      put_number(bytes, i, type, as_integers.back());
    }
    return bytes;
  };
  std::vector<int> x_signs, weight_signs;
  const Bytes x = signs(images * inputs * height * width, x_type, x_signs);
  const Bytes weight = signs(channels * inputs * kernel * kernel, weight_type, weight_signs);
  const int64_t count = images * channels * out_height * out_width;
  Bytes out(static_cast<size_t>(count) * size_of(x_type)), expected(out.size());
  SignSums sums{};
  sums.images = images, sums.inputs = inputs, sums.height = height, sums.width = width;
  sums.channels = channels, sums.kernel = kernel, sums.stride = stride;
  sums.x.data = x.data(), sums.weight.data = weight.data(), sums.out.data = out.data();
  sums.x_type = static_cast<Type>(x_type), sums.weight_type = static_cast<Type>(weight_type);
  if (sign_sums(sums, nullptr, 1) != kSummed) fail("answer", 0);
  int64_t at = 0;
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      for (int64_t row = 0; row < out_height * stride; row += stride) {
        for (int64_t column = 0; column < out_width * stride; column += stride) {
          int total = 0;
          for (int64_t input = 0; input < inputs; ++input) {
            for (int64_t tap = 0; tap < kernel * kernel; ++tap) {
              const int64_t y = row + tap / kernel - pad, from = column + tap % kernel - pad;
              if (y < 0 || y >= height || from < 0 || from >= width) continue;
              const int64_t of_x = ((image * inputs + input) * height + y) * width + from;
              const int64_t of_weight = (channel * inputs + input) * kernel * kernel + tap;
              total += x_signs[static_cast<size_t>(of_x)] * weight_signs[static_cast<size_t>(of_weight)];
            }
          }
          put_number(expected, at++, x_type, total);
        }
      }
    }
  }
  // Bfloat16 holds these whole numbers up to 256, which larger ones are left out of.
  if (x_type == kBfloat16 && inputs * kernel * kernel > 256) return;
  if (out != expected) fail("out", 0);
}

}  // namespace bnext
