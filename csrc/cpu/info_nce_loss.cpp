// info_nce_loss on the CPU, forward. Contract: m2ae_kernels/ops/_info_nce_loss_op.py; math:
// info_nce_loss.py there.
//
// One pass over the tiles of the matrix of logits: each tile is a product in a worker's scratch,
// from which sums of powers over its rows and its columns are made at once. Targets are left out of
// those; their logits are dot products of their own. Loops: info_nce_loss_kernel.h.
#include "info_nce_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include "info_nce_loss_sums.h"
#include "isa.h"

namespace m2ae::cpu {
namespace {

constexpr const char* kOp = "info_nce_loss";
constexpr int64_t kChunk = 512;  // rows or columns whose statistics one task finishes

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

  static Tensor floats(const Tensor& like, int64_t size) {
    return torch::stable::new_empty(like, {size}, ScalarType::Float);
  }
  static float* data(const Tensor& tensor) {
    return static_cast<float*>(tensor.mutable_data_ptr());
  }
};

// What is known of one row or column when all tiles are summed.
struct Statistics {
  LogSum negative, positive;
  double logits;  // sum over the positives, to the base 2
  double count;
  bool in_loss;
};

// `worst`: the rank of a row that has none.
class DirectionWriter {
 public:
  explicit DirectionWriter(const DirectionOutput& output)
      : loss_(DirectionOutput::data(output.loss)),
        neg_(DirectionOutput::data(output.neg)),
        pos_(DirectionOutput::data(output.pos)),
        num_(DirectionOutput::data(output.num)) {}

  void write(int64_t row, const Statistics& of) const {
    constexpr double kLn2 = 0.69314718055994530942;
    const double negative = of.negative.log2();
    if (!of.in_loss) return write(row, 0, negative * kLn2, 0, 0);
    const bool single = of.count == 1;
    const double mean = of.logits / of.count, positive = single ? mean : of.positive.log2();
    const double neg = (negative - positive) * kLn2;
    const double uneven = single ? 0 : (positive - mean) * kLn2;
    write(row, softplus(neg) + uneven, neg, positive * kLn2, of.count);
  }
  void write_absent(int64_t row) const { write(row, 0, -INFINITY, 0, 0); }

 private:
  void write(int64_t row, double loss, double neg, double pos, double num) const {
    loss_[row] = float(loss);
    neg_[row] = float(neg);
    pos_[row] = float(pos);
    num_[row] = float(num);
  }

  float *loss_, *neg_, *pos_, *num_;
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

// Negatives above the target, counted by the products themselves, so that rows that are equal to
// the target never are. Ranks of one direction are parts for each group of the other, as sums are.
class Ranks {
 public:
  Ranks(const TileGrid& grid, const ContrastivePairs& pairs, bool symmetric, double scale)
      : grid_(grid),
        pairs_(pairs),
        sign_(
            scale > 0   ? 1.0f
            : scale < 0 ? -1.0f
                        : 0.0f),
        row_threshold_(grid.rows),
        column_threshold_(grid.columns),
        row_rank_(grid.rows * grid.column_groups),
        column_rank_(symmetric ? grid.columns * grid.row_groups : 0) {
    std::fill_n(row_threshold_.data(), grid.rows, 0.0f);
    std::fill_n(column_threshold_.data(), grid.columns, -INFINITY);
    std::fill_n(row_rank_.data(), row_rank_.size(), 0);
    std::fill_n(column_rank_.data(), column_rank_.size(), 0);
  }

  // The product of each query with its target, as the tiles have it: from products of the same kind
  // with the targets' keys gathered.
  void find_thresholds(const PackedRows& x, const PackedRows& y) {
    const Operand operand = x.operand();
    const int64_t depth = x.depth(), row_bytes = depth * bytes_of(operand), tile = grid_.row_tile;
    Buffer<char> keys(tile * row_bytes), transposed(tile * row_bytes);
    Buffer<float> products(tile * tile);
    for (int64_t begin = 0; begin < grid_.rows; begin += tile) {
      const int64_t rows = std::min(tile, grid_.rows - begin), height = padded(rows, kPadding);
      std::memset(keys.data(), 0, height * row_bytes);
      for (int64_t r = 0; r < rows; ++r) {
        const int32_t j = pairs_.target[begin + r];
        if (j >= 0) std::memcpy(keys.data() + r * row_bytes, y.rows(j), row_bytes);
      }
      const int64_t units = row_bytes / 4;
      kernels().transpose32(keys.data(), units, height, units, transposed.data(), tile);
      gemm(
          operand,
          height,
          height,
          depth,
          x.rows(begin),
          depth,
          transposed.data(),
          tile,
          false,
          products.data(),
          tile);
      for (int64_t r = 0; r < rows; ++r) set_threshold(begin + r, products[r * tile + r], x, y);
    }
    gemm_release(operand);
  }

  void count(const LogitTile& logits, const Tile& tile, const TileWalk& walk) {
    const auto kernel = kernels().nce_ranks[logits.row_factor == nullptr ? 0 : 1][pairs_.same_id];
    int32_t* const of_columns =
        column_rank_.size() == 0
            ? nullptr
            : column_rank_.data() + walk.row_group() * grid_.columns + tile.column;
    kernel(
        logits,
        sign_,
        row_threshold_.data() + tile.row,
        column_threshold_.data() + tile.column,
        row_rank_.data() + walk.column_group() * grid_.rows + tile.row,
        of_columns);
  }

  int64_t of_row(int64_t i) const {
    int64_t rank = 0;
    for (int64_t g = 0; g < grid_.column_groups; ++g) rank += row_rank_[g * grid_.rows + i];
    return rank;
  }
  int64_t of_column(int64_t j) const {
    int64_t rank = 0;
    for (int64_t g = 0; g < grid_.row_groups; ++g) rank += column_rank_[g * grid_.columns + j];
    return rank;
  }

 private:
  void set_threshold(int64_t i, float product, const PackedRows& x, const PackedRows& y) {
    const int32_t j = pairs_.target[i];
    if (j < 0) return;
    row_threshold_[i] = sign_ * (product * y.factor(j));
    column_threshold_[j] = std::max(column_threshold_[j], product * (sign_ * x.factor(i)));
  }

  const TileGrid& grid_;
  const ContrastivePairs& pairs_;
  float sign_;
  Buffer<float> row_threshold_, column_threshold_;
  Buffer<int32_t> row_rank_, column_rank_;
};

// Products of the present rows, [n, m], and zeros behind.
Tensor kept_matrix(const Tensor& like, const ContrastivePairs& pairs, bool keep) {
  const int64_t N = pairs.queries.all, M = pairs.keys.all;
  if (!keep) return DirectionOutput::floats(like, 0);
  if (N == 0 || M == 0) return torch::stable::new_empty(like, {N, M}, ScalarType::Float);
  Buffer<float> entries(N * M);
  const int64_t used = pairs.queries.count * pairs.keys.count;
  std::fill_n(entries.data() + used, N * M - used, 0.0f);
  const auto device = like.device();
  return torch::stable::from_blob(
      entries.release(), {N, M}, {M, 1}, device, ScalarType::Float, &give_block);
}

std::tuple<
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
    Tensor>
info_nce_loss_cpu(
    const Tensor& query,        // [N, D]
    const Tensor& key,          // [M, D]
    const Tensor& logit_scale,  // []
    const std::optional<Tensor>& target,
    const std::optional<Tensor>& query_mask,
    const std::optional<Tensor>& key_mask,
    const std::optional<Tensor>& query_ids,
    const std::optional<Tensor>& key_ids,
    int64_t target_offset,
    int64_t ignore_index,
    int64_t same_id,
    bool exclude_self,
    bool normalize,
    double eps,
    bool symmetric,
    bool ranks,
    bool keep,
    bool /*allow_tf32*/,
    int64_t /*workspace: nothing here grows with N x M*/) {
  const Operand operand = nce_operand(kOp, query, key);
  const double scale = number_of(kOp, "logit_scale", logit_scale);
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
  const ContrastivePairs pairs = contrastive_pairs(kOp, query.size(0), key.size(0), arguments);
  const int64_t n = pairs.queries.count, m = pairs.keys.count;
  DirectionOutput of_queries(query, pairs.queries.all, true, normalize, ranks);
  DirectionOutput of_keys(query, pairs.keys.all, symmetric, normalize, ranks);
  Tensor kept = kept_matrix(query, pairs, keep);

  const TileGrid grid = nce_grid(n, m, query.size(1));
  const bool parallel = grid.workers() > 1;
  const auto side = [&](const Tensor& features,
                        const PresentRows& rows,
                        const Tensor& rnorm,
                        int64_t tile,
                        bool transposed) {
    const Normalization normalization{normalize, eps, nullptr, DirectionOutput::data(rnorm)};
    std::fill_n(normalization.made, rnorm.numel(), 0.0f);
    return PackedRows(features, rows, operand, tile, normalization, {false, false, transposed});
  };
  PackedRows x = side(query, pairs.queries, of_queries.rnorm, grid.row_tile, false);
  PackedRows y = side(key, pairs.keys, of_keys.rnorm, grid.column_tile, true);
  pack_both(x, y, parallel, [](int, int64_t) {});
  const NceRange range = nce_range(scale, x, y);

  Buffer<double> at_target(n);  // logit of each query's target, to the base 2
  const bool by_id = pairs.same_id == kSameIdPositive;
  const int32_t reference = range.scale.reference;
  const DirectionSums row_sums(grid.column_groups, n, range.robust, by_id, reference);
  const DirectionSums column_sums(
      grid.row_groups, symmetric ? m : 0, range.robust, by_id, reference);
  std::optional<Ranks> counted;
  if (ranks) {
    counted.emplace(grid, pairs, symmetric, scale);
    counted->find_thresholds(x, y);
  }
  const auto sums_kernel = range.robust ? kernels().nce_robust_sums[int(operand)][pairs.same_id]
                                        : kernels().nce_sums[int(operand)][pairs.same_id];
  run_parallel(grid.workers(), parallel, [&](int64_t worker) {
    const TileWalk walk(grid, x, y, nullptr, worker);
    for (int64_t i = walk.row_begin(); i < walk.row_end(); ++i) {
      for (int64_t r = i * grid.row_tile; r < std::min((i + 1) * grid.row_tile, n); ++r)
        if (walk.column_group() == 0 && pairs.target[r] >= 0)
          at_target[r] = range.scale.scale * product_of_rows(x, r, y, pairs.target[r]);
      for (int64_t j = walk.column_begin(); j < walk.column_end(); ++j) {
        const Tile tile = walk.tile(i, j, true);
        const LogitTile logits = walk.logits(tile, pairs);
        if (counted) counted->count(logits, tile, walk);
        for (int64_t r = 0; keep && r < tile.rows; ++r) {
          float* const entries = DirectionOutput::data(kept) + (tile.row + r) * m + tile.column;
          std::memcpy(entries, tile.values + r * tile.ld, tile.columns * sizeof(float));
        }
        sums_kernel(
            logits,
            range.scale,
            row_sums.at(walk.column_group(), tile.row),
            symmetric ? column_sums.at(walk.row_group(), tile.column) : NceSums{});
      }
    }
  });

  const auto statistics = [](const DirectionSums& sums, int64_t i) {
    return Statistics{sums.negative(i), sums.positive(i), sums.logits(i), sums.count(i), false};
  };
  const auto add_target = [&](Statistics* of, int64_t i) {
    of->positive = of->positive + LogSum{at_target[i], 1};
    of->logits += at_target[i];
    of->count += 1;
  };
  const DirectionWriter write_query(of_queries), write_key(of_keys);
  auto* const rank_q = static_cast<int64_t*>(of_queries.rank.mutable_data_ptr());
  auto* const rank_k = static_cast<int64_t*>(of_keys.rank.mutable_data_ptr());
  for_all_rows(pairs.queries, parallel, [&](int64_t row, int32_t i) {
    if (ranks) rank_q[row] = pairs.keys.all;
    if (i < 0) return write_query.write_absent(row);
    Statistics of = statistics(row_sums, i);
    if (pairs.target[i] >= 0) add_target(&of, i);
    of.in_loss = of.count > 0 && !(pairs.ignored.size() != 0 && pairs.ignored[i]);
    write_query.write(row, of);
    if (ranks && of.in_loss && pairs.target[i] >= 0) rank_q[row] = counted->of_row(i);
  });
  if (symmetric) {
    const QueriesOfKeys of_key = queries_of_keys(pairs);
    for_all_rows(pairs.keys, parallel, [&](int64_t row, int32_t j) {
      if (ranks) rank_k[row] = pairs.queries.all;
      if (j < 0) return write_key.write_absent(row);
      Statistics of = statistics(column_sums, j);
      for (int32_t q = of_key.start[j]; q < of_key.start[j + 1]; ++q)
        add_target(&of, of_key.query[q]);
      of.in_loss = of.count > 0;
      write_key.write(row, of);
      if (ranks && of_key.start[j] < of_key.start[j + 1]) rank_k[row] = counted->of_column(j);
    });
  }
  return {
      of_queries.loss,
      of_keys.loss,
      of_queries.neg,
      of_keys.neg,
      of_queries.pos,
      of_keys.pos,
      of_queries.num,
      of_keys.num,
      of_queries.rnorm,
      of_keys.rnorm,
      of_queries.rank,
      of_keys.rank,
      kept};
}

}  // namespace

Operand nce_operand(const char* op, const Tensor& query, const Tensor& key) {
  const Element element = contrastive_element(op, "query", query);
  STD_TORCH_CHECK(
      contrastive_element(op, "key", key) == element && key.size(1) == query.size(1),
      op,
      ": expected query [N, D] and key [M, D] of one dtype");
  return contrastive_operand(element);
}

TileGrid nce_grid(int64_t n, int64_t m, int64_t D) {
  return tile_grid(n, m, D, 3);
}

double softplus(double x) {
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

double number_of(const char* op, const char* name, const Tensor& number) {
  STD_TORCH_CHECK(
      number.is_cpu() && number.numel() == 1, op, ": expected one number on the CPU as ", name);
  switch (number.scalar_type()) {
    case ScalarType::Double:
      return *number.const_data_ptr<double>();
    case ScalarType::Float:
      return *number.const_data_ptr<float>();
    case ScalarType::BFloat16:
      return float(*number.const_data_ptr<torch::headeronly::BFloat16>());
    case ScalarType::Half:
      return float(*number.const_data_ptr<torch::headeronly::Half>());
    default:
      STD_TORCH_CHECK(
          false, op, ": expected a floating ", name, ", got ", toString(number.scalar_type()));
  }
}

NceRange nce_range(double logit_scale, const PackedRows& x, const PackedRows& y) {
  constexpr double kLog2E = 1.44269504088896340736;
  NceRange range{};
  range.scale.scale = logit_scale * kLog2E;
  // No product of rows is larger, but for its rounding; nor is it infinite.
  const double product = x.longest() * y.longest();
  const double bound = std::fabs(range.scale.scale) * product * 1.0001 + 0.001;
  // Powers then lie in [2^-126, 2^100], and sums of 2^20 of them are far from infinity.
  range.robust = !(product < 1e37 && 2 * std::ceil(bound) <= 226);
  range.scale.reference = range.robust ? 0 : int32_t(std::ceil(bound)) - 100;
  return range;
}

double product_of_rows(const PackedRows& x, int64_t i, const PackedRows& y, int64_t j) {
  const double product = kernels().dot_rows[int(x.operand())](x.rows(i), y.rows(j), x.depth());
  return double(x.factor(i)) * double(y.factor(j)) * product;
}

}  // namespace m2ae::cpu

STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CPU, m) {
  m.impl("info_nce_loss", TORCH_BOX(&m2ae::cpu::info_nce_loss_cpu));
}
