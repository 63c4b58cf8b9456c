// Compares the passes of a training step and what surrounds its convolutions of signs: elementwise results
// exactly, sums to rounding, since each instruction set adds them up in an order of its own.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "training/passes.h"
#include "selftest/selftest.h"
#include "training/signs.h"

namespace bnext {
namespace {

using Bytes = std::vector<unsigned char>;  // of their own, so that a sanitizer sees what is read beyond them

size_t size_of(int type) { return type == kFloat ? 4 : type == kDouble ? 8 : 2; }

// Number i of a type, bfloat16 without its last bits.
void put_number(Bytes& bytes, int64_t i, int type, double number) {
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
Bytes values(int64_t count, int type, bool is_coefficient) {
  if (is_coefficient && type == kBfloat16) type = kFloat;
  Bytes bytes(static_cast<size_t>(count) * size_of(type));
  for (int64_t i = 0; i < count; ++i) {
    put_number(bytes, i, type,
               chance(0.1) ? static_cast<double>(between(-2, 2)) : std::normal_distribution<double>()(generator));
  }
  return bytes;
}

double coefficient(const Bytes& bytes, int64_t i, int type) {
  if (type == kDouble) {
    double value;
    std::memcpy(&value, bytes.data() + 8 * i, 8);
    return value;
  }
  float value;
  std::memcpy(&value, bytes.data() + 4 * i, 4);
  return value;
}

void fail(const char* what, int64_t at) {
  std::printf("%s: %s[%ld] differs from portable\n", place.c_str(), what, static_cast<long>(at));
  std::exit(1);
}

}  // namespace

void compare_passes(const char* kernels) {
  const NamedPass *tried = passes_of(kernels), *portable = passes_of("portable");
  int count = 0;
  while (portable[count].name != nullptr) ++count;
  const int number = static_cast<int>(between(0, count - 1)), type = static_cast<int>(between(0, kTypes - 1));
  const int64_t images = between(1, 3), channels = between(1, 5), planes = images * channels;
  const int64_t sides[] = {1, 2, 4, 9, 16, 49, 64, 100};
  const int64_t pixels = chance(0.5) ? sides[between(0, 7)] : between(1, 70);
  const int64_t left = between(1, pixels);  // of the last plane of flat memory
  place = std::string(kernels) + " " + tried[number].name + " type " + std::to_string(type) + ", " +
          std::to_string(planes) + " planes of " + std::to_string(pixels);

  const bool is_flat = std::strncmp(tried[number].name, "fake_quantize", 13) == 0;
  const int64_t size = planes * pixels - (is_flat ? pixels - left : 0);
  const Bytes x = values(size, type, false), other = values(size, type, false), grad = values(size, type, false);
  const Bytes of_channels[] = {values(channels, type, true), values(channels, type, true), values(channels, type, true),
                               values(channels, type, true), values(channels, type, true)};
  const Bytes factor = values(planes, type, true), of_planes = values(planes, type, true);
  const bool has_shift = chance(0.5), positive_zero = chance(0.5);
  const bool reads_inside = std::strcmp(tried[number].name, "fake_quantize_gradient") == 0;
  const bool shifts_planes = std::strcmp(tried[number].name, "scale") == 0;
  std::vector<uint8_t> inside[2];
  Bytes out[2], other_out[2], sums[2][3];
  int32_t outside[2];
  for (int i = 0; i < 2; ++i) {
    inside[i].resize(static_cast<size_t>(size));
    for (int64_t k = 0; reads_inside && k < size; ++k) inside[i][static_cast<size_t>(k)] = k % 3 != 0;
    out[i].resize(static_cast<size_t>(size) * size_of(type));
    other_out[i].resize(out[i].size());
    for (Bytes& one : sums[i]) one.resize(static_cast<size_t>(planes) * (type == kDouble ? 8 : 4));
    Pass pass{};
    pass.planes = planes, pass.channels = channels, pass.pixels = pass.last = pixels;
    if (is_flat) pass.last = left;
    pass.x = x.data(), pass.other = other.data(), pass.grad = grad.data(), pass.out = out[i].data();
    pass.other_out = other_out[i].data();
    pass.inside = inside[i].data();
    pass.gain = of_channels[0].data(), pass.offset = of_channels[1].data(), pass.slope = of_channels[2].data();
    pass.center = of_channels[3].data(), pass.tilt = of_channels[4].data();
    pass.factor = factor.data();
    pass.shift = shifts_planes ? (has_shift ? of_planes.data() : nullptr) : of_channels[0].data();
    pass.sums = sums[i][0].data(), pass.products = sums[i][1].data(), pass.slopes = sums[i][2].data();
    pass.grid = {-3, 2, 0.3, 1 / 0.3}, pass.inner = {-5, 5, 0.2, 5}, pass.clip = 1.5;
    pass.positive_zero = positive_zero;
    (i == 0 ? tried : portable)[number].run[type](pass, 0, planes);
    outside[i] = pass.outside;
  }
  const auto width = static_cast<int64_t>(size_of(type));
  for (int64_t k = 0; k < size * width; ++k) {
    if (out[0][static_cast<size_t>(k)] != out[1][static_cast<size_t>(k)]) fail("out", k / width);
  }
  if (other_out[0] != other_out[1]) fail("other_out", 0);
  if (inside[0] != inside[1]) fail("inside", 0);
  if (outside[0] != outside[1]) fail("outside", 0);
  for (int which = 0; which < 3; ++which) {
    for (int64_t k = 0; k < planes; ++k) {
      const double found = coefficient(sums[0][which], k, type), right = coefficient(sums[1][which], k, type);
      const double rounding = type == kDouble ? 1e-13 : 1e-5;
      if (!(std::fabs(found - right) <= rounding * (static_cast<double>(pixels) + std::fabs(right)))) fail("sums", k);
    }
  }
}

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
  const SignSums sums{images, inputs, height,        width,      channels,   kernel,
                      stride, x.data(), weight.data(), out.data(), x_type, weight_type};
  if (!sign_sums(sums, nullptr, 1)) fail("answer", 0);
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
