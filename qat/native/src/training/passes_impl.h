// The passes, written once; each passes_*.cpp includes this file and is compiled for an instruction set, whose
// vectors the compiler finds. As in kernels_impl.h everything is in an unnamed namespace.

#include "training/passes.h"

namespace bnext {
namespace {

struct Bfloat16 {
  uint16_t bits;
};

template <typename T>
struct Numbers {
  using Sum = T;
  static T load(T value) { return value; }
  static T store(T value) { return value; }
};

template <>
struct Numbers<Bfloat16> {
  using Sum = float;
  static float load(Bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    __builtin_memcpy(&result, &bits, sizeof result);
    return result;
  }
  // To nearest, half to even; no number stays none.
  static Bfloat16 store(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint32_t kept = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0u : rounded;
    return {static_cast<uint16_t>(kept)};
  }
};

inline float nearest(float value) { return __builtin_rintf(value); }
inline double nearest(double value) { return __builtin_rint(value); }
inline float magnitude(float value) { return __builtin_fabsf(value); }
inline double magnitude(double value) { return __builtin_fabs(value); }

// value or 0. By bits, since a compiler that sees a choice reads the value behind a branch, which no vector can.
inline float only(bool wanted, float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  bits &= 0u - static_cast<uint32_t>(wanted);
  __builtin_memcpy(&value, &bits, sizeof bits);
  return value;
}
inline double only(bool wanted, double value) {
  uint64_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  bits &= uint64_t{0} - static_cast<uint64_t>(wanted);
  __builtin_memcpy(&value, &bits, sizeof bits);
  return value;
}

// A grid's values are rounded to float32 whatever type they have: they are those of the exported network.
template <typename S>
struct OnGrid {
  S low, high, scale, inverse;
  explicit OnGrid(const Grid& grid)
      : low(static_cast<S>(grid.low)),
        high(static_cast<S>(grid.high)),
        scale(static_cast<S>(grid.scale)),
        inverse(static_cast<S>(grid.inverse)) {}
  S steps(S value) const { return nearest(value * inverse); }
  bool holds(S steps) const { return (steps >= low) & (steps <= high); }
  // No number stays none.
  S value_of(S steps) const {
    const S raised = steps < low ? low : steps;
    return static_cast<S>(static_cast<float>((raised > high ? high : raised) * scale));
  }
  S operator()(S value) const { return value_of(steps(value)); }
};

// No grid: values stay as they are.
template <typename S>
struct Free {
  explicit Free(const Grid&) {}
  S steps(S value) const { return value; }
  bool holds(S) const { return true; }
  S value_of(S steps) const { return steps; }
  S operator()(S value) const { return value; }
};

// One plane of a tensor of T.
template <typename T>
struct Plane {
  T* data;
  Plane(const void* tensor, int64_t start) : data(static_cast<T*>(const_cast<void*>(tensor)) + start) {}
  typename Numbers<T>::Sum operator[](int64_t i) const { return Numbers<T>::load(data[i]); }
  void set(int64_t i, typename Numbers<T>::Sum value) const { data[i] = Numbers<T>::store(value); }
};

template <typename T>
struct Passes {
  using S = typename Numbers<T>::Sum;

  static S at(const void* values, int64_t i) { return static_cast<const S*>(values)[i]; }
  static void put(void* values, int64_t i, S value) { static_cast<S*>(values)[i] = value; }

  // sign(x + offset)
  static void sign(Pass& p, int64_t first, int64_t last) {
    const S zero = p.positive_zero ? 1 : 0;
    for (int64_t plane = first; plane < last; ++plane) {
      const Plane<T> x(p.x, plane * p.pixels), out(p.out, plane * p.pixels);
      const S offset = at(p.offset, plane % p.channels);
#pragma omp simd
      for (int64_t i = 0; i < p.pixels; ++i) {
        const S shifted = x[i] + offset;
        const S other = shifted < 0 ? S(-1) : shifted == 0 ? zero : shifted;  // no number stays none
        out.set(i, shifted > 0 ? S(1) : other);
      }
    }
  }

  // grad where |x + offset| < clip; sums: of that.
  static void sign_gradient(Pass& p, int64_t first, int64_t last) {
    const S clip = static_cast<S>(p.clip);
    for (int64_t plane = first; plane < last; ++plane) {
      const int64_t start = plane * p.pixels;
      const Plane<T> x(p.x, start), grad(p.grad, start), out(p.out, start);
      const S offset = at(p.offset, plane % p.channels);
      S sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < p.pixels; ++i) {
        const S shifted = x[i] + offset, g = grad[i];
        const S passed = only(!(magnitude(shifted) >= clip), g);
        sum += passed;
        out.set(i, passed);
      }
      put(p.sums, plane, sum);
    }
  }

  // sums: mean; products: variance without correction.
  static void moments(Pass& p, int64_t first, int64_t last) {
    for (int64_t plane = first; plane < last; ++plane) {
      const Plane<T> x(p.x, plane * p.pixels);
      S sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < p.pixels; ++i) sum += x[i];
      const S mean = sum / static_cast<S>(p.pixels);
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < p.pixels; ++i) squares += (x[i] - mean) * (x[i] - mean);
      put(p.sums, plane, mean);
      put(p.products, plane, squares / static_cast<S>(p.pixels));
    }
  }

  // factor x, + shift where there is one; both of a plane
  static void scale(Pass& p, int64_t first, int64_t last) {
    for (int64_t plane = first; plane < last; ++plane) {
      const Plane<T> x(p.x, plane * p.pixels), out(p.out, plane * p.pixels);
      const S factor = at(p.factor, plane), shift = p.shift == nullptr ? S(0) : at(p.shift, plane);
#pragma omp simd
      for (int64_t i = 0; i < p.pixels; ++i) out.set(i, x[i] * factor + shift);
    }
  }

  // x on the grid; inside: where it lay within
  static void fake_quantize(Pass& p, int64_t first, int64_t last) {
    const OnGrid<S> grid(p.grid);
    bool outside = false;
    for (int64_t plane = first; plane < last; ++plane) {
      const Plane<T> x(p.x, plane * p.pixels), out(p.out, plane * p.pixels);
      const int64_t count = plane + 1 == p.planes ? p.last : p.pixels;
      uint8_t* inside = p.inside + plane * p.pixels;
      int32_t beyond = 0;
#pragma omp simd reduction(| : beyond)
      for (int64_t i = 0; i < count; ++i) {
        const S steps = grid.steps(x[i]);
        const int32_t within = grid.holds(steps);
        beyond |= 1 - within;
        inside[i] = static_cast<uint8_t>(within);
        out.set(i, grid.value_of(steps));
      }
      outside |= beyond != 0;
    }
    if (outside) __atomic_store_n(&p.outside, 1, __ATOMIC_RELAXED);
  }

  // grad where inside
  static void fake_quantize_gradient(Pass& p, int64_t first, int64_t last) {
    for (int64_t plane = first; plane < last; ++plane) {
      const Plane<T> grad(p.grad, plane * p.pixels), out(p.out, plane * p.pixels);
      const int64_t count = plane + 1 == p.planes ? p.last : p.pixels;
      const uint8_t* inside = p.inside + plane * p.pixels;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const S g = grad[i];
        out.set(i, only(inside[i] != 0, g));
      }
    }
  }

  // From here on values may be put on grids, G: OnGrid or Free. Where they lay within is found again from x.

  // PReLU(x) on the grid
  template <template <typename> class G>
  static void prelu(Pass& p, int64_t first, int64_t last) {
    const G<S> grid(p.grid);
    for (int64_t plane = first; plane < last; ++plane) {
      const Plane<T> x(p.x, plane * p.pixels), out(p.out, plane * p.pixels);
      const S slope = at(p.slope, plane % p.channels);
#pragma omp simd
      for (int64_t i = 0; i < p.pixels; ++i) {
        const S value = x[i], less = value * slope;
        out.set(i, grid(value > 0 ? value : less));
      }
    }
  }

  // Its gradient; slopes: that of the slope.
  template <template <typename> class G>
  static void prelu_gradient(Pass& p, int64_t first, int64_t last) {
    const G<S> grid(p.grid);
    for (int64_t plane = first; plane < last; ++plane) {
      const int64_t start = plane * p.pixels;
      const Plane<T> x(p.x, start), grad(p.grad, start), out(p.out, start);
      const S slope = at(p.slope, plane % p.channels);
      S slopes = 0;
#pragma omp simd reduction(+ : slopes)
      for (int64_t i = 0; i < p.pixels; ++i) {
        const Through found(grid, x[i], slope, grad[i]);
        slopes += found.slope;
        out.set(i, found.before);
      }
      put(p.slopes, plane, slopes);
    }
  }

  // The gradient before PReLU of a value, whose result is put on a grid; and the slope's.
  struct Through {
    S before, slope;
    template <typename G>
    Through(const G& grid, S value, S slope_, S g) {
      const S scaled = value * slope_;
      const S passed = only(grid.holds(grid.steps(value > 0 ? value : scaled)), g);
      const S less = passed * slope_, of_slope = passed * value;
      before = value > 0 ? passed : less;
      slope = value > 0 ? S(0) : of_slope;
    }
  };

  // PReLU of gain x + offset on the grid, on the grid
  template <template <typename> class G>
  static void norm_prelu(Pass& p, int64_t first, int64_t last) {
    const G<S> grid(p.grid);
    for (int64_t plane = first; plane < last; ++plane) {
      const Plane<T> x(p.x, plane * p.pixels), out(p.out, plane * p.pixels);
      const int64_t channel = plane % p.channels;
      const S gain = at(p.gain, channel), offset = at(p.offset, channel), slope = at(p.slope, channel);
#pragma omp simd
      for (int64_t i = 0; i < p.pixels; ++i) {
        const S normed = grid(x[i] * gain + offset), less = normed * slope;
        out.set(i, grid(normed > 0 ? normed : less));
      }
    }
  }

  // Of the gradient at gain x + offset: its sum, the sum of its products with x - center, and that of the slope.
  template <template <typename> class G>
  static void norm_prelu_sums(Pass& p, int64_t first, int64_t last) {
    const G<S> grid(p.grid);
    for (int64_t plane = first; plane < last; ++plane) {
      const Plane<T> x(p.x, plane * p.pixels), grad(p.grad, plane * p.pixels);
      const int64_t channel = plane % p.channels;
      const S gain = at(p.gain, channel), offset = at(p.offset, channel), slope = at(p.slope, channel);
      const S center = at(p.center, channel);
      S sum = 0, product = 0, slopes = 0;
#pragma omp simd reduction(+ : sum, product, slopes)
      for (int64_t i = 0; i < p.pixels; ++i) {
        const S value = x[i], steps = grid.steps(value * gain + offset);
        const Through found(grid, grid.value_of(steps), slope, grad[i]);
        const S before = only(grid.holds(steps), found.before);
        sum += before;
        product += before * (value - center);
        slopes += found.slope;
      }
      put(p.sums, plane, sum);
      put(p.products, plane, product);
      put(p.slopes, plane, slopes);
    }
  }

  // gain times that gradient, + shift + tilt (x - center)
  template <template <typename> class G>
  static void norm_prelu_gradient(Pass& p, int64_t first, int64_t last) {
    const G<S> grid(p.grid);
    for (int64_t plane = first; plane < last; ++plane) {
      const int64_t start = plane * p.pixels;
      const Plane<T> x(p.x, start), grad(p.grad, start), out(p.out, start);
      const int64_t channel = plane % p.channels;
      const S gain = at(p.gain, channel), offset = at(p.offset, channel), slope = at(p.slope, channel);
      const S center = at(p.center, channel), shift = at(p.shift, channel), tilt = at(p.tilt, channel);
#pragma omp simd
      for (int64_t i = 0; i < p.pixels; ++i) {
        const S value = x[i], steps = grid.steps(value * gain + offset);
        const Through found(grid, grid.value_of(steps), slope, grad[i]);
        out.set(i, only(grid.holds(steps), found.before) * gain + (shift + tilt * (value - center)));
      }
    }
  }

  // Of a branch x and a residual `other`: factor x on the grid, + offset on the grid, + other.
  template <template <typename> class G>
  static void add(Pass& p, int64_t first, int64_t last) {
    const G<S> grid(p.grid);
    for (int64_t plane = first; plane < last; ++plane) {
      const int64_t start = plane * p.pixels;
      const Plane<T> x(p.x, start), other(p.other, start), out(p.out, start);
      const S factor = at(p.factor, plane), offset = at(p.offset, plane % p.channels);
#pragma omp simd
      for (int64_t i = 0; i < p.pixels; ++i) out.set(i, grid(grid(x[i] * factor) + offset) + other[i]);
    }
  }

  // Its gradient by x; sums: by the offset; products: by the factor.
  template <template <typename> class G>
  static void add_gradient(Pass& p, int64_t first, int64_t last) {
    const G<S> grid(p.grid);
    for (int64_t plane = first; plane < last; ++plane) {
      const int64_t start = plane * p.pixels;
      const Plane<T> x(p.x, start), grad(p.grad, start), out(p.out, start);
      const S factor = at(p.factor, plane), offset = at(p.offset, plane % p.channels);
      S sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
      for (int64_t i = 0; i < p.pixels; ++i) {
        const S value = x[i], steps = grid.steps(value * factor);
        const S outer = only(grid.holds(grid.steps(grid.value_of(steps) + offset)), grad[i]);
        const S inner = only(grid.holds(steps), outer);
        sum += outer;
        product += inner * value;
        out.set(i, inner * factor);
      }
      put(p.sums, plane, sum);
      put(p.products, plane, product);
    }
  }

  // As `add` on grids where the residual is a factor, too: factor x on the inner grid, times other, ...
  static void product_add(Pass& p, int64_t first, int64_t last) {
    const OnGrid<S> grid(p.grid), inner(p.inner);
    for (int64_t plane = first; plane < last; ++plane) {
      const int64_t start = plane * p.pixels;
      const Plane<T> x(p.x, start), other(p.other, start), out(p.out, start);
      const S factor = at(p.factor, plane), offset = at(p.offset, plane % p.channels);
#pragma omp simd
      for (int64_t i = 0; i < p.pixels; ++i) {
        const S residual = other[i];
        out.set(i, grid(grid(inner(x[i] * factor) * residual) + offset) + residual);
      }
    }
  }

  // Its gradient by x, and by other in other_out.
  static void product_add_gradient(Pass& p, int64_t first, int64_t last) {
    const OnGrid<S> grid(p.grid), inner(p.inner);
    for (int64_t plane = first; plane < last; ++plane) {
      const int64_t start = plane * p.pixels;
      const Plane<T> x(p.x, start), other(p.other, start), grad(p.grad, start);
      const Plane<T> out(p.out, start), other_out(p.other_out, start);
      const S factor = at(p.factor, plane), offset = at(p.offset, plane % p.channels);
      S sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
      for (int64_t i = 0; i < p.pixels; ++i) {
        const S value = x[i], residual = other[i], g = grad[i];
        const S first_steps = inner.steps(value * factor), scaled = inner.value_of(first_steps);
        const S steps = grid.steps(scaled * residual);
        const S outer = only(grid.holds(grid.steps(grid.value_of(steps) + offset)), g);
        const S middle = only(grid.holds(steps), outer);
        const S of_scaled = only(inner.holds(first_steps), middle * residual);
        sum += outer;
        product += of_scaled * value;
        out.set(i, of_scaled * factor);
        other_out.set(i, g + middle * scaled);
      }
      put(p.sums, plane, sum);
      put(p.products, plane, product);
    }
  }
};

#define BNEXT_RUN(run) {Passes<float>::run, Passes<double>::run, Passes<Bfloat16>::run}
#define BNEXT_PASS(name) {#name, BNEXT_RUN(name)}
#define BNEXT_GRID_PASS(name) {#name, BNEXT_RUN(name<Free>)}, {"grid_" #name, BNEXT_RUN(name<OnGrid>)}
constexpr NamedPass kPasses[] = {
    BNEXT_PASS(sign),
    BNEXT_PASS(sign_gradient),
    BNEXT_PASS(moments),
    BNEXT_PASS(scale),
    BNEXT_PASS(fake_quantize),
    BNEXT_PASS(fake_quantize_gradient),
    BNEXT_GRID_PASS(prelu),
    BNEXT_GRID_PASS(prelu_gradient),
    BNEXT_GRID_PASS(norm_prelu),
    BNEXT_GRID_PASS(norm_prelu_sums),
    BNEXT_GRID_PASS(norm_prelu_gradient),
    BNEXT_GRID_PASS(add),
    BNEXT_GRID_PASS(add_gradient),
    BNEXT_PASS(product_add),
    BNEXT_PASS(product_add_gradient),
    {nullptr, {}},
};
#undef BNEXT_GRID_PASS
#undef BNEXT_PASS
#undef BNEXT_RUN

}  // namespace
}  // namespace bnext
