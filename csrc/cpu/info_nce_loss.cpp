// info_nce_loss on the CPU, forward. Contract: m2ae_kernels/ops/_info_nce_loss_op.py; math:
// info_nce_loss.py there.
//
// One pass over the tiles of the matrix of logits: each tile is a product in a worker's scratch,
// from which sums of powers over its rows and its columns are made at once. Targets are left out of
// those; their logits are dot products of their own. Loops: info_nce_loss_kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>

#include "info_nce_loss_inputs.h"
#include "info_nce_loss_ranks.h"
#include "info_nce_loss_sums.h"
#include "isa.h"

namespace m2ae::cpu {
namespace {

constexpr const char* kOp = "info_nce_loss";
constexpr int64_t kChunk = 512;  // rows or columns whose statistics one task finishes

Tensor floats(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {size}, ScalarType::Float);
}

// The outputs of one direction, by row of all.
struct DirectionOutput {
  Tensor loss, neg, pos, num, rnorm, rank;

  DirectionOutput(const Tensor& like, int64_t rows, bool wanted, bool normalize, bool ranks)
      : loss(floats(like, wanted ? rows : 0)),
        neg(floats(like, wanted ? rows : 0)),
        pos(floats(like, wanted ? rows : 0)),
        num(floats(like, wanted ? rows : 0)),
        rnorm(floats(like, normalize ? rows : 0)),
        rank(torch::stable::new_empty(like, {wanted && ranks ? rows : 0}, ScalarType::Long)) {}
};

// What is known of one row or column when all tiles are summed.
struct Statistics {
  LogSum negative, positive;
  double logits;  // sum over the positives, to the base 2
  double count;
  bool in_loss;
  int64_t rank;
};

class DirectionWriter {
 public:
  explicit DirectionWriter(const DirectionOutput& output)
      : loss_(output.loss.mutable_data_ptr<float>()),
        neg_(output.neg.mutable_data_ptr<float>()),
        pos_(output.pos.mutable_data_ptr<float>()),
        num_(output.num.mutable_data_ptr<float>()),
        rank_(output.rank.numel() == 0 ? nullptr : output.rank.mutable_data_ptr<int64_t>()) {}

  void write(int64_t row, const Statistics& of) const {
    constexpr double kLn2 = 0.69314718055994530942;
    const double negative = of.negative.log2();
    if (!of.in_loss) return write(row, 0, negative * kLn2, 0, 0, of.rank);
    const bool single = of.count == 1;
    const double mean = of.logits / of.count, positive = single ? mean : of.positive.log2();
    const double neg = (negative - positive) * kLn2;
    const double uneven = single ? 0 : (positive - mean) * kLn2;
    write(row, softplus(neg) + uneven, neg, positive * kLn2, of.count, of.rank);
  }
  void write_absent(int64_t row, int64_t rank) const { write(row, 0, -INFINITY, 0, 0, rank); }

 private:
  void write(int64_t row, double loss, double neg, double pos, double num, int64_t rank) const {
    loss_[row] = float(loss);
    neg_[row] = float(neg);
    pos_[row] = float(pos);
    num_[row] = float(num);
    if (rank_ != nullptr) rank_[row] = rank;
  }

  float *loss_, *neg_, *pos_, *num_;
  int64_t* rank_;
};

// write(row, place) for all rows of a side, in chunks; place -1 if absent.
template <typename Write>
void for_all_rows(const PresentRows& rows, bool parallel, const Write& write) {
  const int64_t chunks = (rows.all + kChunk - 1) / kChunk;
  run_parallel(chunks, parallel, [&](int64_t c) {
    for (int64_t r = c * kChunk; r < std::min((c + 1) * kChunk, rows.all); ++r)
      write(r, rows.place_of(r));
  });
}

// One call: from the two sides, once packed, to the statistics of their rows.
class Forward {
 public:
  Forward(
      const ContrastivePairs& pairs,
      const TileGrid& grid,
      const PackedRows& x,
      const PackedRows& y,
      double scale,
      bool symmetric,
      bool ranks)
      : pairs_(pairs),
        grid_(grid),
        x_(x),
        y_(y),
        range_(nce_range(scale, x, y)),
        at_target_(grid.rows),
        rows_(sums_of(grid.column_groups, grid.rows)),
        columns_(sums_of(grid.row_groups, symmetric ? grid.columns : 0)),
        symmetric_(symmetric) {
    if (ranks) ranks_.emplace(grid, pairs, x, y, symmetric, scale);
  }

  // Sums all tiles; writes their products to `kept`, [n, m], unless that is nullptr.
  void add_tiles(float* kept) const {
    const int operand = int(x_.operand()), same_id = pairs_.same_id;
    const auto kernel = range_.robust ? kernels().nce_robust_sums[operand][same_id]
                                      : kernels().nce_sums[operand][same_id];
    run_parallel(grid_.workers(), parallel(), [&](int64_t worker) {
      const TileWalk walk(grid_, x_, y_, nullptr, worker);
      for (int64_t i = walk.row_begin(); i < walk.row_end(); ++i) {
        if (walk.column_group() == 0) find_logits_at_targets(i);
        for (int64_t j = walk.column_begin(); j < walk.column_end(); ++j) {
          const Tile tile = walk.tile(i, j, true);
          const LogitTile logits = walk.logits(tile, pairs_);
          if (ranks_) ranks_->add(logits, tile, walk);
          for (int64_t r = 0; kept != nullptr && r < tile.rows; ++r) {
            float* const to = kept + (tile.row + r) * grid_.columns + tile.column;
            std::memcpy(to, tile.values + r * tile.ld, tile.columns * sizeof(float));
          }
          kernel(
              logits,
              range_.scale,
              rows_.at(walk.column_group(), tile.row),
              symmetric_ ? columns_.at(walk.row_group(), tile.column) : NceSums{});
        }
      }
    });
  }

  void write_queries(const DirectionOutput& output) const {
    const DirectionWriter writer(output);
    for_all_rows(pairs_.queries, parallel(), [&](int64_t row, int32_t i) {
      const int64_t worst = pairs_.keys.all;
      if (i < 0) return writer.write_absent(row, worst);
      Statistics of = statistics(rows_, i, worst);
      const bool has_target = pairs_.target[i] >= 0;
      if (has_target) add_target(&of, i);
      of.in_loss = of.count > 0 && !(pairs_.ignored.size() != 0 && pairs_.ignored[i]);
      if (ranks_ && has_target && of.in_loss) of.rank = ranks_->of_row(i);
      writer.write(row, of);
    });
  }

  void write_keys(const DirectionOutput& output) const {
    const DirectionWriter writer(output);
    const QueriesOfKeys queries = queries_of_keys(pairs_);
    for_all_rows(pairs_.keys, parallel(), [&](int64_t row, int32_t j) {
      const int64_t worst = pairs_.queries.all;
      if (j < 0) return writer.write_absent(row, worst);
      Statistics of = statistics(columns_, j, worst);
      const int32_t begin = queries.start[j], end = queries.start[j + 1];
      for (int32_t q = begin; q < end; ++q) add_target(&of, queries.query[q]);
      of.in_loss = of.count > 0;
      if (ranks_ && begin < end) of.rank = ranks_->of_column(j);
      writer.write(row, of);
    });
  }

 private:
  bool parallel() const { return grid_.workers() > 1; }
  DirectionSums sums_of(int64_t parts, int64_t size) const {
    const bool by_id = pairs_.same_id == kSameIdPositive;
    return DirectionSums(parts, size, range_.robust, by_id, range_.scale.reference);
  }
  static Statistics statistics(const DirectionSums& sums, int64_t i, int64_t worst) {
    return {sums.negative(i), sums.positive(i), sums.logits(i), sums.count(i), false, worst};
  }
  void find_logits_at_targets(int64_t tile) const {
    const int64_t begin = tile * grid_.row_tile;
    for (int64_t i = begin; i < std::min(begin + grid_.row_tile, grid_.rows); ++i)
      if (pairs_.target[i] >= 0)
        at_target_[i] = range_.scale.scale * product_of_rows(x_, i, y_, pairs_.target[i]);
  }
  void add_target(Statistics* of, int64_t i) const {
    of->positive = of->positive + LogSum{at_target_[i], 1};
    of->logits += at_target_[i];
    of->count += 1;
  }

  const ContrastivePairs& pairs_;
  const TileGrid& grid_;
  const PackedRows &x_, &y_;
  NceRange range_;
  Buffer<double> at_target_;  // [n], logit of each query's target, to the base 2
  DirectionSums rows_, columns_;
  bool symmetric_;
  std::optional<NceRanks> ranks_;
};

// Room for the products of the present rows, [n, m]; what is behind them becomes 0.
Tensor kept_matrix(const Tensor& like, const ContrastivePairs& pairs, bool keep) {
  const int64_t N = pairs.queries.all, M = pairs.keys.all;
  if (!keep) return floats(like, 0);
  if (N == 0 || M == 0) return torch::stable::new_empty(like, {N, M}, ScalarType::Float);
  Buffer<float> entries(N * M);
  const int64_t used = pairs.queries.count * pairs.keys.count;
  std::fill_n(entries.data() + used, N * M - used, 0.0f);
  return torch::stable::from_blob(
      entries.release(), {N, M}, {M, 1}, like.device(), ScalarType::Float, &give_block);
}

// Inverse norms are written to `rnorm`, [all rows]; those of absent rows are 0.
PackedRows packed_side(
    const Tensor& features,
    const PresentRows& rows,
    Operand operand,
    int64_t tile,
    bool normalize,
    double eps,
    const Tensor& rnorm,
    bool transposed) {
  float* const made = rnorm.mutable_data_ptr<float>();
  std::fill_n(made, rnorm.numel(), 0.0f);
  return PackedRows(
      features, rows, operand, tile, {normalize, eps, nullptr, made}, {false, false, transposed});
}

using Outputs = std::tuple<
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor>;

Outputs info_nce_loss_cpu(
    const Tensor& query,                      // [N, D]
    const Tensor& key,                        // [M, D]
    const Tensor& logit_scale,                // []
    const std::optional<Tensor>& target,      // [N]
    const std::optional<Tensor>& query_mask,  // [N]
    const std::optional<Tensor>& key_mask,    // [M]
    const std::optional<Tensor>& query_ids,   // [N]
    const std::optional<Tensor>& key_ids,     // [M]
    int64_t target_offset,
    int64_t ignore_index,
    int64_t same_id,
    bool exclude_self,
    bool normalize,
    double eps,
    bool symmetric,
    bool ranks,
    bool keep,
    bool /* allow_tf32 */,
    int64_t /* workspace: nothing here grows with N x M */) {
  const Operand operand = nce_operand(kOp, query, key);
  const double scale = number_of(kOp, "logit_scale", logit_scale);
  const ContrastivePairs pairs = contrastive_pairs(
      kOp,
      query.size(0),
      key.size(0),
      {target,
       query_mask,
       key_mask,
       query_ids,
       key_ids,
       target_offset,
       ignore_index,
       same_id,
       exclude_self});
  const DirectionOutput q(query, pairs.queries.all, true, normalize, ranks);
  const DirectionOutput k(query, pairs.keys.all, symmetric, normalize, ranks);
  const Tensor kept = kept_matrix(query, pairs, keep);

  const TileGrid grid = nce_grid(pairs.queries.count, pairs.keys.count, query.size(1));
  PackedRows x =
      packed_side(query, pairs.queries, operand, grid.row_tile, normalize, eps, q.rnorm, false);
  PackedRows y =
      packed_side(key, pairs.keys, operand, grid.column_tile, normalize, eps, k.rnorm, true);
  pack_both(x, y, grid.workers() > 1);
  const Forward forward(pairs, grid, x, y, scale, symmetric, ranks);
  forward.add_tiles(kept.numel() == 0 ? nullptr : kept.mutable_data_ptr<float>());
  forward.write_queries(q);
  if (symmetric) forward.write_keys(k);
  return {
      q.loss,
      k.loss,
      q.neg,
      k.neg,
      q.pos,
      k.pos,
      q.num,
      k.num,
      q.rnorm,
      k.rnorm,
      q.rank,
      k.rank,
      kept};
}

}  // namespace
}  // namespace m2ae::cpu

STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CPU, m) {
  m.impl("info_nce_loss", TORCH_BOX(&m2ae::cpu::info_nce_loss_cpu));
}
