// The n x m matrix of a contrastive loss, tile by tile, shared out to workers; never as a whole.
//
// Workers form a grid of row groups and column groups; each walks the tiles of its rows and its
// columns, row by row. What it adds up, it adds up alone and in that order, and sums of several
// workers are added in the order of their groups, so results depend on the number of workers only.
// Up to 8 workers all split the rows; more form a square, so that copies of the gradient sums
// number 9 at most for 8 workers, and twice the root of the workers beyond.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "contrastive_rows.h"
#include "contrastive_tile.h"

namespace m2ae::cpu {

struct TileGrid {
  int64_t rows = 0, columns = 0;  // n and m
  // Size of a tile; the last one may be smaller.
  int64_t row_tile = kPadding, column_tile = kPadding;
  int64_t row_tiles = 0, column_tiles = 0;
  int64_t row_groups = 1, column_groups = 1;

  int64_t workers() const { return row_groups * column_groups; }
  // Group g has tiles [first(g), first(g + 1)).
  int64_t first_row_tile(int64_t group) const { return row_tiles * group / row_groups; }
  int64_t first_column_tile(int64_t group) const { return column_tiles * group / column_groups; }
};

// `products`: how many of size n x m x depth the work is worth; little work gets one worker.
TileGrid tile_grid(int64_t n, int64_t m, int64_t depth, int products);

// run(i) for i in [0, count), on as many threads as there are; by the caller itself if one is
// enough. `parallel` false: all by the caller.
template <typename Run>
void run_parallel(int64_t count, bool parallel, const Run& run) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i);
  };
  if (parallel && count > 1)
    torch::stable::parallel_for(0, count, 1, range);
  else
    range(0, count);
}

// Fills every form that the two sides were made with.
inline void pack_both(PackedRows& x, PackedRows& y, bool parallel) {
  run_parallel(x.tiles() + y.tiles(), parallel, [&](int64_t task) {
    const bool of_x = task < x.tiles();
    (of_x ? x : y).pack(of_x ? task : task - x.tiles());
  });
}

// C [rows, columns] = A B over packed rows and transposed ones, in parts where they are deep.
void multiply_rows(
    Operand operand,
    int64_t rows,
    int64_t columns,
    int64_t depth,
    const char* a /* [rows, depth] */,
    const char* transposed_b /* [depth, ldb] */,
    int64_t ldb,
    float* c,
    int64_t ldc);

struct Tile {
  int64_t i, j;                         // which one
  int64_t row, column;                  // its first row and column
  int64_t rows, columns;                // how many, 1 or more
  int64_t padded_rows, padded_columns;  // of products: multiples of kPadding
  int64_t ld;                           // values from one row to the next
  float* values;                        // [padded_rows, ld]: the products x_i . y_j
  // Where the gradient by the logits goes, padding 0. Of float32 both are `values`.
  void* gradient_a;  // [padded_rows, ld]
  void* gradient_b;  // the same; of bfloat16 [padded_rows / 2, ld, 2]
};

// Of the gradient by the logits, G: G y in rows, [column group][n, depth], and its transpose times
// x in columns, [row group][column tile][depth, column_tile]; of packed rows, whose factors are in
// G.
class GradientSums {
 public:
  GradientSums(const TileGrid& grid, int64_t depth, bool rows, bool columns);

  bool has_rows() const { return rows_.size() != 0; }
  bool has_columns() const { return columns_.size() != 0; }
  float* rows(int64_t group, int64_t i) const {
    return rows_.data() + (group * padded(grid_.rows, kPadding) + i) * depth_;
  }
  float* columns(int64_t group, int64_t tile) const {
    return columns_.data() + (group * grid_.column_tiles + tile) * depth_ * grid_.column_tile;
  }
  const TileGrid& grid() const { return grid_; }
  int64_t depth() const { return depth_; }

 private:
  TileGrid grid_;
  int64_t depth_;
  Buffer<float> rows_, columns_;
};

// One worker's walk. Made on the thread that walks.
class TileWalk {
 public:
  // `sums` may be nullptr: no gradient. The worker's part of it is set to 0 here.
  TileWalk(
      const TileGrid& grid,
      const PackedRows& x,
      const PackedRows& y,
      const GradientSums* sums,
      int64_t worker);
  ~TileWalk() { gemm_release(x_.operand()); }
  TileWalk(const TileWalk&) = delete;
  TileWalk& operator=(const TileWalk&) = delete;

  int64_t row_group() const { return row_group_; }
  int64_t column_group() const { return column_group_; }
  int64_t row_begin() const { return grid_.first_row_tile(row_group_); }  // tiles
  int64_t row_end() const { return grid_.first_row_tile(row_group_ + 1); }
  int64_t column_begin() const { return grid_.first_column_tile(column_group_); }
  int64_t column_end() const { return grid_.first_column_tile(column_group_ + 1); }

  // Tile (i, j), in memory that the next call reuses; with its products, or room for them.
  Tile tile(int64_t i, int64_t j, bool multiply) const;
  // The same for the loops, with what `pairs` says about its rows and columns.
  LogitTile logits(const Tile& tile, const ContrastivePairs& pairs) const;
  // Adds the tile's gradient, which the caller has written, to the sums.
  void add_gradient(const Tile& tile) const;

 private:
  const TileGrid& grid_;
  const PackedRows &x_, &y_;
  const GradientSums* sums_;
  int64_t row_group_, column_group_;
  Buffer<float> values_;
  Buffer<char> gradient_a_, gradient_b_;
};

}  // namespace m2ae::cpu
