// Channel attention over the vectors `V`. A part of kernels_impl.h, which includes it.
#pragma once

namespace bnext {
namespace {

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
  const int64_t longest = padded(a.channels > a.reduce.outputs ? a.channels : a.reduce.outputs);
  int16_t *const pooled = a.vectors, *const hidden = a.vectors + longest;
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

}  // namespace
}  // namespace bnext
