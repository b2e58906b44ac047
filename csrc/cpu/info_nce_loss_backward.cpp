// info_nce_loss on the CPU, backward. Contract: m2ae_kernels/ops/_info_nce_loss_op.py; math:
// info_nce_loss.py there.
//
// One pass over the tiles: the gradient by the logits of a tile takes the place of its products,
// and enters the sums of both sides at once. Targets are 0 in it and added in float32 when those
// are finished. Loops: info_nce_loss_backward_kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "contrastive_gradients.h"
#include "info_nce_loss_inputs.h"
#include "info_nce_loss_shares.h"
#include "isa.h"

namespace m2ae::cpu {
namespace {

constexpr const char* kOp = "info_nce_loss_backward";
constexpr int64_t kChunk = 512;  // rows or columns whose shares one task makes

struct Shares {
  DirectionShares rows, columns;
};

double sum_of(const Buffer<double>& parts) {
  double sum = 0;
  for (int64_t i = 0; i < parts.size(); ++i) sum += parts[i];
  return sum;
}

// One call: the two sides, and the steps from them to the sums of their gradients.
class Backward {
 public:
  Backward(
      const ContrastivePairs& pairs,
      const Upstream& queries,
      const Upstream& keys,
      const TileGrid& grid,
      PackedRows& x,
      PackedRows& y,
      double scale,
      double unit)
      : pairs_(pairs),
        queries_(queries),
        keys_(keys),
        grid_(grid),
        x_(x),
        y_(y),
        unit_(unit),
        coefficient_(pairs.same_id == kSameIdPositive ? 0 : grid.rows) {
    pack_both(x, y, parallel());
    range_ = nce_range(scale, x, y);
    if (fill_shares()) return;
    // Statistics from elsewhere, of rows longer than any here.
    range_.robust = true;
    range_.scale.reference = 0;
    fill_shares();
  }

  bool parallel() const { return grid_.workers() > 1; }
  // Of each query's target, but where positives are in the tiles.
  const float* coefficient() const {
    return coefficient_.size() == 0 ? nullptr : coefficient_.data();
  }

  // Returns the derivative by the scale. `kept`: products [n, m], or nullptr.
  double add_tiles(const float* kept, const GradientSums& sums) const {
    const int operand = int(x_.operand()), same_id = pairs_.same_id;
    const auto kernel = range_.robust ? kernels().nce_robust_gradient[operand][same_id]
                                      : kernels().nce_gradient[operand][same_id];
    const int64_t m = grid_.columns;
    const Buffer<double> by_scale(grid_.workers());
    run_parallel(grid_.workers(), parallel(), [&](int64_t worker) {
      const TileWalk walk(grid_, x_, y_, &sums, worker);
      by_scale[worker] = 0;
      for (int64_t i = walk.row_begin(); i < walk.row_end(); ++i) {
        for (int64_t j = walk.column_begin(); j < walk.column_end(); ++j) {
          const Tile tile = walk.tile(i, j, kept == nullptr);
          LogitTile logits = walk.logits(tile, pairs_);
          if (kept != nullptr) {
            logits.products = kept + tile.row * m + tile.column;
            logits.ld = m;
          }
          by_scale[worker] += kernel(
              logits,
              range_.scale,
              shares_->rows.at(tile.row),
              shares_->columns.at(tile.column),
              tile.gradient_a,
              tile.gradient_b);
          walk.add_gradient(tile);
        }
      }
    });
    return sum_of(by_scale) + sum_of(by_scale_of_targets_);
  }

 private:
  // False if some do not fit the range.
  bool fill_shares() {
    const bool by_id = pairs_.same_id == kSameIdPositive;
    shares_.emplace(Shares{{queries_, range_.robust, by_id}, {keys_, range_.robust, by_id}});
    const int64_t n = grid_.rows, m = grid_.columns;
    const int64_t chunks_of_rows = (n + kChunk - 1) / kChunk;
    const int64_t chunks = chunks_of_rows + (m + kChunk - 1) / kChunk;
    by_scale_of_targets_ = Buffer<double>(chunks);
    std::atomic<bool> fits = true;
    run_parallel(chunks, parallel(), [&](int64_t c) {
      const bool of_rows = c < chunks_of_rows;
      const int64_t begin = (of_rows ? c : c - chunks_of_rows) * kChunk;
      by_scale_of_targets_[c] = 0;
      for (int64_t i = begin; i < std::min(begin + kChunk, of_rows ? n : m); ++i) {
        if (!(of_rows ? shares_->rows : shares_->columns).fill(i, unit_, range_)) fits = false;
        if (of_rows && coefficient_.size() != 0) by_scale_of_targets_[c] += fill_target(i);
      }
    });
    return fits;
  }

  // The gradient by the logit of query i and its target, through both directions; returns its part
  // of that by the scale.
  double fill_target(int64_t i) {
    const int32_t j = pairs_.target[i];
    double gradient = 0, product = 0;
    if (j >= 0) {
      product = product_of_rows(x_, i, y_, j);
      const double logit = range_.scale.scale * product;
      if (queries_.in_loss(i)) gradient += queries_.weight(i) * queries_.of_positive(i, logit);
      if (keys_.in_loss(j)) gradient += keys_.weight(j) * keys_.of_positive(j, logit);
    }
    coefficient_[i] = float(gradient / unit_);
    return gradient / unit_ * product;
  }

  const ContrastivePairs& pairs_;
  const Upstream &queries_, &keys_;
  const TileGrid& grid_;
  const PackedRows &x_, &y_;
  double unit_;
  NceRange range_;
  Buffer<float> coefficient_;           // [n]
  Buffer<double> by_scale_of_targets_;  // of chunks of rows
  std::optional<Shares> shares_;
};

Tensor gradient_like(const Tensor& features, bool wanted) {
  if (!wanted) return torch::stable::new_empty(features, {0});
  return torch::stable::new_empty(features, {features.size(0), features.size(1)});
}

std::tuple<Tensor, Tensor, Tensor> info_nce_loss_backward_cpu(
    const Tensor& grad_q,       // [N]
    const Tensor& grad_k,       // [M], empty if the loss is not symmetric
    const Tensor& query,        // [N, D]
    const Tensor& key,          // [M, D]
    const Tensor& logit_scale,  // []
    const std::optional<Tensor>& target,
    const std::optional<Tensor>& query_mask,
    const std::optional<Tensor>& key_mask,
    const std::optional<Tensor>& query_ids,
    const std::optional<Tensor>& key_ids,
    const Tensor& neg_q,
    const Tensor& neg_k,
    const Tensor& pos_q,
    const Tensor& pos_k,
    const Tensor& num_q,
    const Tensor& num_k,
    const Tensor& rnorm_q,
    const Tensor& rnorm_k,
    const Tensor& kept,
    int64_t target_offset,
    int64_t ignore_index,
    int64_t same_id,
    bool exclude_self,
    bool normalize,
    double eps,
    bool symmetric,
    bool /*allow_tf32*/,
    int64_t /*workspace: nothing here grows with N x M*/,
    std::vector<bool> output_mask) {
  const Operand operand = nce_operand(kOp, query, key);
  const Element element = contrastive_element(kOp, "query", query);
  const double scale = number_of(kOp, "logit_scale", logit_scale);
  const int64_t N = query.size(0), M = key.size(0);
  STD_TORCH_CHECK(output_mask.size() == 3, kOp, ": expected three outputs");
  STD_TORCH_CHECK(
      kept.numel() == 0 || (kept.numel() == N * M && kept.is_contiguous() && kept.is_cpu() &&
                            kept.scalar_type() == ScalarType::Float),
      kOp,
      ": expected kept as the forward made it");
  const bool need_query = output_mask[0], need_key = output_mask[1], need_scale = output_mask[2];
  const PairArguments arguments{
      target,
      query_mask,
      key_mask,
      query_ids,
      key_ids,
      target_offset,
      ignore_index,
      same_id,
      exclude_self};
  const ContrastivePairs pairs = contrastive_pairs(kOp, N, M, arguments);
  const Upstream of_queries(kOp, grad_q, neg_q, pos_q, num_q, pairs.queries, true);
  const Upstream of_keys(kOp, grad_k, neg_k, pos_k, num_k, pairs.keys, symmetric);

  Tensor dquery = gradient_like(query, need_query), dkey = gradient_like(key, need_key);
  Tensor dscale = need_scale ? torch::stable::new_empty(logit_scale, logit_scale.sizes())
                             : torch::stable::new_empty(logit_scale, {0});
  const int64_t n = pairs.queries.count, m = pairs.keys.count;
  const double unit = unit_of(of_queries, of_keys);
  if (n == 0 || m == 0 || unit == 0 || !(need_query || need_key || need_scale)) {
    torch::stable::zero_(dquery);
    torch::stable::zero_(dkey);
    torch::stable::zero_(dscale);
    return {dquery, dkey, dscale};
  }

  const TileGrid grid = nce_grid(n, m, query.size(1));
  const auto normalization = [&](const Tensor& rnorm, int64_t rows) {
    STD_TORCH_CHECK(
        rnorm.is_contiguous() && rnorm.numel() == (normalize ? rows : 0) &&
            rnorm.scalar_type() == ScalarType::Float,
        kOp,
        ": expected inverse norms as the forward made them");
    return Normalization{normalize, eps, rnorm.const_data_ptr<float>(), nullptr};
  };
  const float* const products = kept.numel() == 0 ? nullptr : kept.const_data_ptr<float>();
  PackedRows x(
      query,
      pairs.queries,
      operand,
      grid.row_tile,
      normalization(rnorm_q, N),
      {false, need_key, false});
  PackedRows y(
      key,
      pairs.keys,
      operand,
      grid.column_tile,
      normalization(rnorm_k, M),
      {need_query, false, products == nullptr});
  const Backward backward(pairs, of_queries, of_keys, grid, x, y, scale, unit);
  const GradientSums sums(grid, x.depth(), need_query, need_key);
  const double of_scale = backward.add_tiles(products, sums);
  const GradientFinish finish{
      sums, x, y, pairs, backward.coefficient(), scale * unit, backward.parallel()};
  if (need_query) finish_queries(finish, {dquery.mutable_data_ptr(), element});
  if (need_key) finish_keys(finish, {dkey.mutable_data_ptr(), element});
  if (need_scale) torch::stable::fill_(dscale, of_scale * unit);
  return {dquery, dkey, dscale};
}

}  // namespace
}  // namespace m2ae::cpu

STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CPU, m) {
  m.impl("info_nce_loss_backward", TORCH_BOX(&m2ae::cpu::info_nce_loss_backward_cpu));
}
