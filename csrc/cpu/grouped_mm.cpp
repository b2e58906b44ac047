// grouped_mm on the CPU, forward: its forms as products. Contract and math:
// m2ae_kernels/ops/grouped_mm.py; the products: grouped_mm.h
#include "grouped_mm.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

namespace m2ae::cpu {
namespace {

std::tuple<Tensor, Tensor> grouped_mm_cpu(
    const Tensor& mat_a,
    const Tensor& mat_b,
    const std::optional<Tensor>& offs,   // [E]
    const std::optional<Tensor>& bias,   // [E, C]
    const std::optional<Tensor>& a_ids,  // [M]
    int64_t activation,
    ScalarType out_dtype,
    bool saves) {
  const int64_t K = mat_a.size(mat_a.dim() - 1), C = mat_b.size(mat_b.dim() - 1);
  STD_TORCH_CHECK(
      mat_a.is_cpu() && mat_b.is_cpu() && mat_b.size(mat_b.dim() - 2) == K && activation >= 0 &&
          activation < kActivations,
      "grouped_mm: expected mat_a [..., K] and mat_b [..., K, C] on the CPU, a known activation");
  const bool many_a = mat_a.dim() == 3, many_b = mat_b.dim() == 3,
             gated = activation >= kFirstGated;
  STD_TORCH_CHECK(offs.has_value() || (many_a && many_b), "grouped_mm: expected offs, got none");
  const Tensor ids = a_ids ? torch::stable::contiguous(*a_ids) : mat_a;
  const int64_t M = a_ids ? ids.numel() : mat_a.size(mat_a.dim() - 2), columns = gated ? C / 2 : C;
  const int64_t grouped = !offs ? 0 : many_b ? M : many_a ? C : K;
  const std::vector<int64_t> ends = offs ? grouped_mm_ends(*offs, grouped) : std::vector<int64_t>{};
  const int64_t E = offs ? int64_t(ends.size()) - 1 : mat_a.size(0);
  STD_TORCH_CHECK(
      (!many_a || mat_a.size(0) == E) && (!many_b || mat_b.size(0) == E) &&
          (!bias || (bias->dim() == 2 && bias->size(0) == E && bias->size(1) == C)),
      "grouped_mm: expected as many matrices as groups");
  const int32_t* row_ids = nullptr;
  if (a_ids) {
    STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Int, "grouped_mm: expected a_ids in int32");
    row_ids = static_cast<const int32_t*>(ids.const_data_ptr());
    for (int64_t i = 0; i < M; ++i)
      STD_TORCH_CHECK(
          row_ids[i] >= -1 && row_ids[i] < mat_a.size(0),
          "grouped_mm: expected a_ids in [-1, ",
          mat_a.size(0),
          "), got ",
          row_ids[i]);
  }
  const bool stacked = many_a == many_b;
  std::vector<int64_t> sizes = stacked ? std::vector<int64_t>{E, M} : std::vector<int64_t>{M};
  std::vector<int64_t> h_sizes = sizes;
  sizes.push_back(columns), h_sizes.push_back(C);
  if (!saves) h_sizes = {0};
  const bool has_tail = offs && !stacked && ends.back() < grouped;
  const auto fresh = [&](const std::vector<int64_t>& of) {
    return has_tail ? torch::stable::new_zeros(mat_a, of, out_dtype)
                    : torch::stable::new_empty(mat_a, of, out_dtype);
  };
  Tensor out = fresh(sizes), h = fresh(h_sizes);
  const Epilogue epilogue{activation, grouped_mm_element(out_dtype)};
  const int64_t bytes = bytes_of(epilogue.out);
  char* const out_data = static_cast<char*>(out.mutable_data_ptr());
  char* const h_data = saves ? static_cast<char*>(h.mutable_data_ptr()) : nullptr;
  const Matrix a(mat_a), b(mat_b), of_bias = bias ? Matrix(*bias) : Matrix();
  std::vector<Product> products;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t begin = offs ? ends[e] : 0, size = offs ? ends[e + 1] - begin : 0;
    const Matrix a_e = many_a ? a.at(e * mat_a.stride(0)) : a;
    const Matrix b_e = many_b ? b.at(e * mat_b.stride(0)) : b;
    const Matrix bias_e = bias ? of_bias.from(e, 0) : of_bias;
    const int64_t first = stacked ? e * M : many_b ? begin : 0;  // row of out and h
    char* const to = out_data + (first * columns + (many_a && !many_b ? begin : 0)) * bytes;
    char* const h_to = saves ? h_data + first * C * bytes : nullptr;
    if (!offs)
      products.push_back({a_e, b_e, nullptr, to, columns, M, C, K, bias_e, h_to});
    else if (many_b)
      products.push_back(
          {row_ids ? a_e : a_e.from(begin, 0),
           b_e,
           row_ids ? row_ids + begin : nullptr,
           to,
           columns,
           size,
           C,
           K,
           bias_e,
           h_to});
    else if (many_a)
      products.push_back({a_e, b_e.from(0, begin), nullptr, to, C, M, size, K, {}, nullptr});
    else
      products.push_back(
          {a_e.from(0, begin), b_e.from(begin, 0), nullptr, to, C, M, C, size, {}, nullptr});
  }
  run_products(products, epilogue);
  return {out, h};
}

}  // namespace
}  // namespace m2ae::cpu

STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CPU, m) {
  m.impl("grouped_mm", TORCH_BOX(&m2ae::cpu::grouped_mm_cpu));
}
