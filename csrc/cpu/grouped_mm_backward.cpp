// grouped_mm on the CPU, backward: the gradients of its forms as products. Contract and math:
// m2ae_kernels/ops/grouped_mm.py; the products: grouped_mm.h
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "expert_mlp.h"
#include "grouped_mm.h"

namespace m2ae::cpu {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// grad through the activation, in float32 [.., C] one after the other, as far as rows are in
// groups.
Buffer<float> through_activation(
    const Tensor& grad, const Tensor& h, int64_t activation, int64_t rows_per_matrix) {
  const Tensor dense = torch::stable::contiguous(h);
  Buffer<float> made(h.numel());
  const bool gated = activation >= kFirstGated;
  const int64_t C = h.size(h.dim() - 1), columns = gated ? C / 2 : C;
  const int64_t matrices = h.dim() == 3 ? h.size(0) : 1;
  float* const to = made.data();
  share_out(
      matrices * rows_per_matrix,
      [&] { return std::vector<float>(columns + C); },
      [&](std::vector<float>& scratch, int64_t i) {
        const int64_t e = i / rows_per_matrix, r = i % rows_per_matrix;
        const int64_t row = e * h.size(h.dim() - 2) + r;
        float *const g = scratch.data(), *const x = g + columns;
        const Matrix of_grad(grad);
        of_grad.at(grad.dim() == 3 ? e * grad.stride(0) : 0).load_row(r, columns, g);
        Matrix(dense).at(row * C).load_row(0, C, x);
        kernels().activate_backward[activation](
            g, x, x + columns, columns, to + row * C, to + row * C + columns);
      });
  return made;
}

// sum [C] of `rows` rows, in blocks, so that no sum has more terms than one.
void sum_rows(const Matrix& from, int64_t rows, int64_t C, char* to, Element element) {
  constexpr int64_t kBlock = 128;
  std::vector<float> sum(C, 0.0f), part(C), row(C);
  for (int64_t i = 0; i < rows; i += kBlock) {
    std::fill(part.begin(), part.end(), 0.0f);
    for (int64_t r = i; r < std::min(rows, i + kBlock); ++r) {
      from.load_row(r, C, row.data());
      kernels().add(part.data(), row.data(), C);
    }
    kernels().add(sum.data(), part.data(), C);
  }
  kernels().cast[int(Element::kFloat32)][int(element)](sum.data(), to, C);
}

// Rows of mat_a [n, K] by a_ids, zeros for -1; and back, in the order of the rows.
Tensor gathered(const Tensor& mat_a, const int32_t* ids, int64_t M) {
  const int64_t K = mat_a.size(1);
  Tensor rows = torch::stable::new_zeros(mat_a, {M, K}, ScalarType::Float);
  for (int64_t i = 0; i < M; ++i)
    if (ids[i] >= 0) Matrix(mat_a).load_row(ids[i], K, rows.mutable_data_ptr<float>() + i * K);
  return rows;
}

Tensor scattered(const Tensor& rows, const int32_t* ids, const Tensor& mat_a) {
  const int64_t n = mat_a.size(0), K = mat_a.size(1), M = rows.size(0);
  Tensor sums = torch::stable::new_zeros(mat_a, {n, K}, ScalarType::Float);
  const float* const from = rows.const_data_ptr<float>();
  float* const to = sums.mutable_data_ptr<float>();
  for (int64_t i = 0; i < M; ++i)
    if (ids[i] >= 0) kernels().add(to + ids[i] * K, from + i * K, K);
  if (mat_a.scalar_type() == ScalarType::Float) return sums;
  Tensor made = torch::stable::new_empty(mat_a, {n, K});
  const Element element = grouped_mm_element(mat_a.scalar_type());
  kernels().cast[int(Element::kFloat32)][int(element)](to, made.mutable_data_ptr(), n * K);
  return made;
}

Gradients grouped_mm_backward_cpu(
    const Tensor& grad,
    const Tensor& mat_a,
    const Tensor& mat_b,
    const std::optional<Tensor>& offs,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& a_ids,
    const Tensor& h,
    int64_t activation,
    const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 3, "grouped_mm: expected 3 flags in output_mask");
  const bool many_a = mat_a.dim() == 3, many_b = mat_b.dim() == 3;
  const Tensor ids = a_ids ? torch::stable::contiguous(*a_ids) : mat_a;
  const int32_t* const row_ids =
      a_ids ? static_cast<const int32_t*>(ids.const_data_ptr()) : nullptr;
  const int64_t K = mat_a.size(mat_a.dim() - 1), C = mat_b.size(mat_b.dim() - 1);
  const int64_t M = a_ids ? ids.numel() : mat_a.size(mat_a.dim() - 2);
  const int64_t grouped = many_b ? M : many_a ? C : K;
  const std::vector<int64_t> ends = offs ? grouped_mm_ends(*offs, grouped) : std::vector<int64_t>{};
  const int64_t E = offs ? int64_t(ends.size()) - 1 : mat_a.size(0);
  Buffer<float> through;
  if (activation != kIdentity)
    through = through_activation(grad, h, activation, offs ? ends.back() : M);
  const Tensor a_tensor = row_ids && output_mask[1] ? gathered(mat_a, row_ids, M) : mat_a;
  const ScalarType dtype = mat_a.scalar_type();
  const Element element = grouped_mm_element(dtype);
  // A stack is written as a whole, empty groups included; of a 2-D gradient the tail is not.
  const bool has_tail = offs && ends.back() < grouped;
  const auto fresh = [&](bool is_needed, bool is_stack, std::vector<int64_t> sizes, ScalarType of) {
    if (!is_needed) sizes = {0};
    return has_tail && !is_stack ? torch::stable::new_zeros(mat_a, sizes, of)
                                 : torch::stable::new_empty(mat_a, sizes, of);
  };
  const auto sizes_of = [](const Tensor& t) {
    std::vector<int64_t> sizes;
    for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
    return sizes;
  };
  Tensor by_a = row_ids ? fresh(output_mask[0], false, {M, K}, ScalarType::Float)
                        : fresh(output_mask[0], many_a, sizes_of(mat_a), dtype);
  Tensor by_b = fresh(output_mask[1], many_b, sizes_of(mat_b), dtype);
  const bool needs_bias = output_mask[2] && bias;
  Tensor by_bias = torch::stable::new_empty(
      mat_a, needs_bias ? std::vector<int64_t>{E, C} : std::vector<int64_t>{0});
  Matrix g(grad);
  int64_t g_stack = grad.dim() == 3 ? grad.stride(0) : 0;
  if (activation != kIdentity) {
    g.data = reinterpret_cast<const char*>(through.data());
    g.element = Element::kFloat32;
    g.row = C, g.column = 1;
    g_stack = grad.dim() == 3 ? M * C : 0;
  }
  const Matrix a(a_tensor), b(mat_b);
  std::vector<Product> of_a, of_b;
  std::vector<std::pair<Matrix, int64_t>> of_bias;  // rows, and how many
  const Element a_element = row_ids ? Element::kFloat32 : element;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t begin = offs ? ends[e] : 0, size = offs ? ends[e + 1] - begin : 0;
    const Matrix a_e = many_a ? a.at(e * mat_a.stride(0)) : a;
    const Matrix b_e = many_b ? b.at(e * mat_b.stride(0)) : b;
    const Matrix g_e = g.at(e * g_stack);
    char* to_a = output_mask[0] ? static_cast<char*>(by_a.mutable_data_ptr()) : nullptr;
    char* to_b = output_mask[1] ? static_cast<char*>(by_b.mutable_data_ptr()) : nullptr;
    const int64_t a_bytes = bytes_of(a_element), b_bytes = bytes_of(element);
    const auto add = [&](Matrix one,
                         Matrix other,
                         char* to,
                         int64_t ld,
                         int64_t m,
                         int64_t n,
                         int64_t k,
                         bool is_a) {
      if (to != nullptr)
        (is_a ? of_a : of_b).push_back({one, other, nullptr, to, ld, m, n, k, {}, nullptr});
    };
    const auto at = [](char* to, int64_t bytes) { return to == nullptr ? to : to + bytes; };
    if (many_b) {  // rows in groups, or a stack
      const int64_t rows = offs ? size : M;
      const Matrix g_rows = g_e.from(begin, 0), a_rows = a_e.from(begin, 0);
      const int64_t first = offs ? begin : e * M;
      add(g_rows, b_e.turned(), at(to_a, first * K * a_bytes), K, rows, K, C, true);
      add(a_rows.turned(), g_rows, at(to_b, e * K * C * b_bytes), C, K, C, rows, false);
      if (needs_bias) of_bias.push_back({g_rows, rows});
    } else if (many_a) {  // columns in groups
      const Matrix g_columns = g.from(0, begin), b_columns = b.from(0, begin);
      add(g_columns, b_columns.turned(), at(to_a, e * M * K * a_bytes), K, M, K, size, true);
      add(a_e.turned(), g_columns, at(to_b, begin * b_bytes), C, K, size, M, false);
    } else {  // depth in groups
      const Matrix b_depth = b.from(begin, 0), a_depth = a.from(0, begin);
      add(g_e, b_depth.turned(), at(to_a, begin * a_bytes), K, M, size, C, true);
      add(a_depth.turned(), g_e, at(to_b, begin * C * b_bytes), C, size, C, M, false);
    }
  }
  run_products(of_a, {kIdentity, a_element});
  run_products(of_b, {kIdentity, element});
  share_out(
      int64_t(of_bias.size()),
      [] { return 0; },
      [&](int, int64_t e) {
        char* const to = static_cast<char*>(by_bias.mutable_data_ptr());
        sum_rows(of_bias[e].first, of_bias[e].second, C, to + e * C * bytes_of(element), element);
      });
  if (row_ids && output_mask[0]) by_a = scattered(by_a, row_ids, mat_a);
  return {by_a, by_b, by_bias};
}

}  // namespace
}  // namespace m2ae::cpu

STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CPU, m) {
  m.impl("grouped_mm_backward", TORCH_BOX(&m2ae::cpu::grouped_mm_backward_cpu));
}
