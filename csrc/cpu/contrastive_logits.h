// From the products of a tile to its logits, for the loops of the contrastive losses. Included by
// kernels only.
#pragma once

#include "contrastive_tile.h"
#include "exp2.h"
#include "gemm.h"

// A function of one simd loop, on its own: g++ may copy an inlined one, and then leaves one of the
// copies scalar.
#define M2AE_LOOP [[gnu::noinline, maybe_unused]]

namespace m2ae::cpu {
namespace {

// Column in the tile of row r's target, or -1.
inline int64_t target_in(const LogitTile& tile, int64_t r) {
  const int64_t n = int64_t(tile.target[r]) - tile.first_column;
  return tile.target[r] >= 0 && n >= 0 && n < tile.columns ? n : -1;
}

inline int64_t self_in(const LogitTile& tile, int64_t r) {
  if (tile.self == nullptr || tile.self[r] < 0) return -1;
  const int64_t n = int64_t(tile.self[r]) - tile.first_column;
  return n >= 0 && n < tile.columns ? n : -1;
}

// Puts `value` where row r has its target or itself.
inline void leave_out(const LogitTile& tile, int64_t r, float value, float* row /* [columns] */) {
  const int64_t target = target_in(tile, r), self = self_in(tile, r);
  if (target >= 0) row[target] = value;
  if (self >= 0) row[self] = value;
}

// The products x_i . y_j of row r, but for the factor of the row.
template <Operand operand>
class ProductsOfRow {
 public:
  ProductsOfRow(const LogitTile& tile, int64_t r)
      : products_(tile.products + r * tile.ld), factors_(tile.column_factor) {}

  float operator[](int64_t n) const {
    if constexpr (operand == Operand::kFloat32) return products_[n];
    return products_[n] * factors_[n];
  }

 private:
  const float *products_, *factors_;
};

// The factor of row r times `scale`.
template <Operand operand>
inline double factor_of_row(const LogitTile& tile, int64_t r, double scale = 1) {
  if constexpr (operand == Operand::kFloat32) return scale;
  return scale * double(tile.row_factor[r]);
}

// Writes the gradient of a tile for its two products, row by row: make(r, gradient) gives that by
// the logits of row r, [columns], where `gradient` may lie on the row's products. Of bfloat16 it is
// multiplied with the factors here, as products have packed rows. Padding becomes 0.
template <Operand operand, typename Make>
inline void write_gradient_tile(
    const LogitTile& tile, void* gradient_a, void* gradient_b, const Make& make) {
  const int64_t width = tile.padded_columns, ld = tile.gradient_ld;
  if constexpr (operand == Operand::kFloat32) {
    auto* const g = static_cast<float*>(gradient_a);
    for (int64_t r = 0; r < tile.padded_rows; ++r) {
      float* const row = g + r * ld;
      if (r < tile.rows) make(r, row);
      const int64_t from = r < tile.rows ? tile.columns : 0;
      std::memset(row + from, 0, (width - from) * sizeof(float));
    }
  } else {
    auto* const a = static_cast<uint16_t*>(gradient_a);
    auto* const b = static_cast<uint32_t*>(gradient_b);
    alignas(64) float rows[2][kLargestTile];
    for (int64_t r = 0; r < tile.padded_rows; r += 2) {
      for (int64_t s = 0; s < 2; ++s) {
        const int64_t from = r + s < tile.rows ? tile.columns : 0;
        if (from != 0) {
          make(r + s, rows[s]);
          const float factor = tile.row_factor[r + s];
#pragma omp simd
          for (int64_t n = 0; n < tile.columns; ++n) rows[s][n] *= factor * tile.column_factor[n];
        }
        std::memset(rows[s] + from, 0, (width - from) * sizeof(float));
      }
#pragma omp simd
      for (int64_t n = 0; n < width; ++n) {
        const uint32_t first = narrow_to_bfloat16(rows[0][n]).x;
        const uint32_t second = narrow_to_bfloat16(rows[1][n]).x;
        a[r * ld + n] = uint16_t(first);
        a[(r + 1) * ld + n] = uint16_t(second);
        b[r / 2 * ld + n] = first | second << 16;
      }
    }
  }
}

}  // namespace
}  // namespace m2ae::cpu
