// Compares every set of kernels that this processor runs with the portable ones, over random shapes. Needs no
// onnxruntime, so that it can be compiled for another processor and run under an emulator:
//   selftest [rounds]
// prints one line for each set, ends with 1 at the first difference.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "selftest/selftest.h"

namespace bnext {
extern const Kernels kernels_portable;

std::mt19937 generator;
std::string place;

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
bool chance(double probability) { return std::bernoulli_distribution(probability)(generator); }

namespace {

int64_t some_channels() {
  const int64_t usual[] = {1, 3, 4, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 128, 200};
  return chance(0.5) ? usual[between(0, 16)] : between(1, 160);
}

template <typename T>
std::vector<T> integers(int64_t count, int64_t low, int64_t high) {
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = static_cast<T>(chance(0.1) ? (chance(0.5) ? low : high) : between(low, high));
  return values;
}

// Powers of two (which make ties), numbers around `scale`, and some far beyond it; zeros after `count`.
std::vector<float> factors(int64_t count, float scale) {
  std::vector<float> values(static_cast<size_t>(padded(count)), 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const float power = std::ldexp(1.0f, std::ilogb(scale) + static_cast<int>(between(-2, 2)));
    const float any = scale * std::exp(std::normal_distribution<float>()(generator));
    values[static_cast<size_t>(i)] = chance(0.4) ? power : chance(0.1) ? 1e30f : any;
  }
  return values;
}

std::vector<float> whole_floats(int64_t count, int64_t low, int64_t high, float step) {
  std::vector<float> values(static_cast<size_t>(padded(count)), 0.0f);
  for (int64_t i = 0; i < count; ++i) values[static_cast<size_t>(i)] = static_cast<float>(between(low, high)) * step;
  return values;
}

struct Grid {
  float low, high;
};
Grid some_grid() {
  const int bits = static_cast<int>(between(2, 8));
  return {-std::ldexp(1.0f, bits - 1), std::ldexp(1.0f, bits - 1) - 1};
}

template <typename T>
void equal(const std::vector<T>& result, const std::vector<T>& expected, const char* what) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (result[i] == expected[i]) continue;
    std::printf("%s: %s[%zu] is %ld, portable %ld\n", place.c_str(), what, i, static_cast<long>(result[i]),
                static_cast<long>(expected[i]));
    std::exit(1);
  }
}

void compare_pack(const Kernels& kernels) {
  const int64_t channels = some_channels(), height = between(1, 6), width = between(1, 9), pad = between(0, 1);
  const int64_t words = (channels + 31) / 32;
  const auto x = integers<int8_t>(height * width * channels, -128, 127);
  auto threshold = integers<int8_t>(channels, -128, 127);
  threshold.resize(static_cast<size_t>(padded(channels)), 0);
  auto live = integers<uint32_t>(words, 0, 0xffffffff);
  if (channels % 32 != 0) live.back() &= (1u << channels % 32) - 1;
  const bool to_even = chance(0.5), with_sums = chance(0.8);
  place += " pack " + std::to_string(height) + "×" + std::to_string(width) + "×" + std::to_string(channels);
  std::vector<uint32_t> bits[2];
  std::vector<int32_t> sums[2];
  for (int i = 0; i < 2; ++i) {
    bits[i].assign(static_cast<size_t>((height + 2 * pad) * (width + 2 * pad) * words), 0);
    sums[i].assign(static_cast<size_t>(height * padded(channels)), 0);
    const Pack pack{x.data(), height, width, channels, threshold.data(), live.data(), bits[i].data(), words, pad,
                    to_even, with_sums ? sums[i].data() : nullptr};
    const int64_t half = height / 2;
    (i == 0 ? kernels : kernels_portable).pack(pack, 0, half);
    (i == 0 ? kernels : kernels_portable).pack(pack, half, height);
    for (int64_t row = 0; row < height; ++row) {  // sums beyond the last channel mean nothing
      std::fill_n(sums[i].begin() + row * padded(channels) + channels, padded(channels) - channels, 0);
    }
  }
  equal(bits[0], bits[1], "bits");
  equal(sums[0], sums[1], "sums");
}

void compare_convolve(const Kernels& kernels) {
  const int64_t inputs = chance(0.05) ? between(900, 1200) : some_channels(), channels = some_channels();
  const int64_t kernel = chance(0.5) ? 1 : 3, stride = between(1, 2), pad = kernel / 2, taps = kernel * kernel;
  const int64_t height = between(1, 7), width = between(1, 9), words = (inputs + 31) / 32;
  const int64_t out_height = (height + stride - 1) / stride, out_width = (width + stride - 1) / stride;
  const int64_t padded_width = width + 2 * pad, pixels = out_height * out_width;
  const auto bits = integers<uint32_t>((height + 2 * pad) * padded_width * words, 0, 0xffffffff);
  const auto weight = integers<uint32_t>(channels * taps * words, 0, 0xffffffff);  // [channel][tap][word]
  auto totals = integers<int32_t>(16 * padded(channels), -100000, 100000);
  totals[0] = chance(0.1) ? INT32_MIN : totals[0];  // sums wrap around
  const auto multiplier = factors(channels, 0.003f), slopes = whole_floats(channels, -128, 127, 0.125f);
  const Grid grid = some_grid();
  const int64_t cut = between(0, pixels);
  // The images of a batch, which share their signs, lie behind each other for kernels that give sums.
  const int64_t images = between(1, 3), image_words = static_cast<int64_t>(bits.size()), all = images * pixels;
  std::vector<uint32_t> batch;
  for (int64_t image = 0; image < images; ++image) batch.insert(batch.end(), bits.begin(), bits.end());
  const int64_t first = between(0, all), last = between(first, all);
  std::vector<int8_t> y[2];
  std::vector<int32_t> sums[2], plain[2];
  place += " convolve " + std::to_string(kernel) + "×" + std::to_string(kernel) + " stride " +
           std::to_string(stride) + ", " + std::to_string(height) + "×" + std::to_string(width) + "×" +
           std::to_string(inputs) + " to " + std::to_string(channels);
  const std::string before = place;
  for (int groups = 1; groups <= kernels.most_groups; groups *= 2) {
    place = before + " in groups of " + std::to_string(groups);
    for (int i = 0; i < 2; ++i) {
      const Kernels& used = i == 0 ? kernels : kernels_portable;
      const int of = i == 0 ? groups : 1;
      const int64_t wide = of * used.lanes, tiles = (channels + wide - 1) / wide;
      std::vector<uint32_t> tiled(static_cast<size_t>(tiles * taps * words * wide), 0);
      for (int64_t channel = 0; channel < channels; ++channel) {
        for (int64_t step = 0; step < taps * words; ++step) {
          const int64_t to = (channel / wide * taps * words + step) * wide + channel % wide;
          tiled[static_cast<size_t>(to)] = weight[static_cast<size_t>(channel * taps * words + step)];
        }
      }
      y[i].assign(static_cast<size_t>(pixels * channels), 99);
      sums[i].assign(static_cast<size_t>(tiles * wide), 7);
      const Convolution convolution{bits.data(), tiled.data(), words, kernel, stride, padded_width, height, width,
                                    out_width, channels, 0, pixels, padded(channels), totals.data(),
                                    multiplier.data(), Prelu{slopes.data(), grid.low, grid.high}, y[i].data()};
      for (int64_t tile = 0; tile < tiles; ++tile) {
        used.convolve(convolution, of, tile, 0, cut, sums[i].data() + tile * wide);
        used.convolve(convolution, of, tile, cut, pixels, sums[i].data() + tile * wide);
      }
      sums[i].resize(static_cast<size_t>(channels));

      Convolution of_batch = convolution;
      of_batch.bits = batch.data(), of_batch.image_words = image_words;
      plain[i].assign(static_cast<size_t>((last - first) * channels), 7);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        std::vector<int32_t> to(static_cast<size_t>((last - first) * wide));
        used.sums(of_batch, of, tile, first, last, to.data());
        for (int64_t k = 0; k < last - first; ++k) {
          const int64_t here = std::min(wide, channels - tile * wide);
          std::copy_n(to.begin() + k * wide, here, plain[i].begin() + k * channels + tile * wide);
        }
      }
    }
    equal(y[0], y[1], "y");
    equal(sums[0], sums[1], "sums");
    equal(plain[0], plain[1], "sums of a batch");
  }
}

void compare_update(const Kernels& kernels) {
  const int64_t channels = some_channels(), height = between(1, 7), width = between(1, 9), stride = between(1, 2);
  const int64_t out_height = (height + stride - 1) / stride, out_width = (width + stride - 1) / stride;
  const bool branch = chance(0.7), scales = branch && chance(0.5), prelu = chance(0.5);
  const auto x = integers<int8_t>(height * width * channels, -128, 127);
  const auto y = integers<int8_t>(out_height * out_width * channels, -128, 127);
  // Infinite gains times 0 are no numbers: nobody exports them, and still all kernels agree.
  const float step = chance(0.05) ? 3e38f : std::ldexp(static_cast<float>(between(0, 1023)), -16);
  const auto gain = whole_floats(channels, -128, 127, step);
  const auto offset = whole_floats(channels, -128, 127, 1.0f), slopes = whole_floats(channels, -128, 127, 0.0625f);
  const Grid residual = some_grid(), product = some_grid(), between_ = some_grid(), output = some_grid();
  const auto second = std::ldexp(static_cast<float>(between(0, 1023)), -16);
  const auto of_branch = std::ldexp(static_cast<float>(between(0, 16383)), -14);
  const auto of_residual = std::ldexp(static_cast<float>(between(0, 16383)), -14);
  place += " update " + std::to_string(height) + "×" + std::to_string(width) + "×" + std::to_string(channels) +
           " stride " + std::to_string(stride) + (branch ? scales ? ", scales" : ", adds" : ", plain") +
           (prelu ? ", PReLU" : "");
  std::vector<int8_t> out[2];
  for (int i = 0; i < 2; ++i) {
    out[i].assign(static_cast<size_t>(out_height * out_width * channels), 99);
    const Update update{y.data(), x.data(), height, width, out_width, channels, stride,
                        Prelu{prelu ? slopes.data() : nullptr, residual.low, residual.high},
                        branch ? gain.data() : nullptr, offset.data(), scales, product.low, product.high, second,
                        between_.low, between_.high, of_branch, of_residual, output.low, output.high, out[i].data()};
    (i == 0 ? kernels : kernels_portable).update(update, 0, out_height / 2);
    (i == 0 ? kernels : kernels_portable).update(update, out_height / 2, out_height);
  }
  equal(out[0], out[1], "out");
}

void compare_stem(const Kernels& kernels) {
  const int64_t channels = some_channels(), height = between(1, 7), width = between(1, 9), stride = between(1, 2);
  const int64_t out_height = (height + stride - 1) / stride, out_width = (width + stride - 1) / stride;
  const auto image = integers<uint8_t>(3 * height * width, 0, 255);
  std::vector<float> weight;
  for (int tap = 0; tap < 27; ++tap) {
    const auto row = whole_floats(channels, -128, 127, 1.0f);
    weight.insert(weight.end(), row.begin(), row.end());
  }
  auto bias = integers<int32_t>(padded(channels), -100000, 100000);
  bias[0] = chance(0.2) ? INT32_MAX : bias[0];
  const auto multiplier = factors(channels, 0.001f);
  const Grid grid = some_grid();
  const auto zero_point = static_cast<float>(between(0, 255));
  place += " stem " + std::to_string(height) + "×" + std::to_string(width) + " to " + std::to_string(channels);
  std::vector<int8_t> out[2];
  std::vector<float> work(static_cast<size_t>(9 * (width + 2)));
  for (int i = 0; i < 2; ++i) {
    out[i].assign(static_cast<size_t>(out_height * out_width * channels), 99);
    const StemRows rows{image.data(), height, width, zero_point, weight.data(), bias.data(), multiplier.data(),
                        grid.low, grid.high, out_width, channels, stride, out[i].data(), work.data()};
    (i == 0 ? kernels : kernels_portable).stem(rows, 0, out_height / 2);
    (i == 0 ? kernels : kernels_portable).stem(rows, out_height / 2, out_height);
  }
  equal(out[0], out[1], "out");
}

void compare_sum(const Kernels& kernels) {
  const int64_t channels = some_channels(), pixels = between(0, 40);
  const auto x = integers<int8_t>(pixels * channels, -128, 127);
  const auto slopes = whole_floats(channels, -128, 127, 0.0625f);
  const Grid grid = some_grid();
  place += " sum " + std::to_string(pixels) + "×" + std::to_string(channels);
  std::vector<int32_t> sums[2];
  for (int i = 0; i < 2; ++i) {
    sums[i].assign(static_cast<size_t>(padded(channels)), 5);
    const Prelu prelu{slopes.data(), grid.low, grid.high};
    (i == 0 ? kernels : kernels_portable).sum(x.data(), pixels, channels, prelu, sums[i].data());
    sums[i].resize(static_cast<size_t>(channels));
  }
  equal(sums[0], sums[1], "sums");
}

// A layer of channel attention, its weights (outputs, inputs) laid out for `lanes`.
struct Layer {
  int64_t outputs, inputs;
  std::vector<int8_t> weight;
  std::vector<int32_t> bias;
  std::vector<float> multiplier;
  Grid grid;
  std::vector<int8_t> tiled;

  Layer(int64_t out, int64_t in, Grid of)
      : outputs(out),
        inputs(in),
        weight(integers<int8_t>(out * in, -128, 127)),
        bias(integers<int32_t>(padded(out), -100000, 100000)),
        multiplier(factors(out, 0.001f)),
        grid(of) {
    bias[0] = chance(0.2) ? INT32_MIN : bias[0];
  }

  Linear for_lanes(int64_t lanes) {
    const int64_t pairs = (inputs + 1) / 2;
    tiled.assign(static_cast<size_t>((outputs + lanes - 1) / lanes * pairs * lanes * 2), 0);
    for (int64_t output = 0; output < outputs; ++output) {
      for (int64_t input = 0; input < inputs; ++input) {
        const int64_t to = ((output / lanes * pairs + input / 2) * lanes + output % lanes) * 2 + input % 2;
        tiled[static_cast<size_t>(to)] = weight[static_cast<size_t>(output * inputs + input)];
      }
    }
    return {tiled.data(), outputs, pairs, bias.data(), multiplier.data(), grid.low, grid.high};
  }
};

void compare_attention(const Kernels& kernels) {
  const int64_t channels = some_channels(), hidden = between(1, 40);
  const auto x = integers<int32_t>(channels, -100000, 100000), y = integers<int32_t>(channels, -100000, 100000);
  auto x_multiplier = factors(channels, 0.001f);
  const auto y_multiplier = factors(channels, 0.001f), gain = factors(channels, 0.5f);
  // The difference of two infinities is no number.
  for (float& value : x_multiplier) value = value > 1e20f ? -3e38f : value;
  const Grid pooled = some_grid();
  Layer reduce(hidden, channels, {0, 255}), expand(channels, hidden, some_grid());
  const auto table = whole_floats(256, 0, 255, 1.0f);
  place += " attention " + std::to_string(channels) + " channels, " + std::to_string(hidden) + " hidden";
  std::vector<int8_t> out[2];
  for (int i = 0; i < 2; ++i) {
    const Kernels& used = i == 0 ? kernels : kernels_portable;
    const auto longest = static_cast<size_t>(padded(std::max(channels, hidden)));
    std::vector<int32_t> sums(longest);
    std::vector<int16_t> vectors(2 * longest);
    out[i].assign(static_cast<size_t>(channels), 99);
    used.attention({x.data(), y.data(), channels, x_multiplier.data(), y_multiplier.data(), pooled.low, pooled.high,
                    reduce.for_lanes(used.lanes), expand.for_lanes(used.lanes), table.data(), gain.data(),
                    out[i].data(), sums.data(), vectors.data()});
  }
  equal(out[0], out[1], "out");
}

}  // namespace
}  // namespace bnext

int main(int count, char** arguments) {
  using namespace bnext;
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 1000;
  for (const Choice* choice = choices(); choice->kernels != nullptr; ++choice) {
    if (!choice->supported()) continue;
    generator.seed(1);
    for (int round = 0; round < rounds; ++round) {
      for (const auto compare : {compare_pack, compare_convolve, compare_update, compare_stem, compare_sum,
                                 compare_attention}) {
        place = choice->kernels->name;
        compare(*choice->kernels);
      }
      compare_passes(choice->kernels->name);
      compare_signs(choice->kernels->name);
    }
    std::printf("%s: equal in %d rounds\n", choice->kernels->name, rounds);
  }
  for (int round = 0; round < rounds; ++round) check_sign_sums();
  return 0;
}
