// Numbers, grids and planes of the passes. Like each *_impl.h this file is compiled for several instruction sets,
// so that everything is in an unnamed namespace: the linker would keep one of several equal functions.
#pragma once

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
  S steps(S value) const { return value; }
  bool holds(S) const { return true; }
  S value_of(S steps) const { return steps; }
  S operator()(S value) const { return value; }
};

// Calls `work` with the grid, or with none. Either way it is compiled by itself.
template <typename S, typename Work>
void with_grid(OptionalGrid grid, const Work& work) {
  if (grid.data == nullptr) {
    work(Free<S>());
  } else {
    work(OnGrid<S>(*grid.data));
  }
}

// One plane of a tensor of T.
template <typename T>
struct Input {
  const T* data;
  Input(Values tensor, int64_t start) : data(static_cast<const T*>(tensor.data) + start) {}
  typename Numbers<T>::Sum operator[](int64_t i) const { return Numbers<T>::load(data[i]); }
};

template <typename T>
struct Output {
  T* data;
  Output(Results tensor, int64_t start) : data(static_cast<T*>(tensor.data) + start) {}
  void set(int64_t i, typename Numbers<T>::Sum value) const { data[i] = Numbers<T>::store(value); }
};

// Coefficient i, or sum i.
template <typename S, typename Vector>
S at(Vector values, int64_t i) {
  return static_cast<const S*>(values.data)[i];
}
template <typename S>
void put(PlaneResults values, int64_t plane, S value) {
  static_cast<S*>(values.data)[plane] = value;
}

}  // namespace
}  // namespace bnext
