// The kernels, written once over the vectors `V` of an instruction set. Each kernels_*.cpp defines V, includes
// this file and is compiled for that set alone. Everything stands in an unnamed namespace and nothing of the
// C++ library is used: an inline function shared with other files could end up compiled for a processor that
// the others don't need.
//
// Rounding follows export/reference.py: one float32 multiplication, clamp, round half to even. Clamping to
// integers first gives what rounding first gives, and keeps every value within int32.

#include "kernels.h"

namespace bnext {
namespace {

using F = V::F;
using I = V::I;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline F clamp(F value, F low, F high) { return V::min(V::max(value, low), high); }

// The first `count` int8 of `from` as floats, zeros after them.
inline F load(const int8_t* from, int64_t count) {
  if (count >= V::lanes) return V::load_i8(from);
  int8_t part[V::lanes] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = from[i];
  return V::load_i8(part);
}

inline void store(int8_t* to, F value, int64_t count) {
  if (count >= V::lanes) return V::store_i8(to, value);
  int8_t part[V::lanes];
  V::store_i8(part, value);
  for (int64_t i = 0; i < count; ++i) to[i] = part[i];
}

struct PreluVector {
  F slopes, low, high;
  bool active;
  PreluVector(const Prelu& prelu, int64_t channel)
      : slopes(V::set(0.0f)), low(V::set(prelu.low)), high(V::set(prelu.high)), active(prelu.slopes != nullptr) {
    if (active) slopes = V::load(prelu.slopes + channel);
  }
  F operator()(F q) const {
    if (!active) return q;
    return V::where_negative(q, V::round(clamp(V::mul(q, slopes), low, high)), q);
  }
};

void pack(const Pack& p, int64_t first_row, int64_t last_row) {
  const int64_t padded_width = p.width + 2 * p.pad;
  const int64_t padded_channels = (p.channels + kPadding - 1) / kPadding * kPadding;
  for (int64_t row = first_row; row < last_row; ++row) {
    uint32_t* bits = p.bits + ((row + p.pad) * padded_width + p.pad) * p.words;
    for (int64_t word = 0; word < p.words; ++word) {
      const V::Bytes threshold = V::load_bytes(p.threshold + 32 * word);
      const uint32_t live = p.live[word];
      const int64_t count = least(32, p.channels - 32 * word);
      const int8_t* x = p.x + row * p.width * p.channels + 32 * word;
      V::ByteSums sums = V::no_sums();
      for (int64_t column = 0; column < p.width; ++column, x += p.channels) {
        V::Bytes values;
        if (count == 32) {
          values = V::load_bytes(x);
        } else {
          int8_t part[32] = {};
          for (int64_t i = 0; i < count; ++i) part[i] = x[i];
          values = V::load_bytes(part);
        }
        bits[column * p.words + word] = V::at_least(values, threshold) & live;
        if (p.sums != nullptr) {
          V::add_bytes(sums, values);
          if (p.to_even && p.width % 2 != 0 && column == p.width - 1) V::add_bytes(sums, values);
        }
      }
      if (p.sums != nullptr) {
        int32_t* to = p.sums + row * padded_channels + 32 * word;
        V::store_sums(to, sums);
        if (p.to_even && p.height % 2 != 0 && row == p.height - 1) {
          for (int i = 0; i < 32; ++i) to[i] *= 2;
        }
      }
    }
  }
}

// Popcounts of x ^ weight for P pixels and G vectors of output channels.
template <int G, int P>
inline void count(const Convolution& c, const uint32_t* weight, const uint32_t* const (&base)[P], I (&total)[P][G]) {
  const int64_t run = c.kernel * c.words, row_step = c.padded_width * c.words;
  V::Count counts[P][G];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      total[p][g] = V::zero();
      counts[p][g] = V::zero();
    }
  }
  int steps = 0;
  for (int64_t ky = 0; ky < c.kernel; ++ky) {
    const uint32_t* x[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) x[p] = base[p] + ky * row_step;
    for (int64_t step = 0; step < run; ++step, weight += G * V::lanes) {
      I w[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) w[g] = V::load_words(weight + g * V::lanes);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const I bits = V::broadcast(x[p][step]);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) counts[p][g] = V::count(counts[p][g], bits, w[g]);
      }
      if constexpr (V::most_steps > 0) {
        if (++steps == V::most_steps) {  // the counters are full
          steps = 0;
          for (int p = 0; p < P; ++p) {
            for (int g = 0; g < G; ++g) {
              total[p][g] = V::add(total[p][g], V::counted(counts[p][g]));
              counts[p][g] = V::zero();
            }
          }
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) total[p][g] = V::add(total[p][g], V::counted(counts[p][g]));
  }
}

template <int G, int P>
void convolve_tile(const Convolution& c, int64_t tile, int64_t first, int64_t last, int32_t* sums) {
  const int64_t first_channel = tile * G * V::lanes;
  const uint32_t* weight = c.weight + tile * c.kernel * c.kernel * c.words * G * V::lanes;
  const int64_t pad = c.kernel / 2;
  const F low = V::set(c.prelu.low), high = V::set(c.prelu.high);
  I channel_sums[G];
  for (int g = 0; g < G; ++g) channel_sums[g] = V::zero();
  int64_t row = first / c.out_width, column = first % c.out_width;
  for (int64_t pixel = first; pixel < last; pixel += P) {
    const uint32_t* base[P];
    const int32_t* totals[P];
    const int64_t used = least(P, last - pixel);
    for (int p = 0; p < P; ++p) {
      if (p >= used) {  // computed again, and not stored
        base[p] = base[p - 1];
        totals[p] = totals[p - 1];
        continue;
      }
      const int64_t y = row * c.stride, x = column * c.stride;
      base[p] = c.bits + (y * c.padded_width + x) * c.words;
      int64_t edges = 0;
      if (pad != 0) {
        edges = (y == 0 ? 1 : 0) | (y + 1 == c.height ? 2 : 0) | (x == 0 ? 4 : 0) | (x + 1 == c.width ? 8 : 0);
      }
      totals[p] = c.totals + edges * c.padded_channels + first_channel;
      if (++column == c.out_width) {
        column = 0;
        ++row;
      }
    }
    I counts[P][G];
    count<G, P>(c, weight, base, counts);
    for (int g = 0; g < G; ++g) {
      const int64_t channel = first_channel + g * V::lanes;
      const int64_t width = c.channels - channel;
      if (width <= 0) break;
      const F multiplier = V::load(c.multiplier + channel);
      const PreluVector prelu(c.prelu, channel);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        if (p >= used) break;
        const I sum = V::minus_128_times(V::load_i32(totals[p] + g * V::lanes), counts[p][g]);
        const F q = V::round(clamp(V::mul(V::to_float(sum), multiplier), low, high));
        const F y = prelu(q);
        channel_sums[g] = V::add(channel_sums[g], V::to_int(y));
        store(c.y + (pixel + p) * c.channels + channel, y, width);
      }
    }
  }
  if (sums == nullptr) return;
  for (int g = 0; g < G; ++g) {
    int32_t* to = sums + g * V::lanes;
    V::store_i32(to, V::add(V::load_i32(to), channel_sums[g]));
  }
}

void convolve(const Convolution& c, int groups, int64_t tile, int64_t first, int64_t last, int32_t* sums) {
  switch (groups) {
    case 4:
      if constexpr (V::most_groups >= 4) return convolve_tile<4, V::pixels_of_4>(c, tile, first, last, sums);
      break;
    case 2:
      if constexpr (V::most_groups >= 2) return convolve_tile<2, V::pixels_of_2>(c, tile, first, last, sums);
      break;
    default:
      return convolve_tile<1, V::pixels_of_1>(c, tile, first, last, sums);
  }
}

// The residual of one output pixel: x, through PReLU, or the mean of four of them.
struct Residual {
  const Update& u;
  const PreluVector prelu;
  const int8_t *upper, *lower;  // the input rows, at the channel
  int64_t count;

  F at(int64_t column) const {
    if (u.stride == 1) return prelu(load(upper + column * u.channels, count));
    const int64_t left = 2 * column, right = least(left + 1, u.width - 1);
    const F a = prelu(load(upper + left * u.channels, count)), b = prelu(load(upper + right * u.channels, count));
    const F c = prelu(load(lower + left * u.channels, count)), d = prelu(load(lower + right * u.channels, count));
    return V::round(V::mul(V::add(V::add(a, b), V::add(c, d)), V::set(0.25f)));
  }
};

template <bool kBranch, bool kScales>
void update_rows(const Update& u, int64_t first_row, int64_t last_row) {
  const F product_low = V::set(u.product_low), product_high = V::set(u.product_high), second = V::set(u.second);
  const F branch_low = V::set(u.branch_low), branch_high = V::set(u.branch_high);
  const F of_branch = V::set(u.branch_multiplier), of_residual = V::set(u.residual_multiplier);
  const F low = V::set(u.low), high = V::set(u.high);
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t upper = row * u.stride, lower = least(upper + u.stride - 1, u.height - 1);
    for (int64_t channel = 0; channel < u.channels; channel += V::lanes) {
      const int64_t count = u.channels - channel;
      const F gain = kBranch ? V::load(u.gain + channel) : low;
      const F offset = kBranch ? V::load(u.offset + channel) : low;
      const int8_t* x = u.x + channel;
      const int64_t row_step = u.width * u.channels;
      const Residual residual{u, PreluVector(u.residual, channel), x + upper * row_step, x + lower * row_step, count};
      const int8_t* y = u.y + row * u.out_width * u.channels + channel;
      int8_t* out = u.out + row * u.out_width * u.out_channels + channel;
      for (int64_t column = 0; column < u.out_width; ++column) {
        F branch = load(y + column * u.channels, count);
        const F r = residual.at(column);
        if constexpr (kBranch) {
          branch = V::mul(branch, gain);
          if constexpr (kScales) {
            branch = V::round(clamp(branch, product_low, product_high));
            branch = V::mul(V::mul(branch, r), second);
          }
          branch = V::round(clamp(branch, branch_low, branch_high));
          branch = clamp(V::add(branch, offset), branch_low, branch_high);
        }
        const F total = V::add(V::mul(branch, of_branch), V::mul(r, of_residual));
        store(out + column * u.out_channels, V::round(clamp(total, low, high)), count);
      }
    }
  }
}

void update(const Update& u, int64_t first_row, int64_t last_row) {
  if (u.gain == nullptr) return update_rows<false, false>(u, first_row, last_row);
  if (u.scales) return update_rows<true, true>(u, first_row, last_row);
  return update_rows<true, false>(u, first_row, last_row);
}

// Sums of 27 products below 2^15 are exact in float32, fused or not.
void stem(const StemRows& s, int64_t first_row, int64_t last_row) {
  constexpr int kPixels = 8;
  const F low = V::set(s.low), high = V::set(s.high);
  const int64_t padded_channels = (s.channels + kPadding - 1) / kPadding * kPadding;
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

void sum(const int8_t* x, int64_t pixels, int64_t channels, const Prelu& slopes, int32_t* sums) {
  for (int64_t channel = 0; channel < channels; channel += V::lanes) {
    const PreluVector prelu(slopes, channel);
    I total = V::load_i32(sums + channel);
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      total = V::add(total, V::to_int(prelu(load(x + pixel * channels + channel, channels - channel))));
    }
    V::store_i32(sums + channel, total);
  }
}

// Writes `count` integers as int16.
inline void narrow(const int32_t* from, int64_t count, int16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<int16_t>(from[i]);
}

void linear(const Linear& layer, const int16_t* x, int32_t* sums, int16_t* out) {
  const F low = V::set(layer.low), high = V::set(layer.high);
  const int8_t* weight = layer.weight;
  for (int64_t i = 0; i < layer.outputs; i += V::lanes) {
    I total = V::load_i32(layer.bias + i);
    for (int64_t pair = 0; pair < layer.pairs; ++pair, weight += 2 * V::lanes) {
      total = V::add(total, V::pair_products(weight, x + 2 * pair));
    }
    const F value = V::mul(V::to_float(total), V::load(layer.multiplier + i));
    V::store_i32(sums + i, V::to_int(clamp(value, low, high)));
  }
  narrow(sums, layer.outputs, out);
}

void attention(const Attention& a) {
  const int64_t longest = (a.channels > a.reduce.outputs ? a.channels : a.reduce.outputs) + kPadding - 1;
  int16_t *const pooled = a.vectors, *const hidden = a.vectors + longest / kPadding * kPadding;
  for (int64_t i = 0; i < a.channels; ++i) {
    const float mix = static_cast<float>(a.x_sum[i]) * a.x_multiplier[i] +
                      static_cast<float>(a.y_sum[i]) * a.y_multiplier[i];
    const float raised = mix > a.low ? mix : a.low;
    pooled[i] = static_cast<int16_t>(V::to_integer(raised < a.high ? raised : a.high));
  }
  linear(a.reduce, pooled, a.sums, hidden);
  linear(a.expand, hidden, a.sums, pooled);
  for (int64_t i = 0; i < a.channels; ++i) {
    const float gain = a.table[pooled[i] + 128] * a.gain[i];
    const float raised = gain > -128.0f ? gain : -128.0f;
    a.out[i] = static_cast<int8_t>(V::to_integer(raised < 127.0f ? raised : 127.0f));
  }
}

constexpr Kernels table(const char* name) {
  return {name, V::lanes, V::most_groups, pack, convolve, update, stem, sum, attention};
}

}  // namespace
}  // namespace bnext
