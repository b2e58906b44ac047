// The loops of info_nce_loss, backward: from the logits of a tile to the gradient by them.
// What is computed: info_nce_loss_tile.h. Included by isa_*.cpp only, after <cmath>.
#pragma once

#include "contrastive_logits.h"
#include "info_nce_loss_tile.h"

namespace m2ae::cpu {
namespace {

// What entry i of a direction gets for a positive; power = 2^(t - reference), or 2^(t - pos).
inline float nce_positive_share(const NceShares& of, int64_t i, float power) {
  const float r = of.single[i] + of.positive[i] * power;
  return of.weight[i] * ((r - of.inverse_count[i]) - r * of.sigma[i]);
}

// The gradient by the logits of row r, but that targets and the row itself are not left out; these
// are what the target's entry would get.
template <Operand operand, int same_id>
M2AE_LOOP float nce_gradient_row(
    const LogitTile& tile,
    const NceScale& scale,
    int64_t r,
    const NceShares& rows,
    const NceShares& columns,
    float* gradient /* [columns] */) {
  const ProductsOfRow<operand> products(tile, r);
  const Factor factor(factor_of_row<operand>(tile, r, scale.scale));
  const uint32_t bias = uint32_t(127 - scale.reference);
  const auto power_of = [=, &tile](int64_t n) {
    return exp2_of_product(products[n], factor, bias);
  };
  const float of_row = rows.negative[r];
  if constexpr (same_id == kSameIdNegative) {
#pragma omp simd
    for (int64_t n = 0; n < tile.columns; ++n)
      gradient[n] = power_of(n) * (of_row + columns.negative[n]);
    return 0;
  }
  const int32_t id = tile.row_id[r];
  const auto positive = [&](int64_t n, float power) {
    return nce_positive_share(rows, r, power) + nce_positive_share(columns, n, power);
  };
#pragma omp simd
  for (int64_t n = 0; n < tile.columns; ++n) {
    const float power = power_of(n), negative = power * (of_row + columns.negative[n]);
    float of_same = 0;
    if constexpr (same_id == kSameIdPositive) of_same = positive(n, power);
    gradient[n] = tile.column_id[n] == id ? of_same : negative;
  }
  if constexpr (same_id != kSameIdPositive) return 0;
  const int64_t target = target_in(tile, r);
  return target < 0 ? 0 : positive(target, power_of(target));
}

// The same with references of rows and columns of their own.
template <Operand operand, int same_id>
M2AE_LOOP float nce_robust_gradient_row(
    const LogitTile& tile,
    const NceScale& scale,
    int64_t r,
    const NceShares& rows,
    const NceShares& columns,
    float* gradient) {
  const ProductsOfRow<operand> products(tile, r);
  const Factor factor(factor_of_row<operand>(tile, r, scale.scale));
  const auto power_of = [&](int64_t n, float shift) {
    return exp2_of(product_minus_far(products[n], factor, shift));
  };
  const auto positive = [&](int64_t n) {
    return nce_positive_share(rows, r, power_of(n, rows.pos[r])) +
           nce_positive_share(columns, n, power_of(n, columns.pos[n]));
  };
#pragma omp simd
  for (int64_t n = 0; n < tile.columns; ++n) {
    float value = rows.negative[r] * power_of(n, rows.lse[r]) +
                  columns.negative[n] * power_of(n, columns.lse[n]);
    if constexpr (same_id == kSameIdPositive)
      value = tile.column_id[n] == tile.row_id[r] ? positive(n) : value;
    if constexpr (same_id == kSameIdAbsent)
      value = tile.column_id[n] == tile.row_id[r] ? 0.0f : value;
    gradient[n] = value;
  }
  if constexpr (same_id != kSameIdPositive) return 0;
  const int64_t target = target_in(tile, r);
  return target < 0 ? 0 : positive(target);
}

// Writes the finished row, which may take the place of the row's products; returns the sum of its
// products with them, but for the factor of the row.
template <Operand operand>
M2AE_LOOP float nce_write_row(
    const LogitTile& tile, int64_t r, const float* row /* [columns] */, float* gradient) {
  const ProductsOfRow<operand> products(tile, r);
  const int64_t columns = tile.columns;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t n = 0; n < columns; ++n) {
    // What is left out is 0, and may have an infinite product.
    float product = products[n];
    product = product > 3e38f ? 3e38f : product;
    product = product < -3e38f ? -3e38f : product;
    sum += row[n] * product;
    gradient[n] = row[n];
  }
  return sum;
}

// make_row as the two above.
template <Operand operand, typename MakeRow>
inline double nce_gradient_tile(
    const LogitTile& tile, void* gradient_a, void* gradient_b, const MakeRow& make_row) {
  constexpr int64_t kAhead = 4;  // rows
  double by_scale = 0;
  write_gradient_tile<operand>(tile, gradient_a, gradient_b, [&](int64_t r, float* gradient) {
    alignas(64) float row[kLargestTile];
    // Kept products come from memory, in pieces too short to be foreseen.
    if (tile.ld != tile.gradient_ld && r + kAhead < tile.rows)
      for (int64_t n = 0; n < tile.columns; n += 16)
        __builtin_prefetch(tile.products + (r + kAhead) * tile.ld + n);
    const float at_target = make_row(r, row);
    const int64_t target = target_in(tile, r), self = self_in(tile, r);
    if (target >= 0) row[target] = at_target;
    if (self >= 0) row[self] = 0;
    const double factor = factor_of_row<operand>(tile, r);
    by_scale += factor * double(nce_write_row<operand>(tile, r, row, gradient));
  });
  return by_scale;
}

template <Operand operand, int same_id>
double nce_gradient_kernel(
    const LogitTile& tile,
    const NceScale& scale,
    const NceShares& rows,
    const NceShares& columns,
    void* gradient_a,
    void* gradient_b) {
  return nce_gradient_tile<operand>(tile, gradient_a, gradient_b, [&](int64_t r, float* row) {
    return nce_gradient_row<operand, same_id>(tile, scale, r, rows, columns, row);
  });
}

template <Operand operand, int same_id>
double nce_robust_gradient_kernel(
    const LogitTile& tile,
    const NceScale& scale,
    const NceShares& rows,
    const NceShares& columns,
    void* gradient_a,
    void* gradient_b) {
  return nce_gradient_tile<operand>(tile, gradient_a, gradient_b, [&](int64_t r, float* row) {
    return nce_robust_gradient_row<operand, same_id>(tile, scale, r, rows, columns, row);
  });
}

}  // namespace
}  // namespace m2ae::cpu
