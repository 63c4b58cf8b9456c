// Passes that put values on two levels, which are signs, or on a grid; and their gradients.
#pragma once

#include "training/numbers_impl.h"

namespace bnext {
namespace {

template <typename T>
void run(const SignPass& p, Planes planes) {
  using S = typename Numbers<T>::Sum;
  const S zero = p.zero_is_positive ? 1 : 0;
  for (int64_t plane = planes.first; plane < planes.last; ++plane) {
    const int64_t start = plane * planes.pixels;
    const Input<T> x(p.x, start);
    const Output<T> out(p.out, start);
    const S offset = at<S>(p.offset, plane % planes.channels);
#pragma omp simd
    for (int64_t i = 0; i < planes.pixels; ++i) {
      const S shifted = x[i] + offset;
      const S other = shifted < 0 ? S(-1) : shifted == 0 ? zero : shifted;  // no number stays none
      out.set(i, shifted > 0 ? S(1) : other);
    }
  }
}

template <typename T>
void run(const SignGradientPass& p, Planes planes) {
  using S = typename Numbers<T>::Sum;
  const S clip = static_cast<S>(p.clip);
  for (int64_t plane = planes.first; plane < planes.last; ++plane) {
    const int64_t start = plane * planes.pixels;
    const Input<T> grad(p.grad, start), x(p.x, start);
    const Output<T> grad_x(p.grad_x, start);
    const S offset = at<S>(p.offset, plane % planes.channels);
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < planes.pixels; ++i) {
      const S shifted = x[i] + offset, g = grad[i];
      const S passed = only(!(magnitude(shifted) >= clip), g);
      sum += passed;
      grad_x.set(i, passed);
    }
    put(p.grad_offset, plane, sum);
  }
}

// Pixels of a plane that flat memory has.
inline int64_t pixels_of(int64_t plane, Planes planes) {
  const int64_t left = planes.values - plane * planes.pixels;
  return left < planes.pixels ? left : planes.pixels;
}

template <typename T>
void run(FakeQuantizePass& p, Planes planes) {
  using S = typename Numbers<T>::Sum;
  const OnGrid<S> grid(p.grid);
  bool outside = false;
  for (int64_t plane = planes.first; plane < planes.last; ++plane) {
    const int64_t start = plane * planes.pixels, count = pixels_of(plane, planes);
    const Input<T> x(p.x, start);
    const Output<T> out(p.out, start);
    uint8_t* inside = p.inside.data + start;
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
  if (outside) __atomic_store_n(&p.outside.value, 1, __ATOMIC_RELAXED);
}

template <typename T>
void run(const FakeQuantizeGradientPass& p, Planes planes) {
  using S = typename Numbers<T>::Sum;
  for (int64_t plane = planes.first; plane < planes.last; ++plane) {
    const int64_t start = plane * planes.pixels, count = pixels_of(plane, planes);
    const Input<T> grad(p.grad, start);
    const Output<T> grad_x(p.grad_x, start);
    const uint8_t* inside = p.inside.data + start;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const S g = grad[i];
      grad_x.set(i, only(inside[i] != 0, g));
    }
  }
}

}  // namespace
}  // namespace bnext
