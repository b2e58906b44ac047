// How many negatives a row or a column has above its target.
#pragma once

#include "contrastive_tiles.h"

namespace m2ae::cpu {

// Logits are compared as products, and those of the targets are products of the same kind: a row
// that is equal to the target is never above it. Each worker counts on its own.
class NceRanks {
 public:
  NceRanks(
      const TileGrid& grid,
      const ContrastivePairs& pairs,
      const PackedRows& x,
      const PackedRows& y,
      bool symmetric,
      double scale);

  void add(const LogitTile& logits, const Tile& tile, const TileWalk& walk) const;
  // After all tiles.
  int64_t of_row(int64_t i) const;
  int64_t of_column(int64_t j) const;

 private:
  void find_thresholds();

  const TileGrid& grid_;
  const ContrastivePairs& pairs_;
  const PackedRows &x_, &y_;
  float sign_;  // of the scale
  // Products times the sign, and times factors, but for that of the row or column itself.
  Buffer<float> row_threshold_, column_threshold_;
  Buffer<int32_t> row_rank_;     // [column groups, n]
  Buffer<int32_t> column_rank_;  // [row groups, m], or empty
};

}  // namespace m2ae::cpu
