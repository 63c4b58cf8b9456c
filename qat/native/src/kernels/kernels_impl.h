// The kernels, written once over the vectors `V` of an instruction set. Each kernels_*.cpp defines V, includes
// this file and is compiled for that set alone. Everything stands in an unnamed namespace and nothing of the
// C++ library is used: an inline function shared with other files could end up compiled for a processor that
// the others don't need.
//
// Rounding follows export/qat_export/integer/reference.py: one float32 multiplication, clamp, round half to even. Clamping to
// integers first gives what rounding first gives, and keeps every value within int32.

#include "kernels/kernels.h"

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
  const int64_t padded_channels = padded(p.channels);
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

// Requantizes sums, and adds y's up.
template <int G>
struct Requantize {
  const Convolution& c;
  const int64_t first_channel;
  const F low, high;
  I channel_sums[G];

  Requantize(const Convolution& convolution, int64_t tile)
      : c(convolution),
        first_channel(tile * G * V::lanes),
        low(V::set(convolution.prelu.low)),
        high(V::set(convolution.prelu.high)) {
    for (int g = 0; g < G; ++g) channel_sums[g] = V::zero();
  }

  template <int P>
  inline void take(int64_t pixel, int64_t used, const int32_t* const (&totals)[P], const I (&counts)[P][G]) {
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
};

// Writes sums down as they are.
template <int G>
struct WriteSums {
  int32_t* to;

  template <int P>
  inline void take(int64_t, int64_t used, const int32_t* const (&totals)[P], const I (&counts)[P][G]) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      if (p >= used) break;
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g, to += V::lanes) {
        V::store_i32(to, V::minus_128_times(V::load_i32(totals[p] + g * V::lanes), counts[p][g]));
      }
    }
  }
};

// Gives the popcounts of one tile to `end`, P pixels at a time.
template <int G, int P, typename End>
inline void over_tile(const Convolution& c, int64_t tile, int64_t first, int64_t last, End& end) {
  const int64_t first_channel = tile * G * V::lanes;
  const uint32_t* weight = c.weight + tile * c.kernel * c.kernel * c.words * G * V::lanes;
  const int64_t pad = c.kernel / 2;
  const int64_t image = first / c.image_pixels, in_image = first % c.image_pixels;
  const uint32_t* bits = c.bits + image * c.image_words;
  int64_t left = c.image_pixels - in_image, row = in_image / c.out_width, column = in_image % c.out_width;
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
      base[p] = bits + (y * c.padded_width + x) * c.words;
      int64_t edges = 0;
      if (pad != 0) {
        edges = (y == 0 ? 1 : 0) | (y + 1 == c.height ? 2 : 0) | (x == 0 ? 4 : 0) | (x + 1 == c.width ? 8 : 0);
      }
      totals[p] = c.totals + edges * c.padded_channels + first_channel;
      if (++column == c.out_width) {
        column = 0;
        ++row;
      }
      if (--left == 0) {
        left = c.image_pixels;
        row = 0;
        bits += c.image_words;
      }
    }
    I counts[P][G];
    count<G, P>(c, weight, base, counts);
    end.template take<P>(pixel, used, totals, counts);
  }
}

template <int G, int P>
void convolve_tile(const Convolution& c, int64_t tile, int64_t first, int64_t last, int32_t* sums) {
  Requantize<G> end(c, tile);
  over_tile<G, P>(c, tile, first, last, end);
  if (sums == nullptr) return;
  for (int g = 0; g < G; ++g) {
    int32_t* to = sums + g * V::lanes;
    V::store_i32(to, V::add(V::load_i32(to), end.channel_sums[g]));
  }
}

template <int G, int P>
void sum_tile(const Convolution& c, int64_t tile, int64_t first, int64_t last, int32_t* to) {
  WriteSums<G> end{to};
  over_tile<G, P>(c, tile, first, last, end);
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

void sums(const Convolution& c, int groups, int64_t tile, int64_t first, int64_t last, int32_t* to) {
  switch (groups) {
    case 4:
      if constexpr (V::most_groups >= 4) return sum_tile<4, V::pixels_of_4>(c, tile, first, last, to);
      break;
    case 2:
      if constexpr (V::most_groups >= 2) return sum_tile<2, V::pixels_of_2>(c, tile, first, last, to);
      break;
    default:
      return sum_tile<1, V::pixels_of_1>(c, tile, first, last, to);
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
      int8_t* out = u.out + row * u.out_width * u.channels + channel;
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
        store(out + column * u.channels, V::round(clamp(total, low, high)), count);
      }
    }
  }
}

void update(const Update& u, int64_t first_row, int64_t last_row) {
  if (u.gain == nullptr) return update_rows<false, false>(u, first_row, last_row);
  if (u.scales) return update_rows<true, true>(u, first_row, last_row);
  return update_rows<true, false>(u, first_row, last_row);
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

}  // namespace
}  // namespace bnext

// Parts that use what stands above.
#include "kernels/kernels_attention.h"
#include "kernels/kernels_stem.h"

namespace bnext {
namespace {

constexpr Kernels table(const char* name) {
  return {name, V::lanes, V::most_groups, pack, convolve, sums, update, stem, sum, attention};
}

}  // namespace
}  // namespace bnext
