// The loops of ema_update_. Contract and math: m2ae_kernels/ops/ema_update.py
//
// One call owns n consecutive elements. Arithmetic is that of torch's lerp, fused multiply-add
// included, so that equal dtypes give equal bits. Included by isa_*.cpp only, after <cmath>.
#pragma once

#include "convert.h"
#include "multiply_add.h"

namespace m2ae::cpu {
namespace {

template <typename target_t, typename source_t>
void ema_update_kernel(
    void* target /* [n] */, const void* source /* [n] */, int64_t n, double weight) {
  constexpr bool kDouble = std::is_same_v<target_t, double> || std::is_same_v<source_t, double>;
  using acc_t = std::conditional_t<kDouble, double, float>;
  auto* const t = static_cast<target_t*>(target);
  const auto* const s = static_cast<const source_t*>(source);
  const acc_t w = acc_t(weight);
  if (w < acc_t(0.5)) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const acc_t old = convert<acc_t>(t[i]);
      t[i] = convert<target_t>(multiply_add(w, convert<acc_t>(s[i]) - old, old));
    }
  } else {
    const acc_t minus_decay = w - acc_t(1);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const acc_t end = convert<acc_t>(s[i]);
      t[i] = convert<target_t>(multiply_add(minus_decay, end - convert<acc_t>(t[i]), end));
    }
  }
}

template <typename from_t, typename to_t>
void cast_kernel(const void* from /* [n] */, void* to /* [n] */, int64_t n) {
  const auto* const x = static_cast<const from_t*>(from);
  auto* const y = static_cast<to_t*>(to);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = convert<to_t>(x[i]);
}

}  // namespace
}  // namespace m2ae::cpu
