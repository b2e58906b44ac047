// The backward of expert_mlp for a block of an expert's rows: the products, panel by panel of
// hidden channels, so that a, its gradient and that of h stay in the cache. Contract and math:
// m2ae_kernels/ops/expert_mlp.py
#include <algorithm>
#include <cstring>

#include "expert_mlp_backward.h"

namespace m2ae::cpu {
namespace {

constexpr int64_t kPanel = BackwardScratch::kPanel;
constexpr int kFloat = int(Element::kFloat32);

}  // namespace

// To elements i on of a gradient.
void BackwardBlocks::round(const float* from, int64_t n, char* to, int64_t i) const {
  kernels().cast[kFloat][int(mlp_.element)](from, to + i * bytes_of(mlp_.element), n);
}

BackwardScratch::BackwardScratch(const ExpertMlp& mlp, bool recomputes)
    : BackwardScratch(mlp, recomputes, block_of(mlp)) {}

BackwardScratch::BackwardScratch(const ExpertMlp& mlp, bool recomputes, int64_t block)
    : u(block * in_pairs(mlp.D)),
      left_u(mlp.packed(u.size())),
      right_u(mlp.packed(u.size())),
      inputs(recomputes ? u.size() : 0),
      g(block * in_pairs(mlp.Do)),
      left_g(mlp.packed(g.size())),
      turned_g(g.size()),
      by_u(block * mlp.D),
      h(block * kPanel),
      up(mlp.gated ? block * kPanel : 0),
      columns(recomputes ? block * kPanel : 0),
      a(block * kPanel),
      by_a(block * kPanel),
      right_a(mlp.packed(block * kPanel)),
      by_h(block * kPanel),
      by_up(mlp.gated ? block * kPanel : 0),
      left_by_h(mlp.packed(block * kPanel)),
      turned(block * kPanel),
      factors(kPanel),
      by_b1(2 * kPanel),
      by_b2(mlp.Do),
      weights(mlp.packed_weights(kPanel * std::max(mlp.D, mlp.Do))),
      row(std::max({mlp.D, mlp.Do, kPanel})),
      z(mlp.Do),
      tile_w1(mlp.packed_weights(kPanel * mlp.D)),
      tile_w2(mlp.packed_weights(kPanel * mlp.Do)) {
  std::fill_n(factors.data(), kPanel, 1.0f);
}

void BackwardBlocks::run(
    BackwardScratch& scratch,
    const HiddenRange& range,
    const int32_t* rows,
    int64_t m,
    bool is_first,
    bool is_last,
    const WeightSums& sums) const {
  const int64_t D = mlp_.D, Do = mlp_.Do, n = in_lanes(m);
  const int64_t ld_u = in_pairs(D), ld_g = in_pairs(Do);
  const bool at_input = mlp_.weight_at == WeightAt::kInput;
  std::fill_n(scratch.u.data(), n * ld_u, 0.0f);
  mlp_.gather(rows, m, at_input, scratch.u.data(), ld_u);
  if (recomputes()) {
    const void* const left = mlp_.left(scratch.u.data(), n, ld_u, scratch.left_u.data());
    mlp_.turn_right(left, n, ld_u, scratch.inputs.data());
  }
  mlp_.right(scratch.u.data(), n, ld_u, ld_u, scratch.right_u.data());
  std::fill_n(scratch.g.data(), n * ld_g, 0.0f);
  std::fill_n(scratch.by_b2.data(), Do, 0.0f);
  for (int64_t i = 0; i < m; ++i) output(scratch, range, rows[i], i);
  if (needs_.b2 && range.q == 0) kernels().add(sums.b2, scratch.by_b2.data(), Do);
  const void* const left_g = mlp_.left(scratch.g.data(), n, ld_g, scratch.left_g.data());
  if (needs_.w2) mlp_.turn_left(left_g, n, ld_g, scratch.turned_g.data());
  for (int64_t h0 = range.first; h0 < range.last; h0 += kPanel) {
    const int64_t width = std::min(kPanel, range.last - h0);
    const bool adds_rows = h0 > range.first, adds_weights = !is_first;
    const int64_t ld = in_lanes(width);
    panel(scratch, {range, rows, m, n, h0, width, ld, adds_rows, adds_weights, is_last, sums});
  }
  for (int64_t i = 0; at_input && i < m; ++i) {
    float *const by_u = scratch.by_u.data() + i * D, *const u = scratch.row.data();
    mlp_.gather(rows + i, 1, false, u, D);
    scratch.by_weight[i] = float(kernels().dot_rows[kFloat](by_u, u, D));
    kernels().siglip_scale[kFloat](by_u, mlp_.weight(rows[i]), D, by_u);
  }
}

// g of one row, its part of the gradient of b2, and that of its weight without the hidden layer.
void BackwardBlocks::output(
    BackwardScratch& scratch, const HiddenRange& range, int32_t row, int64_t i) const {
  const int64_t Do = mlp_.Do, r = mlp_.slot(row) / mlp_.k;
  const bool is_first = range.q == 0;  // of the splits: what has no hidden channels is counted once
  float *const g = scratch.g.data() + i * in_pairs(Do), *const z = scratch.z.data();
  grad_.load(r * Do, Do, g);
  if (mlp_.output.threshold > 0) kernels().dropout_row(mlp_.output, mlp_.slot(row), 0, g, Do);
  scratch.by_weight[i] = 0;
  scratch.weight[i] = mlp_.factor(row);
  if (mlp_.output_activation != kIdentity) {
    const float* const y = y_.read(row * Do, Do, scratch.row.data());
    kernels().activate[mlp_.output_activation](y, nullptr, Do, z);
    if (is_first) scratch.by_weight[i] = float(kernels().dot_rows[kFloat](g, z, Do));
    kernels().activate_backward[mlp_.output_activation](g, y, nullptr, Do, g, nullptr);
  } else if (mlp_.b2 && is_first) {
    const float* const bias = mlp_.b2.read(range.e * Do, Do, scratch.row.data());
    scratch.by_weight[i] = float(kernels().dot_rows[kFloat](g, bias, Do));
  }
  if (needs_.b2 && is_first)
    kernels().add_row[kFloat](g, scratch.weight[i], scratch.by_b2.data(), Do);
}

// Hidden channels h0 to h0 + width for one block.
void BackwardBlocks::panel(BackwardScratch& scratch, const Panel& p) const {
  const int64_t Do = mlp_.Do, H = mlp_.H, ld_g = in_pairs(Do);
  const int64_t e = p.range.e, h0 = p.h0, width = p.width, n = p.n, ld = p.ld;
  if (recomputes()) {
    layer(scratch, p, h0, scratch.h.data());
    if (mlp_.gated) layer(scratch, p, H + h0, scratch.up.data());
  }
  const bool is_float = mlp_.operand == Operand::kFloat32;
  const float* const g = is_float ? scratch.g.data() : scratch.left_g.data();
  float *const a = scratch.a.data(), *const by_a = scratch.by_a.data();
  const auto w2 = mlp_.right(mlp_.w2, e * Do * H + h0, Do, width, H, scratch.weights.data());
  gemm(mlp_.operand, n, width, Do, g, ld_g, w2.data, w2.ld, false, by_a, ld);
  float* const by_b1 = scratch.by_b1.data();
  std::fill_n(by_b1, 2 * kPanel, 0.0f);
  for (int64_t i = 0; i < p.m; ++i) hidden(scratch, p, i);
  for (int64_t half = 0; needs_.b1 && half < (mlp_.gated ? 2 : 1); ++half)
    kernels().add(p.sums.b1 + half * H + h0, by_b1 + half * kPanel, width);
  for (float* rest : {a, scratch.by_h.data(), scratch.by_up.data()})
    if (rest != nullptr) std::fill_n(rest + p.m * ld, (n - p.m) * ld, 0.0f);
  if (needs_.w2) {
    const auto of_a = mlp_.right(a, n, ld, ld, scratch.right_a.data());
    const float* const turned = scratch.turned_g.data();
    float* const sum = p.sums.w2 + (p.sums.is_tile ? 0 : h0 - p.range.first);
    gemm(
        mlp_.operand,
        Do,
        width,
        n,
        turned,
        n,
        of_a.data,
        of_a.ld,
        p.adds_weights,
        sum,
        p.sums.ld_w2);
    for (int64_t o = 0; p.is_last && p.sums.to_w2 != nullptr && o < Do; ++o)
      round(sum + o * p.sums.ld_w2, width, p.sums.to_w2, o * H + h0);
  }
  first_layer(scratch, p, 0, scratch.by_h.data(), p.adds_rows);
  if (mlp_.gated) first_layer(scratch, p, 1, scratch.by_up.data(), true);
}

// h [n, ld] <- channels c to c + width of the first layer once more, as the forward computed it.
void BackwardBlocks::layer(BackwardScratch& scratch, const Panel& p, int64_t c, float* h) const {
  const int64_t D = mlp_.D, from = p.range.e * mlp_.wide() + c, n = p.n;
  const auto w1 = mlp_.left(mlp_.w1, from * D, p.width, D, D, scratch.weights.data());
  float *const columns = scratch.columns.data(), *const inputs = scratch.inputs.data();
  gemm(mlp_.operand, p.width, n, D, w1.data, w1.ld, inputs, n, false, columns, n);
  if (mlp_.b1)
    kernels().add_to_rows(columns, p.width, n, mlp_.b1.read(from, p.width, scratch.row.data()));
  kernels().round_to[int(mlp_.element)](columns, p.width * n);
  // What lies behind the last channel is turned with it, and not read.
  kernels().transpose32(columns, n, p.ld, n, h, p.ld);
}

// One row of a panel: a times the weight, the gradient by h, and what the weight gets of it.
void BackwardBlocks::hidden(BackwardScratch& scratch, const Panel& p, int64_t i) const {
  const int64_t width = p.width, at = i * p.ld;
  float *h = scratch.h.data() + at, *up = mlp_.gated ? scratch.up.data() + at : nullptr;
  const float *of_h = h, *of_up = up;
  if (!recomputes()) {
    const int64_t saved = p.rows[i] * mlp_.wide() + p.h0;
    of_h = h_.read(saved, width, h);
    if (mlp_.gated) of_up = h_.read(saved + mlp_.H, width, up);
  }
  float* const factors = scratch.factors.data();
  if (mlp_.hidden.threshold > 0) {
    std::fill_n(factors, width, 1.0f);
    kernels().dropout_row(mlp_.hidden, mlp_.slot(p.rows[i]), p.h0, factors, width);
  }
  float* const by_h = scratch.by_h.data() + at;
  float* const by_up = mlp_.gated ? scratch.by_up.data() + at : nullptr;
  const float by_weight = kernels().hidden_backward[mlp_.activation](
      scratch.by_a.data() + at,
      of_h,
      of_up,
      factors,
      scratch.weight[i],
      width,
      scratch.a.data() + at,
      by_h,
      by_up);
  if (mlp_.output_activation == kIdentity && mlp_.weight_at == WeightAt::kOutput)
    scratch.by_weight[i] += by_weight;
  if (!needs_.b1) return;
  kernels().add(scratch.by_b1.data(), by_h, width);
  if (mlp_.gated) kernels().add(scratch.by_b1.data() + kPanel, by_up, width);
}

// The products with `by_h` [n, ld], the gradient of the panel's channels, or of their up channels.
void BackwardBlocks::first_layer(
    BackwardScratch& scratch,
    const Panel& p,
    int64_t half,
    const float* by_h,
    bool adds_rows) const {
  const int64_t D = mlp_.D, n = p.n, ld = p.ld, ld_u = in_pairs(D), width = p.width;
  const int64_t at = (p.range.e * mlp_.wide() + half * mlp_.H + p.h0) * D;
  const void* const left = mlp_.left(by_h, n, ld, scratch.left_by_h.data());
  if (needs_.rows() || mlp_.weight_at == WeightAt::kInput) {
    const auto w1 = mlp_.right(mlp_.w1, at, width, D, D, scratch.weights.data());
    float* const by_u = scratch.by_u.data();
    gemm(mlp_.operand, n, D, width, left, ld, w1.data, w1.ld, adds_rows, by_u, D);
  }
  if (!needs_.w1) return;
  const bool is_float = mlp_.operand == Operand::kFloat32;
  const float* const u = is_float ? scratch.u.data() : scratch.right_u.data();
  float* const turned = scratch.turned.data();
  const int64_t from = half * p.sums.up_w1 + (p.h0 - p.range.first) * D;
  float* const sum = p.sums.w1 + (p.sums.is_tile ? 0 : from);
  mlp_.turn_left(left, n, ld, turned);
  gemm(mlp_.operand, width, D, n, turned, n, u, ld_u, p.adds_weights, sum, D);
  if (p.is_last && p.sums.to_w1 != nullptr)
    round(sum, width * D, p.sums.to_w1, (half * mlp_.H + p.h0) * D);
}

}  // namespace m2ae::cpu
