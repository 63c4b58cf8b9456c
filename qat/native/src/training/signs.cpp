// What Python calls for a binary convolution of a training step.

#include "training/signs.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/binary_layout.h"
#include "kernels/export.h"
#include "kernels/share.h"

namespace bnext {

extern const SignWork* const signs_portable;
#if defined(__x86_64__)
extern const SignWork *const signs_avx512, *const signs_avx2;
#endif

const SignWork* sign_work_of(const char* kernels) {
#if defined(__x86_64__)
  if (std::strncmp(kernels, "avx512", 6) == 0) return signs_avx512;
  if (std::strcmp(kernels, "avx2") == 0) return signs_avx2;
#else
  (void)kernels;
#endif
  return signs_portable;
}

namespace {

constexpr int64_t kSizes[kTypes] = {4, 8, 2};
// Inputs that one task packs, and binary products of another.
constexpr int64_t kTaskInputs = 1 << 15, kTaskProducts = 4 << 20;
// Output pixels that are summed before they are written.
constexpr int64_t kPixels = 64;
// What it costs to write a sum, in words of 32 products.
constexpr int64_t kWordsOfWriting = 8;

}  // namespace

SignStatus sign_sums(const SignSums& s, Parallel parallel, unsigned threads) {
  const Kernels& used = training_kernels();
  const SignWork *work = sign_work_of(used.name), &of_x = work[s.x_type], &of_weight = work[s.weight_type];
  const int64_t taps = s.kernel * s.kernel, pad = s.kernel / 2;
  std::atomic<bool> are_signs{true};

  // The signs first: if they hold a 0, as those of a network in float may, the weights are never looked at.
  const int64_t words = (s.inputs + 31) / 32;
  const int64_t padded_width = s.width + 2 * pad, image_words = (s.height + 2 * pad) * padded_width * words;
  const std::unique_ptr<uint32_t[]> bits(new uint32_t[static_cast<size_t>(s.images * image_words)]);
  const int64_t image_bytes = s.inputs * s.height * s.width * kSizes[s.x_type];
  const int64_t strips = parts_of(s.inputs * s.height * s.width, kTaskInputs, s.height);
  share(parallel, threads, s.images * strips, [&](int64_t task) {
    if (!are_signs) return;
    const int64_t image = task / strips, strip = task % strips;
    const int64_t first = cut(s.height, strips, strip), last = cut(s.height, strips, strip + 1);
    uint32_t* const to = bits.get() + image * image_words;
    if (pad != 0) clear_edges(to, s.height, s.width, words, first, last);
    const char* from = static_cast<const char*>(s.x.data) + image * image_bytes;
    if (!of_x.pack(from, s.inputs, s.height, s.width, words, pad, first, last, to)) are_signs = false;
  });
  if (!are_signs) return kNotSigns;

  BinaryWeights weights(used, s.inputs, s.channels, s.kernel);
  const int64_t channel_bytes = s.inputs * taps * kSizes[s.weight_type];
  const int64_t parts = parts_of(s.channels * s.inputs * taps, kTaskInputs, s.channels);
  share(parallel, threads, parts, [&](int64_t part) {
    if (!are_signs) return;
    bool fine = true;
    for (int64_t channel = cut(s.channels, parts, part); channel < cut(s.channels, parts, part + 1); ++channel) {
      const char* from = static_cast<const char*>(s.weight.data) + channel * channel_bytes;
      fine &= of_weight.weigh(from, s.inputs, taps, weights.words, weights.wide, weights.at(channel, 0));
      weights.sum_constants(channel, 0);
    }
    if (!fine) are_signs = false;
  });
  if (!are_signs) return kNotSigns;

  const int64_t out_width = (s.width + s.stride - 1) / s.stride;
  const int64_t pixels = (s.height + s.stride - 1) / s.stride * out_width, all = s.images * pixels;
  const Convolution convolution{bits.get(), weights.bits.data(), weights.words, s.kernel, s.stride, padded_width,
                                s.height, s.width, out_width, s.channels, image_words, pixels,
                                weights.padded_channels, weights.totals.data(), nullptr, Prelu{}, nullptr};
  const int64_t runs = (all + kPixels - 1) / kPixels;
  const int64_t products = (taps * weights.words + kWordsOfWriting) * 32 * weights.wide;
  const int64_t chunks = parts_of(all * products, kTaskProducts, runs);
  share(parallel, threads, chunks * weights.tiles, [&](int64_t task) {
    const int64_t tile = task / chunks, chunk = task % chunks, channel = tile * weights.wide;
    const int64_t channels = s.channels - channel < weights.wide ? s.channels - channel : weights.wide;
    int32_t sums[kPixels * kPadding];
    const int64_t first = cut(runs, chunks, chunk) * kPixels, end = cut(runs, chunks, chunk + 1) * kPixels;
    const int64_t last = end < all ? end : all;
    for (int64_t start = first; start < last; start += kPixels) {
      const int64_t count = last - start < kPixels ? last - start : kPixels;
      used.sums(convolution, weights.groups, tile, start, start + count, sums);
      for (int64_t done = 0; done < count;) {
        const int64_t image = (start + done) / pixels, pixel = (start + done) % pixels;
        const int64_t here = count - done < pixels - pixel ? count - done : pixels - pixel;
        const int64_t at = (image * s.channels + channel) * pixels + pixel;
        char* to = static_cast<char*>(s.out.data) + at * kSizes[s.x_type];
        of_x.write(sums + done * weights.wide, here, weights.wide, channels, pixels, to);
        done += here;
      }
    }
  });
  return kSummed;
}

}  // namespace bnext

// Returns a bnext::SignStatus; `parallel` may be nullptr, for one thread.
BNEXT_EXPORT int32_t bnext_qat_sign_sums(const bnext::SignSums* sums, bnext::Parallel parallel, unsigned threads) {
  try {
    return bnext::sign_sums(*sums, parallel, threads);
  } catch (...) {
    return bnext::kNoMemory;
  }
}
