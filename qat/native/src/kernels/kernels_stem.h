// The stem over the vectors `V`. A part of kernels_impl.h, which includes it.
#pragma once

namespace bnext {
namespace {

// Sums of 27 products below 2^15 are exact in float32, fused or not.
void stem(const StemRows& s, int64_t first_row, int64_t last_row) {
  constexpr int kPixels = 8;
  const F low = V::set(s.low), high = V::set(s.high);
  const int64_t padded_channels = padded(s.channels);
  const int64_t padded_width = s.width + 2;
  for (int64_t row = first_row; row < last_row; ++row) {
    for (int64_t ky = 0; ky < 3; ++ky) {
      const int64_t y = row * s.stride + ky - 1;
      const bool inside = y >= 0 && y < s.height;
      for (int64_t color = 0; color < 3; ++color) {
        float* to = s.rows + (ky * 3 + color) * padded_width;
        const uint8_t* from = s.image + (color * s.height + (inside ? y : 0)) * s.width;
        to[0] = to[padded_width - 1] = 0.0f;
        for (int64_t x = 0; x < s.width; ++x) to[x + 1] = inside ? static_cast<float>(from[x]) - s.zero_point : 0.0f;
      }
    }
    for (int64_t start = 0; start < s.out_width; start += kPixels) {
      const int64_t used = least(kPixels, s.out_width - start);
      int64_t at[kPixels];  // of each pixel's window; those beyond the last repeat it
      for (int64_t p = 0; p < kPixels; ++p) at[p] = (start + least(p, used - 1)) * s.stride;
      for (int64_t channel = 0; channel < s.channels; channel += V::lanes) {
        F sums[kPixels];
        for (int p = 0; p < kPixels; ++p) sums[p] = V::set(0.0f);
        const float* weights = s.weight + channel;
        for (int64_t line = 0; line < 9; ++line) {
          const float* values = s.rows + line * padded_width;
          for (int64_t kx = 0; kx < 3; ++kx, weights += padded_channels) {
            const F weight = V::load(weights);
#pragma GCC unroll 8
            for (int p = 0; p < kPixels; ++p) {
              sums[p] = V::exact_multiply_add(V::set(values[at[p] + kx]), weight, sums[p]);
            }
          }
        }
        const I bias = V::load_i32(s.bias + channel);
        const F multiplier = V::load(s.multiplier + channel);
        for (int64_t p = 0; p < used; ++p) {
          const F total = V::to_float(V::add(V::to_int(sums[p]), bias));
          const F q = V::round(clamp(V::mul(total, multiplier), low, high));
          store(s.out + (row * s.out_width + start + p) * s.channels + channel, q, s.channels - channel);
        }
      }
    }
  }
}

}  // namespace
}  // namespace bnext
