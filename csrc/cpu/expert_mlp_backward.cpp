// expert_mlp on the CPU, backward: who computes what, and registration. Contract and math:
// m2ae_kernels/ops/expert_mlp.py
//
// A worker takes an expert, or one of `splits` equal parts of its hidden channels where there are
// few experts, and all of its rows in blocks of kBlock, in their order: so the gradients of weights
// are sums of one worker each, and no result depends on the number of threads. What the rows of x
// get from it goes to [splits, N, D] in float32, and is then summed token by token.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "expert_mlp_backward.h"

namespace m2ae::cpu {
namespace {

constexpr int64_t kBlock = BackwardScratch::kBlock;
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
        grad_(grad),
        h_(h),
        y_(y),
        segments_(mlp.segments(1)),
        splits_(std::max<int64_t>(std::min((kTasks + mlp.E - 1) / mlp.E, mlp.H / (2 * kPanel)), 1)),
        w1(mlp.w1.tensor, {mlp.E, mlp.wide(), mlp.D}, needs.w1, mlp.element),
        w2(mlp.w2.tensor, {mlp.E, mlp.Do, mlp.H}, needs.w2, mlp.element),
        b1(mlp.w1.tensor, {mlp.E, mlp.wide()}, needs.b1, mlp.element),
        b2(mlp.w1.tensor, {mlp.E, mlp.Do}, needs.b2, mlp.element),
        by_rows_(needs.rows() ? splits_ * mlp.N * mlp.D : 0),
        by_weight_(splits_ * mlp.N) {}

  void run() {
    std::vector<int64_t> order(mlp_.E * splits_);  // the longest first, so that none is left over
    for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i);
    const auto rows_of = [&](int64_t task) {
      return segments_.begin[task / splits_ + 1] - segments_.begin[task / splits_];
    };
    std::stable_sort(order.begin(), order.end(), [&](int64_t one, int64_t other) {
      return rows_of(one) > rows_of(other);
    });
    share_out(
        int64_t(order.size()),
        [&] { return BackwardScratch(mlp_); },
        [&](BackwardScratch& scratch, int64_t i) {
          task(scratch, order[i] / splits_, order[i] % splits_);
        });
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
  void add_row_of(int64_t r, float* sum /* [D] */) const {
    for (int64_t j = 0; j < mlp_.k; ++j) {
      const int64_t row = mlp_.place(r * mlp_.k + j);
      if (row < 0) continue;
      for (int64_t q = 0; q < splits_; ++q)
        kernels().add(sum, by_rows_.data() + (q * mlp_.N + row) * mlp_.D, mlp_.D);
    }
  }

  // The hidden channels of split q: [first, last).
  int64_t first_of(int64_t q) const {
    const int64_t panels = (mlp_.H + kPanel - 1) / kPanel;
    return std::min(mlp_.H, panels * q / splits_ * kPanel);
  }

  void task(BackwardScratch& scratch, int64_t e, int64_t q) {
    const int64_t first = first_of(q), last = first_of(q + 1), H = mlp_.H;
    const int64_t D = mlp_.D, Do = mlp_.Do, wide = mlp_.wide();
    const int64_t halves = mlp_.gated ? 2 : 1;
    const int64_t begin = segments_.begin[e], end = segments_.begin[e + 1];
    if (needs_.b1)
      for (int64_t half = 0; half < halves; ++half)
        std::fill_n(b1.data + e * wide + half * H + first, last - first, 0.0f);
    if (needs_.b2 && q == 0) std::fill_n(b2.data + e * Do, Do, 0.0f);
    if (begin == end) {
      for (int64_t half = 0; needs_.w1 && half < halves; ++half)
        std::fill_n(w1.data + (e * wide + half * H + first) * D, (last - first) * D, 0.0f);
      for (int64_t o = 0; needs_.w2 && o < Do; ++o)
        std::fill_n(w2.data + (e * Do + o) * H + first, last - first, 0.0f);
    }
    for (int64_t i = begin; i < end; i += kBlock) {
      const int32_t* const rows = segments_.rows.data() + i;
      block(scratch, e, q, rows, std::min(kBlock, end - i), i == begin);
    }
    for (int64_t half = 0; half < halves; ++half) {
      const int64_t from = e * wide + half * H + first;
      if (needs_.w1) w1.store(from * D, (last - first) * D, mlp_.element);
      if (needs_.b1) b1.store(from, last - first, mlp_.element);
    }
    for (int64_t o = 0; needs_.w2 && o < Do; ++o)
      w2.store((e * Do + o) * H + first, last - first, mlp_.element);
    if (needs_.b2 && q == 0) b2.store(e * Do, Do, mlp_.element);
  }

  void block(
      BackwardScratch& scratch,
      int64_t e,
      int64_t q,
      const int32_t* rows,
      int64_t m,
      bool is_first) {
    const int64_t D = mlp_.D, Do = mlp_.Do, n = in_lanes(m), ld_g = in_lanes(Do);
    const bool at_input = mlp_.weight_at == WeightAt::kInput;
    std::fill_n(scratch.u.data() + m * D, (n - m) * D, 0.0f);
    mlp_.gather(rows, m, at_input, scratch.u.data(), D);
    std::fill_n(scratch.g.data(), n * ld_g, 0.0f);
    std::fill_n(scratch.by_b2.data(), Do, 0.0f);
    for (int64_t i = 0; i < m; ++i) output(scratch, e, q, rows[i], i);
    if (needs_.b2 && q == 0) kernels().add(b2.data + e * Do, scratch.by_b2.data(), Do);
    kernels().transpose32(scratch.g.data(), ld_g, n, ld_g, scratch.turned_g.data(), n);
    const int64_t first = first_of(q), last = first_of(q + 1);
    for (int64_t h0 = first; h0 < last; h0 += kPanel)
      panel(scratch, e, h0, std::min(kPanel, last - h0), rows, m, h0 > first, !is_first);
    for (int64_t i = 0; i < m; ++i) {
      float* const by_u = scratch.by_u.data() + i * D;
      if (at_input) {
        float* const u = scratch.row.data();
        mlp_.gather(rows + i, 1, false, u, D);
        scratch.by_weight[i] = float(kernels().dot_rows[kFloat](by_u, u, D));
        kernels().siglip_scale[kFloat](by_u, mlp_.weight(rows[i]), D, by_u);
      }
      by_weight_[q * mlp_.N + rows[i]] = scratch.by_weight[i];
      if (needs_.rows()) std::copy_n(by_u, D, by_rows_.data() + (q * mlp_.N + rows[i]) * D);
    }
  }

  // g of one row, its part of the gradient of b2, and that of its weight without the hidden layer.
  void output(BackwardScratch& scratch, int64_t e, int64_t q, int32_t row, int64_t i) {
    const int64_t Do = mlp_.Do, r = mlp_.slot(row) / mlp_.k;
    float *const g = scratch.g.data() + i * in_lanes(Do), *const z = scratch.z.data();
    grad_.load(r * Do, Do, g);
    if (mlp_.output.threshold > 0) kernels().dropout_row(mlp_.output, mlp_.slot(row), 0, g, Do);
    scratch.by_weight[i] = 0;
    scratch.weight[i] = mlp_.factor(row);
    if (mlp_.output_activation != kIdentity) {
      const float* const y = y_.read(row * Do, Do, scratch.row.data());
      kernels().activate[mlp_.output_activation](y, nullptr, Do, z);
      if (q == 0) scratch.by_weight[i] = float(kernels().dot_rows[kFloat](g, z, Do));
      kernels().activate_backward[mlp_.output_activation](g, y, nullptr, Do, g, nullptr);
    } else if (mlp_.b2 && q == 0) {
      const float* const bias = mlp_.b2.read(e * Do, Do, scratch.row.data());
      scratch.by_weight[i] = float(kernels().dot_rows[kFloat](g, bias, Do));
    }
    if (needs_.b2 && q == 0)
      kernels().add_row[kFloat](g, scratch.weight[i], scratch.by_b2.data(), Do);
  }

  // Hidden channels h0 to h0 + width for one block.
  void panel(
      BackwardScratch& scratch,
      int64_t e,
      int64_t h0,
      int64_t width,
      const int32_t* rows,
      int64_t m,
      bool adds_rows,
      bool adds_weights) {
    const int64_t Do = mlp_.Do, H = mlp_.H, n = in_lanes(m), ld_g = in_lanes(Do);
    const int64_t ld = in_lanes(width);
    const Floats::Matrix of_w2 =
        mlp_.w2.matrix(e * Do * H + h0, Do, width, H, scratch.weights.data());
    float *const a = scratch.a.data(), *const by_a = scratch.by_a.data();
    const float* const g = scratch.g.data();
    gemm(Operand::kFloat32, n, width, Do, g, ld_g, of_w2.data, of_w2.ld, false, by_a, ld);
    float* const by_b1 = scratch.by_b1.data();
    std::fill_n(by_b1, 2 * kPanel, 0.0f);
    for (int64_t i = 0; i < m; ++i) hidden(scratch, h0, width, rows[i], i, ld);
    for (int64_t half = 0; needs_.b1 && half < (mlp_.gated ? 2 : 1); ++half)
      kernels().add(b1.data + e * mlp_.wide() + half * H + h0, by_b1 + half * kPanel, width);
    for (float* rest : {a, scratch.by_h.data(), scratch.by_up.data()})
      if (rest != nullptr) std::fill_n(rest + m * ld, (n - m) * ld, 0.0f);
    if (needs_.w2)
      gemm(
          Operand::kFloat32,
          Do,
          width,
          n,
          scratch.turned_g.data(),
          n,
          a,
          ld,
          adds_weights,
          w2.data + e * Do * H + h0,
          H);
    first_layer(scratch, e, h0, width, n, scratch.by_h.data(), adds_rows, adds_weights);
    if (mlp_.gated)
      first_layer(scratch, e, H + h0, width, n, scratch.by_up.data(), true, adds_weights);
  }

  // One row of a panel: a times the weight, the gradient by h, and what the weight gets of it.
  void hidden(
      BackwardScratch& scratch, int64_t h0, int64_t width, int32_t row, int64_t i, int64_t ld) {
    const int64_t H = mlp_.H, wide = mlp_.wide();
    float *const a = scratch.a.data() + i * ld, *const by_a = scratch.by_a.data() + i * ld;
    float* const by_h = scratch.by_h.data() + i * ld;
    float* const by_up = mlp_.gated ? scratch.by_up.data() + i * ld : nullptr;
    const float* const h = h_.read(row * wide + h0, width, scratch.h.data());
    const float* const up =
        mlp_.gated ? h_.read(row * wide + H + h0, width, scratch.up.data()) : nullptr;
    kernels().activate[mlp_.activation](h, up, width, a);
    float* const factors = scratch.factors.data();
    const bool drops = mlp_.hidden.threshold > 0;
    if (drops) {
      std::fill_n(factors, width, 1.0f);
      kernels().dropout_row(mlp_.hidden, mlp_.slot(row), h0, factors, width);
      for (int64_t c = 0; c < width; ++c) a[c] *= factors[c];
    }
    if (mlp_.output_activation == kIdentity && mlp_.weight_at == WeightAt::kOutput)
      scratch.by_weight[i] += float(kernels().dot_rows[kFloat](by_a, a, width));
    const float weight = scratch.weight[i];
    if (drops)
      for (int64_t c = 0; c < width; ++c) by_a[c] *= factors[c];
    for (int64_t c = 0; c < width; ++c) by_a[c] *= weight, a[c] *= weight;
    kernels().activate_backward[mlp_.activation](by_a, h, up, width, by_h, by_up);
    if (!needs_.b1) return;
    kernels().add(scratch.by_b1.data(), by_h, width);
    if (mlp_.gated) kernels().add(scratch.by_b1.data() + kPanel, by_up, width);
  }

  // The products with `by_h` [n, width], the gradient of channels c to c + width.
  void first_layer(
      BackwardScratch& scratch,
      int64_t e,
      int64_t c,
      int64_t width,
      int64_t n,
      const float* by_h,
      bool adds_rows,
      bool adds_weights) {
    const int64_t D = mlp_.D, ld = in_lanes(width), at = (e * mlp_.wide() + c) * D;
    if (needs_.rows() || mlp_.weight_at == WeightAt::kInput) {
      const Floats::Matrix of_w1 = mlp_.w1.matrix(at, width, D, D, scratch.weights.data());
      float* const by_u = scratch.by_u.data();
      gemm(Operand::kFloat32, n, D, width, by_h, ld, of_w1.data, of_w1.ld, adds_rows, by_u, D);
    }
    if (!needs_.w1) return;
    float *const turned = scratch.turned.data(), *const sum = w1.data + at;
    kernels().transpose32(by_h, ld, n, ld, turned, n);
    gemm(Operand::kFloat32, width, D, n, turned, n, scratch.u.data(), D, adds_weights, sum, D);
  }

  const ExpertMlp& mlp_;
  const BackwardNeeds needs_;
  const Floats &grad_, &h_, &y_;
  const ExpertMlp::Segments segments_;  // one group: all rows of each expert
  const int64_t splits_;

 public:
  GradientSums w1, w2, b1, b2;

 private:
  Buffer<float> by_rows_;    // [splits, N, D]
  Buffer<float> by_weight_;  // [splits, N]
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
    const Tensor& h /* [N, H or 2 H] */,
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
  const Floats of_out("grad", grad, {mlp.R, mlp.Do}), of_h("h", h, {mlp.N, mlp.wide()});
  const Floats of_y = output_activation == kIdentity ? Floats() : Floats("y", y, {mlp.N, mlp.Do});
  Backward backward(mlp, needs, of_out, of_h, of_y);
  backward.run();
  const auto none = [&] { return torch::stable::new_empty(x, {0}); };
  return {
      needs.x ? backward.grad_x() : none(),
      backward.w1.gradient,
      backward.w2.gradient,
      needs.weights ? backward.grad_weights(topk_weights) : none(),
      backward.b1.gradient,
      backward.b2.gradient,
      needs.shift ? backward.grad_shift() : none()};
}

}  // namespace
}  // namespace m2ae::cpu

STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CPU, m) {
  m.impl("expert_mlp_backward", TORCH_BOX(&m2ae::cpu::expert_mlp_backward_cpu));
}
