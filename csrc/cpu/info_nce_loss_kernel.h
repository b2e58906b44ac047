// The loops of info_nce_loss, forward: sums of powers over rows and columns of a tile, and ranks.
// What is computed: info_nce_loss_tile.h. Rows of one tile are summed in float32, over 256 entries
// at most, and tiles in double. Included by isa_*.cpp only, after <cmath>.
#pragma once

#include "contrastive_logits.h"
#include "info_nce_loss_tile.h"

namespace m2ae::cpu {
namespace {

// exponents = t - shift of row r.
template <Operand operand>
M2AE_LOOP void nce_exponents(
    const LogitTile& tile, const NceScale& scale, int64_t r, float shift, float* exponents) {
  const ProductsOfRow<operand> products(tile, r);
  const Factor factor(factor_of_row<operand>(tile, r, scale.scale));
#pragma omp simd
  for (int64_t n = 0; n < tile.columns; ++n)
    exponents[n] = product_minus_far(products[n], factor, shift);
}

// powers = 2^(t - reference) of row r.
template <Operand operand>
M2AE_LOOP void nce_powers(const LogitTile& tile, const NceScale& scale, int64_t r, float* powers) {
  const ProductsOfRow<operand> products(tile, r);
  const Factor factor(factor_of_row<operand>(tile, r, scale.scale));
  const uint32_t bias = uint32_t(127 - scale.reference);
#pragma omp simd
  for (int64_t n = 0; n < tile.columns; ++n) powers[n] = exp2_of_product(products[n], factor, bias);
}

// Puts `value` where the id is that of row r (or is not, if `same` is false).
M2AE_LOOP void replace_by_id(const LogitTile& tile, int64_t r, bool same, float value, float* row) {
  const int32_t id = tile.row_id[r];
#pragma omp simd
  for (int64_t n = 0; n < tile.columns; ++n)
    row[n] = (tile.column_id[n] == id) == same ? value : row[n];
}

// Adds the positives of row r to the sums: their powers, which are 0 elsewhere, their logits, and
// their number. `is_positive(n)` tells which they are.
template <typename IsPositive>
inline void nce_add_logits(
    const LogitTile& tile,
    int64_t r,
    const float* exponents,
    const NceSums& rows,
    const NceSums& columns,
    const IsPositive& is_positive) {
  double sum = 0, count = 0;
  for (int64_t n = 0; n < tile.columns; ++n) {
    if (!is_positive(n)) continue;
    sum += exponents[n];
    count += 1;
    if (columns.negative == nullptr) continue;
    columns.logits[n] += exponents[n];
    columns.count[n] += 1;
  }
  rows.logits[r] += sum;
  rows.count[r] += count;
}

// Moves the positives of row r out of its powers, into the sums of positives.
template <Operand operand>
inline void nce_positives(
    const LogitTile& tile,
    const NceScale& scale,
    int64_t r,
    const NceSums& rows,
    const NceSums& columns,
    float* powers) {
  float exponents[kLargestTile];
  nce_exponents<operand>(tile, scale, r, 0, exponents);
  // What was left out is 0 and stays so: other powers are at least 2^-126.
  const auto is_positive = [&](int64_t n) {
    return tile.column_id[n] == tile.row_id[r] && powers[n] != 0;
  };
  nce_add_logits(tile, r, exponents, rows, columns, is_positive);
  double sum = 0;
  for (int64_t n = 0; n < tile.columns; ++n) {
    if (!is_positive(n)) continue;
    sum += double(powers[n]);
    if (columns.negative != nullptr) columns.positive[n] += double(powers[n]);
    powers[n] = 0;
  }
  rows.positive[r] += sum;
}

template <Operand operand, int same_id>
void nce_sums_kernel(
    const LogitTile& tile, const NceScale& scale, const NceSums& rows, const NceSums& columns) {
  constexpr int kRows = 4;  // at once: a fourth of the traffic for the sums of columns
  alignas(64) float powers[kRows][kLargestTile], column_sums[kLargestTile] = {};
  const int64_t width = tile.columns;
  for (int64_t first = 0; first < tile.rows; first += kRows) {
    for (int64_t a = 0; a < kRows; ++a) {
      const int64_t r = first + a;
      if (r >= tile.rows) {
        std::memset(powers[a], 0, sizeof powers[a]);
        continue;
      }
      nce_powers<operand>(tile, scale, r, powers[a]);
      leave_out(tile, r, 0, powers[a]);
      if constexpr (same_id == kSameIdAbsent) replace_by_id(tile, r, true, 0, powers[a]);
      if constexpr (same_id == kSameIdPositive)
        nce_positives<operand>(tile, scale, r, rows, columns, powers[a]);
    }
    float sum_0 = 0, sum_1 = 0, sum_2 = 0, sum_3 = 0;
#pragma omp simd reduction(+ : sum_0, sum_1, sum_2, sum_3)
    for (int64_t n = 0; n < width; ++n) {
      const float a = powers[0][n], b = powers[1][n], c = powers[2][n], d = powers[3][n];
      sum_0 += a;
      sum_1 += b;
      sum_2 += c;
      sum_3 += d;
      column_sums[n] += (a + b) + (c + d);
    }
    const float sums[kRows] = {sum_0, sum_1, sum_2, sum_3};
    for (int64_t a = 0; a < kRows && first + a < tile.rows; ++a)
      rows.negative[first + a] += double(sums[a]);
  }
  if (columns.negative == nullptr) return;
#pragma omp simd
  for (int64_t n = 0; n < width; ++n) columns.negative[n] += double(column_sums[n]);
}

// The exponents of row r, with -inf for all but the negatives, or all but the positives by id.
template <Operand operand, int same_id, bool positives>
inline void nce_exponents_of(
    const LogitTile& tile, const NceScale& scale, int64_t r, float shift, float* exponents) {
  nce_exponents<operand>(tile, scale, r, shift, exponents);
  leave_out(tile, r, -INFINITY, exponents);
  if constexpr (same_id != kSameIdNegative)
    replace_by_id(tile, r, !positives, -INFINITY, exponents);
}

// Moves a sum of powers to a reference that is not smaller.
inline void nce_rescale(double* sum, float* reference, float to) {
  if (*reference == to) return;
  if (*sum != 0) *sum *= double(exp2_of(*reference - to));
  *reference = to;
}

inline float nce_shift(float reference) {
  return reference == -INFINITY ? 0.0f : reference;
}

template <Operand operand, int same_id, bool positives>
inline void nce_robust_sums(
    const LogitTile& tile, const NceScale& scale, const NceSums& rows, const NceSums& columns) {
  double* const row_sum = positives ? rows.positive : rows.negative;
  float* const row_reference = positives ? rows.positive_reference : rows.negative_reference;
  double* const column_sum = positives ? columns.positive : columns.negative;
  float* const column_reference =
      positives ? columns.positive_reference : columns.negative_reference;
  const bool has_columns = columns.negative != nullptr;
  const int64_t width = tile.columns;
  alignas(64) float exponents[kLargestTile], shifts[kLargestTile], sums[kLargestTile] = {};
  alignas(64) float most[kLargestTile];
  for (int64_t n = 0; n < width; ++n) most[n] = -INFINITY;
  for (int64_t r = 0; r < tile.rows; ++r) {
    nce_exponents_of<operand, same_id, positives>(tile, scale, r, 0, exponents);
    float highest = row_reference[r];
#pragma omp simd reduction(max : highest)
    for (int64_t n = 0; n < width; ++n) {
      highest = exponents[n] > highest ? exponents[n] : highest;
      most[n] = exponents[n] > most[n] ? exponents[n] : most[n];
    }
    nce_rescale(&row_sum[r], &row_reference[r], highest);
    if constexpr (positives) {
      const auto is_positive = [&](int64_t n) { return exponents[n] != -INFINITY; };
      nce_add_logits(tile, r, exponents, rows, columns, is_positive);
    }
  }
  for (int64_t n = 0; has_columns && n < width; ++n) {
    nce_rescale(&column_sum[n], &column_reference[n], std::fmax(column_reference[n], most[n]));
    shifts[n] = nce_shift(column_reference[n]);
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float shift = nce_shift(row_reference[r]);
    nce_exponents_of<operand, same_id, positives>(tile, scale, r, shift, exponents);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t n = 0; n < width; ++n) sum += exp2_of(exponents[n]);
    row_sum[r] += double(sum);
    if (!has_columns) continue;
    // From the row's reference to the column's without rounding the exponent itself.
    const ProductsOfRow<operand> products(tile, r);
    const Factor factor(factor_of_row<operand>(tile, r, scale.scale));
#pragma omp simd
    for (int64_t n = 0; n < width; ++n) {
      const float product = products[n];
      const float power = exp2_of(product_minus_far(product, factor, shifts[n]));
      sums[n] += exponents[n] == -INFINITY ? 0.0f : power;
    }
  }
  for (int64_t n = 0; has_columns && n < width; ++n) column_sum[n] += double(sums[n]);
}

template <Operand operand, int same_id>
void nce_robust_sums_kernel(
    const LogitTile& tile, const NceScale& scale, const NceSums& rows, const NceSums& columns) {
  nce_robust_sums<operand, same_id, false>(tile, scale, rows, columns);
  if constexpr (same_id == kSameIdPositive)
    nce_robust_sums<operand, same_id, true>(tile, scale, rows, columns);
}

template <Operand operand, int same_id>
void nce_ranks_kernel(
    const LogitTile& tile,
    float sign,
    const float* row_threshold,
    const float* column_threshold,
    int32_t* row_rank,
    int32_t* column_rank) {
  float values[kLargestTile];
  for (int64_t r = 0; r < tile.rows; ++r) {
    const ProductsOfRow<operand> products(tile, r);
#pragma omp simd
    for (int64_t n = 0; n < tile.columns; ++n) values[n] = sign * products[n];
    leave_out(tile, r, -INFINITY, values);
    if constexpr (same_id != kSameIdNegative) replace_by_id(tile, r, true, -INFINITY, values);
    int32_t ahead = 0;
    const float threshold = row_threshold[r];
#pragma omp simd reduction(+ : ahead)
    for (int64_t n = 0; n < tile.columns; ++n) ahead += values[n] > threshold ? 1 : 0;
    row_rank[r] += ahead;
    if (column_rank == nullptr) continue;
    const float* const without_factors = tile.products + r * tile.ld;
    const float factor = sign * float(factor_of_row<operand>(tile, r));
#pragma omp simd
    for (int64_t n = 0; n < tile.columns; ++n) {
      const bool is_ahead = without_factors[n] * factor > column_threshold[n];
      column_rank[n] += is_ahead && values[n] != -INFINITY ? 1 : 0;
    }
  }
}

}  // namespace
}  // namespace m2ae::cpu
