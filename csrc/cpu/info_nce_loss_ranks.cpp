#include "info_nce_loss_ranks.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"

namespace m2ae::cpu {

NceRanks::NceRanks(
    const TileGrid& grid,
    const ContrastivePairs& pairs,
    const PackedRows& x,
    const PackedRows& y,
    bool symmetric,
    double scale)
    : grid_(grid),
      pairs_(pairs),
      x_(x),
      y_(y),
      sign_(
          scale > 0   ? 1.0f
          : scale < 0 ? -1.0f
                      : 0.0f),
      row_threshold_(grid.rows),
      column_threshold_(grid.columns),
      row_rank_(grid.rows * grid.column_groups),
      column_rank_(symmetric ? grid.columns * grid.row_groups : 0) {
  std::fill_n(row_threshold_.data(), row_threshold_.size(), 0.0f);
  std::fill_n(column_threshold_.data(), column_threshold_.size(), -INFINITY);
  std::fill_n(row_rank_.data(), row_rank_.size(), 0);
  std::fill_n(column_rank_.data(), column_rank_.size(), 0);
  find_thresholds();
}

// The products of a tile of queries with the keys of their targets, gathered; those wanted are on
// its diagonal.
void NceRanks::find_thresholds() {
  const Operand operand = x_.operand();
  const int64_t depth = x_.depth(), row_bytes = depth * bytes_of(operand), tile = grid_.row_tile;
  const int64_t units = row_bytes / 4;  // of bfloat16, pairs
  const Buffer<char> keys(tile * row_bytes), transposed(tile * row_bytes);
  const Buffer<float> products(tile * tile);
  for (int64_t begin = 0; begin < grid_.rows; begin += tile) {
    const int64_t rows = std::min(tile, grid_.rows - begin), height = padded(rows, kPadding);
    std::memset(keys.data(), 0, height * row_bytes);
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t j = pairs_.target[begin + r];
      if (j >= 0) std::memcpy(keys.data() + r * row_bytes, y_.rows(j), row_bytes);
    }
    kernels().transpose32(keys.data(), units, height, units, transposed.data(), tile);
    multiply_rows(
        operand,
        height,
        height,
        depth,
        x_.rows(begin),
        transposed.data(),
        tile,
        products.data(),
        tile);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = begin + r, j = pairs_.target[i];
      if (j < 0) continue;
      const float product = products[r * tile + r];
      row_threshold_[i] = sign_ * (product * y_.factor(j));
      column_threshold_[j] = std::max(column_threshold_[j], product * (sign_ * x_.factor(i)));
    }
  }
  gemm_release(operand);
}

void NceRanks::add(const LogitTile& logits, const Tile& tile, const TileWalk& walk) const {
  int32_t* const of_columns =
      column_rank_.size() == 0
          ? nullptr
          : column_rank_.data() + walk.row_group() * grid_.columns + tile.column;
  kernels().nce_ranks[int(x_.operand())][pairs_.same_id](
      logits,
      sign_,
      row_threshold_.data() + tile.row,
      column_threshold_.data() + tile.column,
      row_rank_.data() + walk.column_group() * grid_.rows + tile.row,
      of_columns);
}

int64_t NceRanks::of_row(int64_t i) const {
  int64_t rank = 0;
  for (int64_t g = 0; g < grid_.column_groups; ++g) rank += row_rank_[g * grid_.rows + i];
  return rank;
}

int64_t NceRanks::of_column(int64_t j) const {
  int64_t rank = 0;
  for (int64_t g = 0; g < grid_.row_groups; ++g) rank += column_rank_[g * grid_.columns + j];
  return rank;
}

}  // namespace m2ae::cpu
