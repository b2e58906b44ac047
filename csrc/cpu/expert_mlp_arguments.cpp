// The arguments of expert_mlp: what memory safety needs checked, and how they are read.
#include <algorithm>
#include <cmath>

#include "expert_mlp.h"

namespace m2ae::cpu {
namespace {

constexpr const char* kOp = "expert_mlp";

bool has_sizes(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  if (tensor.dim() != int64_t(sizes.size())) return false;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (tensor.size(int64_t(d)) != sizes[d]) return false;
  return true;
}

void check(const char* name, const Tensor& tensor, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && has_sizes(tensor, sizes),
      kOp,
      ": expected ",
      name,
      " of another shape or on the CPU");
}

Tensor checked(
    const char* name, const Tensor& tensor, const std::vector<int64_t>& sizes, ScalarType dtype) {
  check(name, tensor, sizes);
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype,
      kOp,
      ": expected ",
      name,
      " in ",
      toString(dtype),
      ", got ",
      toString(tensor.scalar_type()));
  return torch::stable::contiguous(tensor);
}

Dropout dropout_of(const std::optional<Tensor>& seed, double p, uint32_t which) {
  Dropout dropout;
  if (p <= 0) return dropout;
  STD_TORCH_CHECK(seed.has_value(), kOp, ": expected a seed for dropout, got none");
  const Tensor dense = checked("seed", *seed, {2}, ScalarType::Long);
  const auto* const given = static_cast<const int64_t*>(dense.const_data_ptr());
  dropout.key[0] = uint32_t(uint64_t(given[0]));
  dropout.key[1] = uint32_t(uint64_t(given[0]) >> 32);
  dropout.stream = (uint32_t(uint64_t(given[1])) & 0x7fffffffu) * 2 + which;
  dropout.threshold = uint32_t(std::min(std::nearbyint(p * 0x1p32), 0x1p32 - 1));
  dropout.scale = float(1 / (1 - p));
  return dropout;
}

}  // namespace

Floats::Floats(const char* name, const Tensor& given, std::vector<int64_t> sizes) {
  check(name, given, sizes);
  switch (given.scalar_type()) {
    case ScalarType::Float:
      element = Element::kFloat32;
      break;
    case ScalarType::BFloat16:
      element = Element::kBFloat16;
      break;
    case ScalarType::Half:
      element = Element::kFloat16;
      break;
    default:
      STD_TORCH_CHECK(
          false,
          kOp,
          ": expected ",
          name,
          " in float32, bfloat16 or float16, got ",
          toString(given.scalar_type()));
  }
  tensor = torch::stable::contiguous(given);
  data = static_cast<const char*>(tensor.const_data_ptr());
}

ExpertMlp::ExpertMlp(const ExpertArguments& given) {
  STD_TORCH_CHECK(
      given.x.dim() == 2 && given.w2.dim() == 3 && given.inverse_ids.dim() == 2 &&
          given.sorted_ids.dim() == 1,
      kOp,
      ": expected x [T, D], w2 [E, Do, H], inverse_ids [R, k], sorted_ids [N]");
  const auto in_table = [](int64_t id, int64_t end) { return id >= 0 && id < end; };
  STD_TORCH_CHECK(
      in_table(given.activation, kActivations) && in_table(given.output_activation, kFirstGated) &&
          in_table(given.weight_at, 3),
      kOp,
      ": expected a known activation and place of the weight");
  activation = given.activation, output_activation = given.output_activation;
  gated = activation >= kFirstGated;
  weight_at = WeightAt(given.weight_at);
  T = given.x.size(0), D = given.x.size(1);
  E = given.w2.size(0), Do = given.w2.size(1), H = given.w2.size(2);
  R = given.inverse_ids.size(0), k = given.inverse_ids.size(1), N = given.sorted_ids.size(0);
  S = given.shift ? given.shift->size(0) : 1;
  STD_TORCH_CHECK(R == S * T, kOp, ": expected S * T = ", S * T, " rows, got ", R);
  x = Floats("x", given.x, {T, D});
  w1 = Floats("w1", given.w1, {E, wide(), D});
  w2 = Floats("w2", given.w2, {E, Do, H});
  element = x.element;
  const bool is_even = D % 2 == 0 && H % 2 == 0 && Do % 2 == 0;
  operand = element == Element::kBFloat16 && is_even && has_bfloat16_gemm() ? Operand::kBFloat16
                                                                            : Operand::kFloat32;
  if (given.b1) b1 = Floats("b1", *given.b1, {E, wide()});
  if (given.b2) b2 = Floats("b2", *given.b2, {E, Do});
  if (given.shift) shift = Floats("shift", *given.shift, {S, D});
  hidden = dropout_of(given.seed, given.dropout_p, 0);
  output = dropout_of(given.seed, given.output_dropout_p, 1);

  topk_weights_ = checked("topk_weights", given.topk_weights, {R, k}, ScalarType::Float);
  sorted_ = checked("sorted_ids", given.sorted_ids, {N}, ScalarType::Int);
  inverse_ = checked("inverse_ids", given.inverse_ids, {R, k}, ScalarType::Int);
  offsets_ = checked("expert_offsets", given.expert_offsets, {E + 1}, ScalarType::Int);
  weights_ = static_cast<const float*>(topk_weights_.const_data_ptr());
  sorted_ids_ = static_cast<const int32_t*>(sorted_.const_data_ptr());
  inverse_ids_ = static_cast<const int32_t*>(inverse_.const_data_ptr());
  expert_offsets_ = static_cast<const int32_t*>(offsets_.const_data_ptr());
  bool fits = expert_offsets_[0] >= 0 && expert_offsets_[E] <= N;
  for (int64_t e = 0; e < E; ++e) fits &= expert_offsets_[e] <= expert_offsets_[e + 1];
  for (int64_t i = 0; i < N; ++i) fits &= sorted_ids_[i] >= -1 && sorted_ids_[i] < R * k;
  for (int64_t i = 0; i < R * k; ++i) fits &= inverse_ids_[i] >= -1 && inverse_ids_[i] < N;
  STD_TORCH_CHECK(fits, kOp, ": expected a routing as moe_sort returns it, got ids out of range");
}

ExpertMlp::Segments ExpertMlp::segments(int64_t groups) const {
  Segments made{groups, E, Buffer<int32_t>(N), std::vector<int64_t>(groups * E + 1, 0)};
  std::vector<int32_t> group_of(R);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t r = first_of_group(g, groups); r < first_of_group(g + 1, groups); ++r)
      group_of[r] = int32_t(g);
  const auto each = [&](const auto& visit) {
    for (int64_t e = 0; e < E; ++e)
      for (int64_t i = expert_offsets_[e]; i < expert_offsets_[e + 1]; ++i)
        if (sorted_ids_[i] >= 0) visit(made.index(group_of[sorted_ids_[i] / k], e), i);
  };
  each([&](int64_t segment, int64_t) { ++made.begin[segment + 1]; });
  for (size_t s = 1; s < made.begin.size(); ++s) made.begin[s] += made.begin[s - 1];
  std::vector<int64_t> next(made.begin);
  each([&](int64_t segment, int64_t i) { made.rows[next[segment]++] = int32_t(i); });
  return made;
}

void ExpertMlp::gather(const int32_t* rows, int64_t n, bool weighted, float* to, int64_t ld) const {
  std::vector<float> scratch(shift ? D : 0);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t r = sorted_ids_[rows[i]] / k;
    float* const row = to + i * ld;
    x.load(r % T * D, D, row);
    if (shift) kernels().add(row, shift.read(r / T * D, D, scratch.data()), D);
    if (weighted) {
      const float w = weight(rows[i]);
      for (int64_t d = 0; d < D; ++d) row[d] *= w;
    }
  }
}

ExpertMlp::Packed ExpertMlp::left(
    const Floats& weights, int64_t i, int64_t rows, int64_t n, int64_t ld, float* scratch) const {
  if (operand == Operand::kBFloat16) return {weights.at(i), ld};
  const Floats::Matrix matrix = weights.matrix(i, rows, n, ld, scratch);
  return {matrix.data, matrix.ld};
}

ExpertMlp::Packed ExpertMlp::right(
    const Floats& weights, int64_t i, int64_t rows, int64_t n, int64_t ld, float* scratch) const {
  if (operand == Operand::kFloat32) return left(weights, i, rows, n, ld, scratch);
  kernels().pair_rows(weights.at(i), ld, rows, n, scratch);
  return {scratch, n};
}

const void* ExpertMlp::left(const float* from, int64_t rows, int64_t ld, void* to) const {
  if (operand == Operand::kFloat32) return from;
  kernels().cast[int(Element::kFloat32)][int(Element::kBFloat16)](from, to, rows * ld);
  return to;
}

ExpertMlp::Packed ExpertMlp::right(
    const float* from, int64_t rows, int64_t n, int64_t ld, void* to) const {
  if (operand == Operand::kFloat32) return {from, ld};
  kernels().pair_floats(from, ld, rows, n, to);
  return {to, n};
}

void ExpertMlp::turn_left(const void* from, int64_t rows, int64_t ld, void* to) const {
  const auto turn = operand == Operand::kFloat32 ? kernels().transpose32 : kernels().transpose16;
  turn(from, ld, rows, ld, to, rows);
}

void ExpertMlp::turn_right(const void* from, int64_t rows, int64_t ld, void* to) const {
  const int64_t units = operand == Operand::kFloat32 ? ld : ld / 2;  // pairs go together
  kernels().transpose32(from, units, rows, units, to, rows);
}

}  // namespace m2ae::cpu
