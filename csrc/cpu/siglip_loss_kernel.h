// The loops of siglip_loss over one tile. What is computed: siglip_loss_tile.h
//
// The error z of an entry is its logit with the sign that is wrong: -l of a positive, l of another.
// Its loss is softplus(z) = max(z, 0) + log1p(t), its derivative sigma(z) = t / (1 + t) for z < 0
// and 1 / (1 + t) otherwise, both with t = exp(-|z|), which is never taken away from 1.
// Rows of a tile are summed in float32, over 256 entries at most, tiles in double. Included by
// isa_*.cpp only.
#pragma once

#include "contrastive_logits.h"
#include "siglip_loss_tile.h"

namespace m2ae::cpu {
namespace {

struct SiglipEntry {
  float loss, derivative;  // by z
};

// exp(x) for x <= 0; 0 below 2^-126.
inline float exp_of_negative(float x) {
  constexpr float kLowest = -87.3f;
  const Factor log2_e(1.4426950408889634);
  const float result = exp2_of_product(x < kLowest ? kLowest : x, log2_e, 127u);  // NaN stays
  return x < kLowest ? 0.0f : result;
}

// log(1 + t) = 2 atanh(r), r = t / (2 + t), for t in [0, 1]; relative error 2e-8 before rounding.
// What is added to r keeps its square out of the subnormal numbers, which processors are slow at.
inline float log1p_by_ratio(float r) {
  const float shifted = r + 1e-15f, s = shifted * shifted;
  float p = 0x1.12f598p-3f;
  p = multiply_add(p, s, 0x1.21249ap-3f);
  p = multiply_add(p, s, 0x1.99ad6cp-3f);
  p = multiply_add(p, s, 0x1.55554cp-2f);
  return (r + r) * multiply_add(p, s, 1.0f);
}

template <bool derivative>
inline SiglipEntry siglip_entry(float z) {
  const float t = exp_of_negative(-std::fabs(z));
  const float positive_part = z < 0 ? 0.0f : z;  // NaN stays
  if constexpr (!derivative) return {positive_part + log1p_by_ratio(t / (2.0f + t)), 0};
  // One division for both ratios.
  const float one = 1.0f + t, two = 2.0f + t, inverse = 1.0f / (one * two);
  const float numerator = z < 0 ? t : 1.0f;
  return {positive_part + log1p_by_ratio(t * one * inverse), numerator * two * inverse};
}

// Adds row r to the sums, and writes w times the derivatives by its logits if it `writes`.
template <Operand operand, int same_id, bool gradient, bool writes>
inline void siglip_row(
    const LogitTile& tile,
    const SiglipTile& given,
    int64_t r,
    float* out /* [columns], may be the row's products */) {
  constexpr bool kFactors = operand != Operand::kFloat32;
  const float* const products = tile.products + r * tile.ld;
  const float scale = given.scale, bias = given.bias;
  const float row_factor = kFactors ? tile.row_factor[r] : 1.0f;
  const float weight = gradient ? given.weight[r] : 0.0f;
  const int32_t columns = int32_t(tile.columns), target = int32_t(target_in(tile, r));
  const int32_t id = same_id == kSameIdNegative ? 0 : tile.row_id[r];
  const float* const column_factor = tile.column_factor;
  const int32_t* const column_id = tile.column_id;
  const auto product_at = [=](int32_t n) {
    if constexpr (!kFactors) return products[n];
    return products[n] * (row_factor * column_factor[n]);
  };
  float by_target = 0;
  const bool is_apart = gradient && given.by_target != nullptr && target >= 0;
  if (is_apart) {
    const float logit = multiply_add(scale, product_at(target), bias);
    by_target = -weight * siglip_entry<true>(-logit).derivative;
  }

  float loss = 0, by_scale = 0, by_bias = 0;
#pragma omp simd reduction(+ : loss, by_scale, by_bias)
  for (int32_t n = 0; n < columns; ++n) {
    const float product = product_at(n);
    const float logit = multiply_add(scale, product, bias);
    bool is_positive = n == target, is_absent = false;
    if constexpr (same_id == kSameIdPositive) is_positive = is_positive | (column_id[n] == id);
    if constexpr (same_id == kSameIdAbsent) is_absent = !is_positive & (column_id[n] == id);
    const SiglipEntry entry = siglip_entry<gradient>(is_positive ? -logit : logit);
    loss += is_absent ? 0.0f : entry.loss;
    if constexpr (gradient) {
      const float with_sign = is_positive ? -entry.derivative : entry.derivative;
      const float by_logit = is_absent ? 0.0f : with_sign;
      by_bias += by_logit;
      by_scale += by_logit * product;
      if constexpr (writes) out[n] = weight * by_logit;
    }
  }
  given.loss[r] += double(loss);
  if constexpr (gradient) {
    *given.by_bias += double(weight) * double(by_bias);
    *given.by_scale += double(weight) * double(by_scale);
    if (!is_apart) return;
    given.by_target[r] = by_target;
    if constexpr (writes) out[target] = 0;
  }
}

// The two arguments are not used: the loss alone.
template <Operand operand, int same_id>
void siglip_loss_kernel(const LogitTile& tile, const SiglipTile& given, void*, void*) {
  for (int64_t r = 0; r < tile.rows; ++r)
    siglip_row<operand, same_id, false, false>(tile, given, r, nullptr);
}

template <Operand operand, int same_id>
void siglip_gradient_kernel(
    const LogitTile& tile, const SiglipTile& given, void* gradient_a, void* gradient_b) {
  if (gradient_a == nullptr) {
    for (int64_t r = 0; r < tile.rows; ++r)
      siglip_row<operand, same_id, true, false>(tile, given, r, nullptr);
    return;
  }
  write_gradient_tile<operand>(tile, gradient_a, gradient_b, [&](int64_t r, float* out) {
    siglip_row<operand, same_id, true, true>(tile, given, r, out);
  });
}

// to <- factor * from
template <typename element_t>
void siglip_scale_kernel(const float* from /* [n] */, float factor, int64_t n, void* to /* [n] */) {
  auto* const y = static_cast<element_t*>(to);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = convert<element_t>(factor * from[i]);
}

}  // namespace
}  // namespace m2ae::cpu
