// The loops of expert_mlp that are no products: activations and dropout. Included by isa_*.cpp
// only.
#pragma once

#include "convert.h"
#include "exp2.h"
#include "expert_mlp_tile.h"
#include "multiply_add.h"

namespace m2ae::cpu {
namespace {

// exp(x) for x of any size: 0 below -87, and e^87 at most; relative error 2e-7 between.
inline float bounded_exp(float x) {
  constexpr float kEnd = 87.0f;
  const Factor log2_e(1.4426950408889634);
  float inside = x < -kEnd ? -kEnd : x;  // NaN stays
  inside = inside > kEnd ? kEnd : inside;
  const float result = exp2_of_product(inside, log2_e, 127u);
  return x < -kEnd ? 0.0f : result;
}

inline float sigmoid(float x) {
  return 1.0f / (1.0f + bounded_exp(-x));
}

// Error below 1e-7: two polynomials by N. Juffa, https://stackoverflow.com/a/35148199.
inline float error_function(float x) {
  float t = std::fabs(x);
  t = t > 4.0f ? 4.0f : t;  // where it is 1; NaN stays
  const float s = t * t;
  float far = multiply_add(-1.72853470e-5f, t, 3.83197126e-4f);
  far = multiply_add(far, s, multiply_add(-3.88396438e-3f, t, 2.42546219e-2f));
  far = multiply_add(far, t, -1.06777877e-1f);
  far = multiply_add(far, t, -6.34846687e-1f);
  far = multiply_add(far, t, -1.28717512e-1f);
  far = multiply_add(far, t, -t);
  far = 1.0f - bounded_exp(far);
  float near = -5.96761703e-4f;
  near = multiply_add(near, s, 4.99119423e-3f);
  near = multiply_add(near, s, -2.67681349e-2f);
  near = multiply_add(near, s, 1.12819925e-1f);
  near = multiply_add(near, s, -3.76125336e-1f);
  near = multiply_add(near, s, 1.28379166e-1f);
  near = multiply_add(near, t, t);
  const float magnitude = t > 0.927734375f ? far : near;
  return x < 0 ? -magnitude : magnitude;
}

struct ActivationEntry {
  float value, derivative;
};

enum class Activation : int { kIdentity, kGelu, kGeluTanh, kRelu, kRelu2, kSilu };

template <Activation activation>
inline ActivationEntry activation_entry(float x) {
  if constexpr (activation == Activation::kGelu) {
    const float phi = 0.3989422804f * bounded_exp(-0.5f * x * x);
    const float share = 0.5f + 0.5f * error_function(x * 0.7071067812f);
    return {x * share, multiply_add(x, phi, share)};
  } else if constexpr (activation == Activation::kGeluTanh) {
    constexpr float kTwice = 2 * 0.7978845608f, kCubic = 0.044715f;
    const float share = sigmoid(kTwice * x * multiply_add(kCubic * x, x, 1.0f));
    const float slope = kTwice * multiply_add(3 * kCubic * x, x, 1.0f);
    return {x * share, multiply_add(x * share * (1.0f - share), slope, share)};
  } else if constexpr (activation == Activation::kRelu) {
    return {x < 0 ? 0.0f : x, x > 0 ? 1.0f : 0.0f};
  } else if constexpr (activation == Activation::kRelu2) {
    const float positive = x < 0 ? 0.0f : x;
    return {positive * positive, 2.0f * positive};
  } else if constexpr (activation == Activation::kSilu) {
    const float share = sigmoid(x);
    return {x * share, share * multiply_add(x, 1.0f - share, 1.0f)};
  } else {
    return {x, 1.0f};
  }
}

template <Activation activation, bool gated>
void activate_kernel(
    const float* x /* [n] */, const float* up /* [n] */, int64_t n, float* out /* [n] */) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float value = activation_entry<activation>(x[i]).value;
    if constexpr (gated)
      out[i] = value * up[i];
    else
      out[i] = value;
  }
}

template <Activation activation, bool gated>
void activate_backward_kernel(
    const float* grad /* [n] */,
    const float* x /* [n] */,
    const float* up /* [n] */,
    int64_t n,
    float* by_x /* [n] */,
    float* by_up /* [n] */) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const ActivationEntry entry = activation_entry<activation>(x[i]);
    const float g = grad[i];
    if constexpr (gated) {
      by_x[i] = g * up[i] * entry.derivative;
      by_up[i] = g * entry.value;
    } else {
      by_x[i] = g * entry.derivative;
    }
  }
}

template <Activation activation, bool gated>
float hidden_backward_kernel(
    const float* by_a /* [n] */,
    const float* h /* [n] */,
    const float* up /* [n] */,
    const float* factors /* [n] */,
    float weight,
    int64_t n,
    float* a /* [n] */,
    float* by_h /* [n] */,
    float* by_up /* [n] */) {
  float dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < n; ++i) {
    const ActivationEntry entry = activation_entry<activation>(h[i]);
    const float factor = factors[i], gate = gated ? up[i] : 1.0f;
    const float value = entry.value * gate * factor;
    dot += by_a[i] * value;
    a[i] = value * weight;
    const float grad = by_a[i] * factor * weight;
    if constexpr (gated) {
      by_h[i] = grad * gate * entry.derivative;
      by_up[i] = grad * entry.value;
    } else {
      by_h[i] = grad * entry.derivative;
    }
  }
  return dot;
}

// to [rows / 2, n, 2] <- from [rows, n], ld apart, in bfloat16: two rows in turn.
inline void pair_floats_kernel(
    const float* from, int64_t ld, int64_t rows /* even */, int64_t n, void* to) {
  auto* const y = static_cast<uint32_t*>(to);
  for (int64_t r = 0; r < rows; r += 2) {
    const float *const first = from + r * ld, *const second = first + ld;
    uint32_t* const pairs = y + r / 2 * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      pairs[i] = convert<BFloat16>(first[i]).x | uint32_t(convert<BFloat16>(second[i]).x) << 16;
  }
}

// Each number to the nearest of element_t, as if stored there.
template <typename element_t>
void round_to_kernel(float* x /* [n] */, int64_t n) {
  if constexpr (!std::is_same_v<element_t, float>) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] = convert<float>(convert<element_t>(x[i]));
  }
}

inline void add_to_rows_kernel(
    float* tile /* [rows, columns] */, int64_t rows, int64_t columns, const float* bias) {
  for (int64_t r = 0; r < rows; ++r) {
    float* const row = tile + r * columns;
    const float value = bias[r];
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) row[i] += value;
  }
}

inline void philox4x32(
    uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t k, uint32_t q, uint32_t* words) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t of_a = uint64_t(0xD2511F53u) * a, of_c = uint64_t(0xCD9E8D57u) * c;
    a = uint32_t(of_c >> 32) ^ b ^ k;
    c = uint32_t(of_a >> 32) ^ d ^ q;
    b = uint32_t(of_c);
    d = uint32_t(of_a);
    k += 0x9E3779B9u;
    q += 0xBB67AE85u;
  }
  words[0] = a;
  words[1] = b;
  words[2] = c;
  words[3] = d;
}

constexpr int64_t kDropoutLanes = 16;

// row[i] *= the factor of column first + i of the slot. first is a multiple of 4.
inline void dropout_row_kernel(
    const Dropout& dropout, int32_t slot, int64_t first, float* row /* [n] */, int64_t n) {
  const Dropout given = dropout;
  uint32_t words[4][kDropoutLanes];
  for (int64_t begin = 0; begin < n; begin += 4 * kDropoutLanes) {
    const uint32_t quad = uint32_t((first + begin) / 4);
#pragma omp simd
    for (int32_t lane = 0; lane < kDropoutLanes; ++lane) {
      uint32_t out[4];
      const uint32_t counter = quad + uint32_t(lane);
      philox4x32(uint32_t(slot), 0, counter, given.stream, given.key[0], given.key[1], out);
      for (int w = 0; w < 4; ++w) words[w][lane] = out[w];
    }
    const int64_t count = n - begin < 4 * kDropoutLanes ? n - begin : 4 * kDropoutLanes;
    for (int64_t i = 0; i < count; ++i)
      row[begin + i] *= words[i % 4][i / 4] >= given.threshold ? given.scale : 0.0f;
  }
}

// The same for a tile with a slot per column: its row r is column first + r of each slot.
inline void dropout_columns_kernel(
    const Dropout& dropout,
    const int32_t* slots /* [columns] */,
    int64_t first,
    float* tile /* [rows, columns] */,
    int64_t rows,
    int64_t columns /* a multiple of 16 */) {
  const Dropout given = dropout;
  uint32_t words[4][kDropoutLanes];
  for (int64_t r = 0; r < rows; r += 4) {
    const uint32_t quad = uint32_t((first + r) / 4);
    for (int64_t begin = 0; begin < columns; begin += kDropoutLanes) {
#pragma omp simd
      for (int32_t lane = 0; lane < kDropoutLanes; ++lane) {
        uint32_t out[4];
        const uint32_t slot = uint32_t(slots[begin + lane]);
        philox4x32(slot, 0, quad, given.stream, given.key[0], given.key[1], out);
        for (int w = 0; w < 4; ++w) words[w][lane] = out[w];
      }
      for (int64_t w = 0; w < 4 && r + w < rows; ++w) {
        float* const row = tile + (r + w) * columns + begin;
#pragma omp simd
        for (int32_t lane = 0; lane < kDropoutLanes; ++lane)
          row[lane] *= words[w][lane] >= given.threshold ? given.scale : 0.0f;
      }
    }
  }
}

}  // namespace
}  // namespace m2ae::cpu
