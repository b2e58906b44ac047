// expert_mlp on the CPU, backward: who computes what, and registration. Contract and math:
// m2ae_kernels/ops/expert_mlp.py
//
// A worker takes an expert, or one of `splits` equal parts of its hidden channels where there are
// few experts, and all of its rows in blocks, in their order: so the gradients of weights
// are sums of one worker each, and no result depends on the number of threads. What the rows of x
// get from it goes to [splits, N, D] in float32, and is then summed token by token.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "expert_mlp_backward.h"

namespace m2ae::cpu {
namespace {

constexpr int64_t kPanel = BackwardScratch::kPanel;
constexpr int64_t kTasks = 8;       // experts times splits, at least, if H allows
constexpr int64_t kTokenTask = 64;  // tokens whose gradients are summed together
constexpr int kFloat = int(Element::kFloat32);

class Backward {
 public:
  Backward(
      const ExpertMlp& mlp,
      const BackwardNeeds& needs,
      const Floats& grad,
      const Floats& h,
      const Floats& y)
      : mlp_(mlp),
        needs_(needs),
        blocks_(mlp, needs, grad, h, y),
        segments_(mlp.segments(1)),
        block_(BackwardScratch::block_of(mlp)),
        splits_(std::max<int64_t>(std::min((kTasks + mlp.E - 1) / mlp.E, mlp.H / (2 * kPanel)), 1)),
        of_b1_(needs.b1 ? mlp.E * mlp.wide() : 0),
        of_b2_(needs.b2 ? mlp.E * mlp.Do : 0),
        by_rows_(needs.rows() ? splits_ * mlp.N * mlp.D : 0),
        by_weight_(splits_ * mlp.N),
        w1(gradient(needs.w1, {mlp.E, mlp.wide(), mlp.D})),
        w2(gradient(needs.w2, {mlp.E, mlp.Do, mlp.H})),
        b1(gradient(needs.b1, {mlp.E, mlp.wide()})),
        b2(gradient(needs.b2, {mlp.E, mlp.Do})) {}

  void run() {
    std::vector<int64_t> order(mlp_.E * splits_);  // the longest first, so that none is left over
    for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i);
    const auto rows_of = [&](int64_t task) {
      return segments_.begin[task / splits_ + 1] - segments_.begin[task / splits_];
    };
    std::stable_sort(order.begin(), order.end(), [&](int64_t one, int64_t other) {
      return rows_of(one) > rows_of(other);
    });
    for (int64_t q = 0; q < splits_; ++q)
      most_channels_ = std::max(most_channels_, first_of(q + 1) - first_of(q));
    share_out(
        int64_t(order.size()),
        [&] { return BackwardScratch(mlp_, blocks_.recomputes()); },
        [&](BackwardScratch& scratch, int64_t i) {
          task(scratch, order[i] / splits_, order[i] % splits_);
        },
        mlp_.operand);
  }

  Tensor grad_x() const {
    const int64_t T = mlp_.T, D = mlp_.D;
    Tensor gradient = torch::stable::new_empty(mlp_.x.tensor, {T, D});
    char* const to = static_cast<char*>(gradient.mutable_data_ptr());
    share_out(
        (T + kTokenTask - 1) / kTokenTask,
        [&] { return Buffer<float>(D); },
        [&](Buffer<float>& sum, int64_t task) {
          for (int64_t t = task * kTokenTask; t < std::min(T, (task + 1) * kTokenTask); ++t) {
            std::fill_n(sum.data(), D, 0.0f);
            for (int64_t s = 0; s < mlp_.S; ++s) add_row_of(s * T + t, sum.data());
            kernels().cast[kFloat][int(mlp_.element)](
                sum.data(), to + t * D * bytes_of(mlp_.element), D);
          }
        });
    return gradient;
  }

  Tensor grad_shift() const {
    const int64_t D = mlp_.D;
    Tensor gradient = torch::stable::new_empty(mlp_.x.tensor, {mlp_.S, D});
    char* const to = static_cast<char*>(gradient.mutable_data_ptr());
    share_out(
        mlp_.S,
        [&] { return std::vector<float>(2 * D); },
        [&](std::vector<float>& row, int64_t s) {
          std::vector<double> sum(D, 0.0);  // over all tokens
          for (int64_t t = 0; t < mlp_.T; ++t) {
            std::fill(row.begin(), row.begin() + D, 0.0f);
            add_row_of(s * mlp_.T + t, row.data());
            for (int64_t d = 0; d < D; ++d) sum[d] += double(row[d]);
          }
          std::copy(sum.begin(), sum.end(), row.begin());
          kernels().cast[kFloat][int(mlp_.element)](
              row.data(), to + s * D * bytes_of(mlp_.element), D);
        });
    return gradient;
  }

  Tensor grad_weights(const Tensor& like) const {
    Tensor gradient = torch::stable::new_zeros(like, {mlp_.R, mlp_.k});
    float* const to = gradient.mutable_data_ptr<float>();
    if (mlp_.weight_at == WeightAt::kNowhere) return gradient;
    for (int64_t i = 0; i < segments_.begin.back(); ++i) {
      const int32_t row = segments_.rows[i];
      float sum = 0;
      for (int64_t q = 0; q < splits_; ++q) sum += by_weight_[q * mlp_.N + row];
      to[mlp_.slot(row)] = sum;
    }
    return gradient;
  }

 private:
  Tensor gradient(bool is_needed, std::vector<int64_t> sizes) const {
    return torch::stable::new_empty(
        mlp_.x.tensor, is_needed ? std::move(sizes) : std::vector<int64_t>{0});
  }

  void add_row_of(int64_t r, float* sum /* [D] */) const {
    for (int64_t j = 0; j < mlp_.k; ++j) {
      const int64_t row = mlp_.place(r * mlp_.k + j);
      if (row < 0) continue;
      for (int64_t q = 0; q < splits_; ++q)
        kernels().add(sum, by_rows_.data() + (q * mlp_.N + row) * mlp_.D, mlp_.D);
    }
  }

  // The hidden channels of split q begin here.
  int64_t first_of(int64_t q) const {
    const int64_t panels = (mlp_.H + kPanel - 1) / kPanel;
    return std::min(mlp_.H, panels * q / splits_ * kPanel);
  }

  int64_t halves() const { return mlp_.gated ? 2 : 1; }
  int64_t bytes() const { return bytes_of(mlp_.element); }

  // Where a task's sums go: into the gradients, or a worker's own memory until they are rounded.
  WeightSums sums_of(BackwardScratch& scratch, const HiddenRange& range, bool is_one_block) {
    const int64_t D = mlp_.D, Do = mlp_.Do, H = mlp_.H, wide = mlp_.wide(), e = range.e;
    const int64_t channels = range.last - range.first;
    WeightSums sums{};
    if (needs_.b1) sums.b1 = of_b1_.data() + e * wide;
    if (needs_.b2) sums.b2 = of_b2_.data() + e * Do;
    char* const to_w1 = needs_.w1 ? data_of(w1) + e * wide * D * bytes() : nullptr;
    char* const to_w2 = needs_.w2 ? data_of(w2) + e * Do * H * bytes() : nullptr;
    sums.up_w1 = (mlp_.element == Element::kFloat32 ? H : channels) * D;
    if (mlp_.element == Element::kFloat32) {
      if (needs_.w1) sums.w1 = reinterpret_cast<float*>(to_w1) + range.first * D;
      if (needs_.w2) sums.w2 = reinterpret_cast<float*>(to_w2) + range.first;
      sums.ld_w2 = H;
      return sums;
    }
    sums.to_w1 = to_w1;
    sums.to_w2 = to_w2;
    sums.is_tile = is_one_block;
    if (is_one_block) {
      sums.w1 = scratch.tile_w1.data();
      sums.w2 = scratch.tile_w2.data();
      sums.ld_w2 = kPanel;
      return sums;
    }
    if (needs_.w1 && scratch.w1.size() == 0)
      scratch.w1 = Buffer<float>(halves() * most_channels_ * D);
    if (needs_.w2 && scratch.w2.size() == 0) scratch.w2 = Buffer<float>(Do * most_channels_);
    sums.w1 = scratch.w1.data();
    sums.w2 = scratch.w2.data();
    sums.ld_w2 = channels;
    return sums;
  }

  static char* data_of(Tensor& tensor) { return static_cast<char*>(tensor.mutable_data_ptr()); }

  void task(BackwardScratch& scratch, int64_t e, int64_t q) {
    const HiddenRange range{e, q, first_of(q), first_of(q + 1)};
    const int64_t D = mlp_.D, H = mlp_.H, channels = range.last - range.first;
    const int64_t begin = segments_.begin[e], end = segments_.begin[e + 1];
    if (begin == end) zero(range);
    const WeightSums sums = sums_of(scratch, range, end - begin <= block_);
    for (int64_t half = 0; needs_.b1 && half < halves(); ++half)
      std::fill_n(sums.b1 + half * H + range.first, channels, 0.0f);
    if (needs_.b2 && q == 0) std::fill_n(sums.b2, mlp_.Do, 0.0f);
    for (int64_t i = begin; i < end; i += block_) {
      const int32_t* const rows = segments_.rows.data() + i;
      const int64_t m = std::min(block_, end - i);
      blocks_.run(scratch, range, rows, m, i == begin, i + m == end, sums);
      for (int64_t j = 0; j < m; ++j) {
        const int64_t to = q * mlp_.N + rows[j];
        by_weight_[to] = scratch.by_weight[j];
        if (needs_.rows()) std::copy_n(scratch.by_u.data() + j * D, D, &by_rows_[to * D]);
      }
    }
    for (int64_t half = 0; needs_.b1 && half < halves(); ++half) {
      const int64_t from = half * H + range.first;
      blocks_.round(sums.b1 + from, channels, data_of(b1), e * mlp_.wide() + from);
    }
    if (needs_.b2 && q == 0) blocks_.round(sums.b2, mlp_.Do, data_of(b2), e * mlp_.Do);
  }

  // The gradients of weights that no row has met.
  void zero(const HiddenRange& range) {
    const int64_t D = mlp_.D, Do = mlp_.Do, H = mlp_.H, e = range.e;
    const int64_t channels = range.last - range.first;
    for (int64_t half = 0; needs_.w1 && half < halves(); ++half) {
      const int64_t from = (e * mlp_.wide() + half * H + range.first) * D;
      std::memset(data_of(w1) + from * bytes(), 0, channels * D * bytes());
    }
    for (int64_t o = 0; needs_.w2 && o < Do; ++o) {
      const int64_t from = (e * Do + o) * H + range.first;
      std::memset(data_of(w2) + from * bytes(), 0, channels * bytes());
    }
  }

  const ExpertMlp& mlp_;
  const BackwardNeeds needs_;
  const BackwardBlocks blocks_;
  const ExpertMlp::Segments segments_;  // one group: all rows of each expert
  const int64_t block_, splits_;
  int64_t most_channels_ = 0;    // of a task
  Buffer<float> of_b1_, of_b2_;  // [E, H or 2 H], [E, Do]
  Buffer<float> by_rows_;        // [splits, N, D]
  Buffer<float> by_weight_;      // [splits, N]

 public:
  Tensor w1, w2, b1, b2;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients expert_mlp_backward_cpu(
    const Tensor& grad /* [R, Do] */,
    const Tensor& x /* [T, D] */,
    const Tensor& w1 /* [E, H or 2 H, D] */,
    const Tensor& w2 /* [E, Do, H] */,
    const Tensor& topk_weights /* [R, k] */,
    const std::optional<Tensor>& b1,     // [E, H or 2 H]
    const std::optional<Tensor>& b2,     // [E, Do]
    const std::optional<Tensor>& shift,  // [S, D]
    const std::optional<Tensor>& seed,   // [2]
    const Tensor& sorted_ids /* [N] */,
    const Tensor& inverse_ids /* [R, k] */,
    const Tensor& expert_offsets /* [E + 1] */,
    const Tensor& h /* [N, H or 2 H] or [0] */,
    const Tensor& y /* [N, Do] or [0] */,
    int64_t activation,
    int64_t output_activation,
    double dropout_p,
    double output_dropout_p,
    int64_t weight_at,
    const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 7, "expert_mlp: expected 7 flags in output_mask");
  const ExpertMlp mlp(
      {x,
       w1,
       w2,
       topk_weights,
       b1,
       b2,
       shift,
       seed,
       sorted_ids,
       inverse_ids,
       expert_offsets,
       activation,
       output_activation,
       dropout_p,
       output_dropout_p,
       weight_at});
  const BackwardNeeds needs{
      output_mask[0],
      output_mask[1],
      output_mask[2],
      output_mask[3],
      output_mask[4] && b1,
      output_mask[5] && b2,
      output_mask[6] && shift};
  const Floats of_out("grad", grad, {mlp.R, mlp.Do});
  const Floats of_h = h.dim() == 1 ? Floats() : Floats("h", h, {mlp.N, mlp.wide()});
  const Floats of_y = output_activation == kIdentity ? Floats() : Floats("y", y, {mlp.N, mlp.Do});
  Backward backward(mlp, needs, of_out, of_h, of_y);
  backward.run();
  const auto none = [&] { return torch::stable::new_empty(x, {0}); };
  return {
      needs.x ? backward.grad_x() : none(),
      backward.w1,
      backward.w2,
      needs.weights ? backward.grad_weights(topk_weights) : none(),
      backward.b1,
      backward.b2,
      needs.shift ? backward.grad_shift() : none()};
}

}  // namespace
}  // namespace m2ae::cpu

STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CPU, m) {
  m.impl("expert_mlp_backward", TORCH_BOX(&m2ae::cpu::expert_mlp_backward_cpu));
}
