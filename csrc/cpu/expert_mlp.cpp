// expert_mlp on the CPU, forward: who computes what, and registration. The loops that are no
// products are in expert_mlp_kernel.h; contract and math: m2ae_kernels/ops/expert_mlp.py
//
// A worker takes a group of rows of the routing, and adds to their outputs alone, expert by expert,
// so no sum depends on the number of threads. It takes an expert's rows in blocks of kBlock, with
// tokens in columns: the weights are then the left operand of each product, as they lie in memory,
// and a block's h, a and y stay in the second-level cache. Only h leaves it, if a backward is to
// follow.
#include "expert_mlp.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>

namespace m2ae::cpu {
namespace {

constexpr int64_t kBlock = 64;          // tokens that go through an expert together
constexpr int64_t kPanel = 256;         // hidden channels of one step, a multiple of 4
constexpr int64_t kRowsPerGroup = 128;  // of an expert, on average: less would leave blocks short
constexpr int64_t kMaxGroups = 64;

// One worker's memory.
struct Scratch {
  Buffer<float> rows, packed_rows, inputs;   // [kBlock, D], and transposed
  Buffer<float> h, up, a, packed_a, turned;  // [kPanel, kBlock], and transposed
  Buffer<float> y, outputs;                  // [Do, kBlock] and transposed
  Buffer<float> weights, bias, sums;
  int32_t slots[kBlock];

  Scratch(const ExpertMlp& mlp, int64_t rows_of_group)
      : rows(kBlock * in_pairs(mlp.D)),
        packed_rows(mlp.packed(rows.size())),
        inputs(rows.size()),
        h(kPanel * kBlock),
        up(mlp.gated ? kPanel * kBlock : 0),
        a(kPanel * kBlock),
        packed_a(mlp.packed(a.size())),
        turned(kPanel * kBlock),
        y(kBlock * in_lanes(mlp.Do)),
        outputs(kBlock * in_lanes(mlp.Do)),
        weights(mlp.packed_weights(kPanel * std::max(mlp.D, mlp.Do))),
        bias(std::max(kPanel, mlp.Do)),
        sums(mlp.element == Element::kFloat32 ? 0 : rows_of_group * mlp.Do) {}
};

class Forward {
 public:
  Forward(const ExpertMlp& mlp, Tensor* out, Tensor* h, Tensor* y)
      : mlp_(mlp),
        out_(static_cast<char*>(out->mutable_data_ptr())),
        h_(h == nullptr ? nullptr : static_cast<char*>(h->mutable_data_ptr())),
        y_(y == nullptr ? nullptr : static_cast<char*>(y->mutable_data_ptr())) {}

  void run() {
    const int64_t slots_per_expert = mlp_.R * mlp_.k / mlp_.E;
    int64_t groups = 1;  // a function of the shape, not of the threads
    while (groups < kMaxGroups && slots_per_expert >= 2 * groups * kRowsPerGroup) groups *= 2;
    const ExpertMlp::Segments segments = mlp_.segments(groups);
    const int64_t rows_of_group = mlp_.R / groups + 1;
    share_out(
        groups,
        [&] { return Scratch(mlp_, rows_of_group); },
        [&](Scratch& scratch, int64_t g) { group(scratch, segments, g); },
        mlp_.operand);
  }

 private:
  void group(Scratch& scratch, const ExpertMlp::Segments& segments, int64_t g) {
    const int64_t first = mlp_.first_of_group(g, segments.groups);
    const int64_t count = mlp_.first_of_group(g + 1, segments.groups) - first;
    char* const out = out_ + first * mlp_.Do * bytes_of(mlp_.element);
    float* const sums =
        mlp_.element == Element::kFloat32 ? reinterpret_cast<float*>(out) : scratch.sums.data();
    std::fill_n(sums, count * mlp_.Do, 0.0f);
    for (int64_t e = 0; e < mlp_.E; ++e) {
      const int64_t segment = segments.index(g, e);
      const int64_t end = segments.begin[segment + 1];
      for (int64_t i = segments.begin[segment]; i < end; i += kBlock)
        block(scratch, e, segments.rows.data() + i, std::min(kBlock, end - i), first, sums);
    }
    if (mlp_.element != Element::kFloat32) store(sums, count * mlp_.Do, out);
  }

  void store(const float* from, int64_t n, char* to) const {
    kernels().cast[int(Element::kFloat32)][int(mlp_.element)](from, to, n);
  }

  // sums [rows of the group, Do] += the weighted outputs of expert e for `m` sorted rows.
  void block(
      Scratch& scratch, int64_t e, const int32_t* rows, int64_t m, int64_t first, float* sums) {
    const int64_t D = mlp_.D, Do = mlp_.Do, H = mlp_.H;
    const int64_t columns = in_lanes(m), ld = in_pairs(D);
    float* const gathered = scratch.rows.data();
    std::fill_n(gathered, columns * ld, 0.0f);
    mlp_.gather(rows, m, mlp_.weight_at == WeightAt::kInput, gathered, ld);
    const void* const packed = mlp_.left(gathered, columns, ld, scratch.packed_rows.data());
    mlp_.turn_right(packed, columns, ld, scratch.inputs.data());
    for (int64_t i = 0; i < columns; ++i) scratch.slots[i] = i < m ? mlp_.slot(rows[i]) : 0;
    for (int64_t h0 = 0; h0 < H; h0 += kPanel) {
      const int64_t n = std::min(kPanel, H - h0);
      layer(scratch, e, h0, n, rows, m, scratch.h.data());
      if (mlp_.gated) layer(scratch, e, H + h0, n, rows, m, scratch.up.data());
      float* const a = scratch.a.data();
      kernels().activate[mlp_.activation](scratch.h.data(), scratch.up.data(), n * columns, a);
      if (mlp_.hidden.threshold > 0)
        kernels().dropout_columns(mlp_.hidden, scratch.slots, h0, a, n, columns);
      const auto w2 = mlp_.left(mlp_.w2, e * Do * H + h0, Do, n, H, scratch.weights.data());
      const auto of_a = mlp_.right(a, n, columns, columns, scratch.packed_a.data());
      float* const y = scratch.y.data();
      gemm(mlp_.operand, Do, columns, n, w2.data, w2.ld, of_a.data, columns, h0 > 0, y, columns);
    }
    const int64_t ld_y = in_lanes(Do);
    // What lies behind the last row of y is turned with it, and not read.
    kernels().transpose32(scratch.y.data(), columns, ld_y, columns, scratch.outputs.data(), ld_y);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t r = mlp_.slot(rows[i]) / mlp_.k;
      output(scratch, e, rows[i], scratch.outputs.data() + i * ld_y, sums + (r - first) * Do);
    }
  }

  // h [n, columns] <- channels c to c + n of the first layer, kept for the backward.
  void layer(
      Scratch& scratch, int64_t e, int64_t c, int64_t n, const int32_t* rows, int64_t m, float* h) {
    const int64_t D = mlp_.D, wide = mlp_.wide(), columns = in_lanes(m);
    const auto w1 = mlp_.left(mlp_.w1, (e * wide + c) * D, n, D, D, scratch.weights.data());
    const float* const inputs = scratch.inputs.data();
    gemm(mlp_.operand, n, columns, D, w1.data, w1.ld, inputs, columns, false, h, columns);
    if (mlp_.b1)
      kernels().add_to_rows(h, n, columns, mlp_.b1.read(e * wide + c, n, scratch.bias.data()));
    kernels().round_to[int(mlp_.element)](h, n * columns);
    if (h_ == nullptr) return;
    const int64_t depth = in_lanes(n), bytes = bytes_of(mlp_.element);
    float* const turned = scratch.turned.data();
    kernels().transpose32(h, columns, depth, columns, turned, depth);
    for (int64_t i = 0; i < m; ++i) store(turned + i * depth, n, h_ + (rows[i] * wide + c) * bytes);
  }

  // sum [Do] += w dropout(act(y + bias)) of one sorted row.
  void output(Scratch& scratch, int64_t e, int32_t row, float* y, float* sum) {
    const int64_t Do = mlp_.Do;
    if (mlp_.b2) kernels().add(y, mlp_.b2.read(e * Do, Do, scratch.bias.data()), Do);
    if (mlp_.output_activation != kIdentity) {
      kernels().round_to[int(mlp_.element)](y, Do);
      if (y_ != nullptr) store(y, Do, y_ + row * Do * bytes_of(mlp_.element));
      kernels().activate[mlp_.output_activation](y, nullptr, Do, y);
    }
    if (mlp_.output.threshold > 0) kernels().dropout_row(mlp_.output, mlp_.slot(row), 0, y, Do);
    kernels().add_row[int(Operand::kFloat32)](y, mlp_.factor(row), sum, Do);
  }

  const ExpertMlp& mlp_;
  char *out_, *h_, *y_;
};

// [N, columns] for what a backward needs: rows without a slot are zero.
Tensor saved_rows(const ExpertMlp& mlp, const Tensor& like, int64_t columns) {
  Tensor rows = torch::stable::new_empty(like, {mlp.N, columns});
  char* const data = static_cast<char*>(rows.mutable_data_ptr());
  const int64_t bytes = columns * bytes_of(mlp.element);
  const ExpertMlp::Segments used = mlp.segments(1);
  std::vector<bool> is_used(mlp.N, false);
  for (int64_t i = 0; i < used.begin.back(); ++i) is_used[used.rows[i]] = true;
  for (int64_t i = 0; i < mlp.N; ++i)
    if (!is_used[i]) std::memset(data + i * bytes, 0, bytes);
  return rows;
}

std::tuple<Tensor, Tensor, Tensor> expert_mlp_cpu(
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
    int64_t activation,
    int64_t output_activation,
    double dropout_p,
    double output_dropout_p,
    int64_t weight_at,
    bool saves) {
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
  Tensor out = torch::stable::new_empty(x, {mlp.R, mlp.Do});
  const bool saves_y = saves && output_activation != kIdentity;
  Tensor h = saves ? saved_rows(mlp, x, mlp.wide()) : torch::stable::new_empty(x, {0});
  Tensor y = saves_y ? saved_rows(mlp, x, mlp.Do) : torch::stable::new_empty(x, {0});
  Forward(mlp, &out, saves ? &h : nullptr, saves_y ? &y : nullptr).run();
  return {out, h, y};
}

}  // namespace
}  // namespace m2ae::cpu

STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CPU, m) {
  m.impl("expert_mlp", TORCH_BOX(&m2ae::cpu::expert_mlp_cpu));
}
