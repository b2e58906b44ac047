// The loops of moe_unpermute, and of the backward of moe_permute. Contract and math:
// m2ae_kernels/ops/moe_unpermute.py
//
// One call owns one row. Sums are in float32, in blocks that stay in the first-level cache, four
// rows at a time so that four reads of memory are under way. Included by isa_*.cpp only.
#pragma once

#include "convert.h"
#include "multiply_add.h"

namespace m2ae::cpu {
namespace {

constexpr int64_t kCombineBlock = 512;

// out = residual + sum_j weights[j] * rows[j], in this order; nullptr: no residual, weights of 1.
template <typename element_t>
void moe_combine_kernel(
    const void* const* rows,  // [count], each [D]
    const float* weights,     // [count]
    int64_t count,
    const void* residual,  // [D]
    int64_t D,
    void* out /* [D] */) {
  alignas(64) float sum[kCombineBlock];
  for (int64_t begin = 0; begin < D; begin += kCombineBlock) {
    const int64_t n = std::min(kCombineBlock, D - begin);
    const auto row = [&](int64_t j) { return static_cast<const element_t*>(rows[j]) + begin; };
    const auto weight = [&](int64_t j) { return weights == nullptr ? 1.0f : weights[j]; };
    if (residual != nullptr) {
      const auto* const from = static_cast<const element_t*>(residual) + begin;
#pragma omp simd
      for (int64_t d = 0; d < n; ++d) sum[d] = convert<float>(from[d]);
    } else {
#pragma omp simd
      for (int64_t d = 0; d < n; ++d) sum[d] = 0;
    }
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
      const element_t *const r0 = row(j), *const r1 = row(j + 1), *const r2 = row(j + 2),
                             *const r3 = row(j + 3);
      const float w0 = weight(j), w1 = weight(j + 1), w2 = weight(j + 2), w3 = weight(j + 3);
#pragma omp simd
      for (int64_t d = 0; d < n; ++d) {
        float s = multiply_add(w0, convert<float>(r0[d]), sum[d]);
        s = multiply_add(w1, convert<float>(r1[d]), s);
        s = multiply_add(w2, convert<float>(r2[d]), s);
        sum[d] = multiply_add(w3, convert<float>(r3[d]), s);
      }
    }
    for (; j < count; ++j) {
      const element_t* const r = row(j);
      const float w = weight(j);
#pragma omp simd
      for (int64_t d = 0; d < n; ++d) sum[d] = multiply_add(w, convert<float>(r[d]), sum[d]);
    }
    auto* const to = static_cast<element_t*>(out) + begin;
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) to[d] = convert<element_t>(sum[d]);
  }
}

// out = weight * row.
template <typename element_t>
void moe_scale_kernel(const void* row /* [D] */, float weight, int64_t D, void* out /* [D] */) {
  const auto* const from = static_cast<const element_t*>(row);
  auto* const to = static_cast<element_t*>(out);
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) to[d] = convert<element_t>(weight * convert<float>(from[d]));
}

// <a, b> in 64 partial sums: one order whatever the instruction set's width, and enough of them to
// hide the latency of an addition.
template <typename element_t>
float moe_dot_kernel(const void* a /* [D] */, const void* b /* [D] */, int64_t D) {
  constexpr int64_t kLanes = 64;
  const auto* const x = static_cast<const element_t*>(a);
  const auto* const y = static_cast<const element_t*>(b);
  alignas(64) float sum[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l)
      sum[l] = multiply_add(convert<float>(x[d + l]), convert<float>(y[d + l]), sum[l]);
  }
  for (int64_t l = 0; d + l < D; ++l)
    sum[l] = multiply_add(convert<float>(x[d + l]), convert<float>(y[d + l]), sum[l]);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) sum[l] += sum[l + half];
  return sum[0];
}

}  // namespace
}  // namespace m2ae::cpu
