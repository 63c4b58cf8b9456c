// Passes of the end of a sub-block: a branch x scaled plane by plane, an offset, and the residual; on grids where
// there are some. And their gradients, which find again from x where values lay within the grids.
#pragma once

#include "training/numbers_impl.h"

namespace bnext {
namespace {

template <typename T>
void run(const ScalePass& p, Planes planes) {
  using S = typename Numbers<T>::Sum;
  for (int64_t plane = planes.first; plane < planes.last; ++plane) {
    const int64_t start = plane * planes.pixels;
    const Input<T> x(p.x, start);
    const Output<T> out(p.out, start);
    const S factor = at<S>(p.factor, plane), shift = p.shift.data == nullptr ? S(0) : at<S>(p.shift, plane);
#pragma omp simd
    for (int64_t i = 0; i < planes.pixels; ++i) out.set(i, x[i] * factor + shift);
  }
}

template <typename T>
void run(const AddPass& p, Planes planes) {
  using S = typename Numbers<T>::Sum;
  with_grid<S>(p.grid, [&](const auto grid) {
    for (int64_t plane = planes.first; plane < planes.last; ++plane) {
      const int64_t start = plane * planes.pixels;
      const Input<T> x(p.x, start), residual(p.residual, start);
      const Output<T> out(p.out, start);
      const S factor = at<S>(p.factor, plane), offset = at<S>(p.offset, plane % planes.channels);
#pragma omp simd
      for (int64_t i = 0; i < planes.pixels; ++i) out.set(i, grid(grid(x[i] * factor) + offset) + residual[i]);
    }
  });
}

template <typename T>
void run(const AddGradientPass& p, Planes planes) {
  using S = typename Numbers<T>::Sum;
  with_grid<S>(p.grid, [&](const auto grid) {
    for (int64_t plane = planes.first; plane < planes.last; ++plane) {
      const int64_t start = plane * planes.pixels;
      const Input<T> grad(p.grad, start), x(p.x, start);
      const Output<T> grad_x(p.grad_x, start);
      const S factor = at<S>(p.factor, plane), offset = at<S>(p.offset, plane % planes.channels);
      S grad_offset = 0, grad_factor = 0;
#pragma omp simd reduction(+ : grad_offset, grad_factor)
      for (int64_t i = 0; i < planes.pixels; ++i) {
        const S value = x[i], steps = grid.steps(value * factor);
        const S outer = only(grid.holds(grid.steps(grid.value_of(steps) + offset)), grad[i]);
        const S inner = only(grid.holds(steps), outer);
        grad_offset += outer;
        grad_factor += inner * value;
        grad_x.set(i, inner * factor);
      }
      put(p.grad_offset, plane, grad_offset);
      put(p.grad_factor, plane, grad_factor);
    }
  });
}

template <typename T>
void run(const ProductAddPass& p, Planes planes) {
  using S = typename Numbers<T>::Sum;
  const OnGrid<S> grid(p.grid), product_grid(p.product_grid);
  for (int64_t plane = planes.first; plane < planes.last; ++plane) {
    const int64_t start = plane * planes.pixels;
    const Input<T> x(p.x, start), residuals(p.residual, start);
    const Output<T> out(p.out, start);
    const S factor = at<S>(p.factor, plane), offset = at<S>(p.offset, plane % planes.channels);
#pragma omp simd
    for (int64_t i = 0; i < planes.pixels; ++i) {
      const S residual = residuals[i];
      out.set(i, grid(grid(product_grid(x[i] * factor) * residual) + offset) + residual);
    }
  }
}

template <typename T>
void run(const ProductAddGradientPass& p, Planes planes) {
  using S = typename Numbers<T>::Sum;
  const OnGrid<S> grid(p.grid), product_grid(p.product_grid);
  for (int64_t plane = planes.first; plane < planes.last; ++plane) {
    const int64_t start = plane * planes.pixels;
    const Input<T> grad(p.grad, start), x(p.x, start), residuals(p.residual, start);
    const Output<T> grad_x(p.grad_x, start), grad_residual(p.grad_residual, start);
    const S factor = at<S>(p.factor, plane), offset = at<S>(p.offset, plane % planes.channels);
    S grad_offset = 0, grad_factor = 0;
#pragma omp simd reduction(+ : grad_offset, grad_factor)
    for (int64_t i = 0; i < planes.pixels; ++i) {
      const S value = x[i], residual = residuals[i], g = grad[i];
      const S first_steps = product_grid.steps(value * factor), scaled = product_grid.value_of(first_steps);
      const S steps = grid.steps(scaled * residual);
      const S outer = only(grid.holds(grid.steps(grid.value_of(steps) + offset)), g);
      const S middle = only(grid.holds(steps), outer);
      const S of_scaled = only(product_grid.holds(first_steps), middle * residual);
      grad_offset += outer;
      grad_factor += of_scaled * value;
      grad_x.set(i, of_scaled * factor);
      grad_residual.set(i, g + middle * scaled);
    }
    put(p.grad_offset, plane, grad_offset);
    put(p.grad_factor, plane, grad_factor);
  }
}

}  // namespace
}  // namespace bnext
