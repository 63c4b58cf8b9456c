// Passes of a normalization and the PReLU after it, with values on a grid where there is one; and their gradients,
// which find again from x where values lay within the grid.
#pragma once

#include "training/numbers_impl.h"

namespace bnext {
namespace {

template <typename T>
void run(const MomentsPass& p, Planes planes) {
  using S = typename Numbers<T>::Sum;
  for (int64_t plane = planes.first; plane < planes.last; ++plane) {
    const Input<T> x(p.x, plane * planes.pixels);
    S sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < planes.pixels; ++i) sum += x[i];
    const S mean = sum / static_cast<S>(planes.pixels);
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < planes.pixels; ++i) squares += (x[i] - mean) * (x[i] - mean);
    put(p.mean, plane, mean);
    put(p.variance, plane, squares / static_cast<S>(planes.pixels));
  }
}

template <typename T>
void run(const PreluPass& p, Planes planes) {
  using S = typename Numbers<T>::Sum;
  with_grid<S>(p.grid, [&](const auto grid) {
    for (int64_t plane = planes.first; plane < planes.last; ++plane) {
      const int64_t start = plane * planes.pixels;
      const Input<T> x(p.x, start);
      const Output<T> out(p.out, start);
      const S slope = at<S>(p.slope, plane % planes.channels);
#pragma omp simd
      for (int64_t i = 0; i < planes.pixels; ++i) {
        const S value = x[i], less = value * slope;
        out.set(i, grid(value > 0 ? value : less));
      }
    }
  });
}

// The gradient before PReLU of a value, whose result is put on a grid; and the slope's.
template <typename S>
struct ThroughPrelu {
  S before, slope;
  template <typename G>
  ThroughPrelu(const G& grid, S value, S slope_, S grad) {
    const S scaled = value * slope_;
    const S passed = only(grid.holds(grid.steps(value > 0 ? value : scaled)), grad);
    const S less = passed * slope_, of_slope = passed * value;
    before = value > 0 ? passed : less;
    slope = value > 0 ? S(0) : of_slope;
  }
};

template <typename T>
void run(const PreluGradientPass& p, Planes planes) {
  using S = typename Numbers<T>::Sum;
  with_grid<S>(p.grid, [&](const auto grid) {
    for (int64_t plane = planes.first; plane < planes.last; ++plane) {
      const int64_t start = plane * planes.pixels;
      const Input<T> grad(p.grad, start), x(p.x, start);
      const Output<T> grad_x(p.grad_x, start);
      const S slope = at<S>(p.slope, plane % planes.channels);
      S grad_slope = 0;
#pragma omp simd reduction(+ : grad_slope)
      for (int64_t i = 0; i < planes.pixels; ++i) {
        const ThroughPrelu<S> found(grid, x[i], slope, grad[i]);
        grad_slope += found.slope;
        grad_x.set(i, found.before);
      }
      put(p.grad_slope, plane, grad_slope);
    }
  });
}

template <typename T>
void run(const NormPreluPass& p, Planes planes) {
  using S = typename Numbers<T>::Sum;
  with_grid<S>(p.grid, [&](const auto grid) {
    for (int64_t plane = planes.first; plane < planes.last; ++plane) {
      const int64_t start = plane * planes.pixels, channel = plane % planes.channels;
      const Input<T> x(p.x, start);
      const Output<T> out(p.out, start);
      const S gain = at<S>(p.gain, channel), offset = at<S>(p.offset, channel), slope = at<S>(p.slope, channel);
#pragma omp simd
      for (int64_t i = 0; i < planes.pixels; ++i) {
        const S normed = grid(x[i] * gain + offset), less = normed * slope;
        out.set(i, grid(normed > 0 ? normed : less));
      }
    }
  });
}

template <typename T>
void run(const NormPreluSumsPass& p, Planes planes) {
  using S = typename Numbers<T>::Sum;
  with_grid<S>(p.grid, [&](const auto grid) {
    for (int64_t plane = planes.first; plane < planes.last; ++plane) {
      const int64_t start = plane * planes.pixels, channel = plane % planes.channels;
      const Input<T> grad(p.grad, start), x(p.x, start);
      const S gain = at<S>(p.gain, channel), offset = at<S>(p.offset, channel), slope = at<S>(p.slope, channel);
      const S center = at<S>(p.center, channel);
      S sum = 0, product = 0, grad_slope = 0;
#pragma omp simd reduction(+ : sum, product, grad_slope)
      for (int64_t i = 0; i < planes.pixels; ++i) {
        const S value = x[i], steps = grid.steps(value * gain + offset);
        const ThroughPrelu<S> found(grid, grid.value_of(steps), slope, grad[i]);
        const S before = only(grid.holds(steps), found.before);
        sum += before;
        product += before * (value - center);
        grad_slope += found.slope;
      }
      put(p.grad_sum, plane, sum);
      put(p.grad_product, plane, product);
      put(p.grad_slope, plane, grad_slope);
    }
  });
}

template <typename T>
void run(const NormPreluGradientPass& p, Planes planes) {
  using S = typename Numbers<T>::Sum;
  with_grid<S>(p.grid, [&](const auto grid) {
    for (int64_t plane = planes.first; plane < planes.last; ++plane) {
      const int64_t start = plane * planes.pixels, channel = plane % planes.channels;
      const Input<T> grad(p.grad, start), x(p.x, start);
      const Output<T> grad_x(p.grad_x, start);
      const S gain = at<S>(p.gain, channel), offset = at<S>(p.offset, channel), slope = at<S>(p.slope, channel);
      const S center = at<S>(p.center, channel), shift = at<S>(p.shift, channel), tilt = at<S>(p.tilt, channel);
#pragma omp simd
      for (int64_t i = 0; i < planes.pixels; ++i) {
        const S value = x[i], steps = grid.steps(value * gain + offset);
        const ThroughPrelu<S> found(grid, grid.value_of(steps), slope, grad[i]);
        grad_x.set(i, only(grid.holds(steps), found.before) * gain + (shift + tilt * (value - center)));
      }
    }
  });
}

}  // namespace
}  // namespace bnext
