// grouped_mm on the CPU. Contract and math: m2ae_kernels/ops/grouped_mm.py
//
// Every form, and every gradient of one, is a list of products of strided matrices. A worker owns
// kRows x kColumns of one product, packs its operands in float32 and adds up the depth in steps of
// kDepth, in their order: no sum depends on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "expert_mlp.h"

namespace m2ae::cpu {
namespace {

constexpr int64_t kRows = 1024, kRowBlock = 128, kColumns = 256, kDepth = 512;
constexpr int kFloat = int(Element::kFloat32);

Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::Double:
      return Element::kFloat64;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    default:
      STD_TORCH_CHECK(false, "grouped_mm: expected a floating dtype, got ", toString(dtype));
  }
}

// A matrix in memory, whatever its strides.
struct Matrix {
  const char* data = nullptr;
  Element element = Element::kFloat32;
  int64_t row = 0, column = 0;  // elements from one to the next

  Matrix() = default;
  explicit Matrix(const Tensor& tensor)  // of the last two axes
      : data(static_cast<const char*>(tensor.const_data_ptr())),
        element(element_of(tensor.scalar_type())),
        row(tensor.stride(tensor.dim() - 2)),
        column(tensor.stride(tensor.dim() - 1)) {}

  Matrix at(int64_t elements) const {
    Matrix moved = *this;
    moved.data += elements * bytes_of(element);
    return moved;
  }
  Matrix from(int64_t r, int64_t c) const { return at(r * row + c * column); }
  Matrix turned() const {
    Matrix other = *this;
    std::swap(other.row, other.column);
    return other;
  }
  void load_row(int64_t r, int64_t n, float* to) const {
    const auto cast = kernels().cast[int(element)][kFloat];
    const char* const begin = data + r * row * bytes_of(element);
    if (column == 1) return cast(begin, to, n);
    for (int64_t i = 0; i < n; ++i) cast(begin + i * column * bytes_of(element), to + i, 1);
  }
  // to [rows, ld] <- rows x n of it, zeros to padded_rows and padded_n.
  void pack(int64_t rows, int64_t n, int64_t padded_rows, int64_t ld, float* to) const {
    if (row == 1 && column != 1) {
      std::vector<float> run(rows);
      std::fill_n(to, padded_rows * ld, 0.0f);
      for (int64_t i = 0; i < n; ++i) {
        turned().load_row(i, rows, run.data());
        for (int64_t r = 0; r < rows; ++r) to[r * ld + i] = run[r];
      }
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      load_row(r, n, to + r * ld);
      std::fill_n(to + r * ld + n, ld - n, 0.0f);
    }
    std::fill_n(to + rows * ld, (padded_rows - rows) * ld, 0.0f);
  }
};

// C [M, N] = A B
struct Product {
  Matrix a, b;
  const int32_t* a_ids;  // [M], or nullptr: row i of A is row a_ids[i], none if < 0
  char* out;
  int64_t ld;  // elements from one row of C to the next
  int64_t M, N, K;
  Matrix bias;  // one row, if it has data
  char* h;      // [M, N], or nullptr
};

struct Epilogue {
  int64_t activation = kIdentity;
  Element out = Element::kFloat32;
};

struct Memory {
  Buffer<float> a, b, sums, up, bias;
  Memory()
      : a(kRowBlock * kDepth),
        b(kDepth * kColumns),
        sums(kRows * kColumns),
        up(kRows * kColumns),
        bias(kColumns) {}
};

// sums [rows, in_lanes(n)] <- rows r0 on and columns c0 on of the product.
void multiply(
    const Product& p,
    Memory& memory,
    int64_t r0,
    int64_t rows,
    int64_t c0,
    int64_t n,
    float* sums) {
  const int64_t width = in_lanes(n);
  for (int64_t k0 = 0; k0 < p.K || k0 == 0; k0 += kDepth) {
    const int64_t depth = std::min(kDepth, p.K - k0), padded = std::max(in_lanes(depth), kLanes);
    p.b.from(k0, c0).pack(depth, n, padded, width, memory.b.data());
    for (int64_t i = 0; i < rows; i += kRowBlock) {
      const int64_t m = std::min(kRowBlock, rows - i), m_padded = in_lanes(m);
      float* const a = memory.a.data();
      if (p.a_ids == nullptr) {
        p.a.from(r0 + i, k0).pack(m, depth, m_padded, padded, a);
      } else {
        std::fill_n(a, m_padded * padded, 0.0f);
        for (int64_t r = 0; r < m; ++r) {
          const int32_t id = p.a_ids[r0 + i + r];
          if (id >= 0) p.a.from(id, k0).load_row(0, depth, a + r * padded);
        }
      }
      gemm(
          Operand::kFloat32,
          m_padded,
          width,
          padded,
          a,
          padded,
          memory.b.data(),
          width,
          k0 > 0,
          sums + i * width,
          width);
    }
  }
}

void finish(
    const Product& p,
    Memory& memory,
    int64_t rows,
    int64_t c,
    int64_t n,
    Element out,
    float* sums) {
  const int64_t width = in_lanes(n);
  if (p.bias.data != nullptr) {
    p.bias.from(0, c).load_row(0, n, memory.bias.data());
    for (int64_t i = 0; i < rows; ++i) kernels().add(sums + i * width, memory.bias.data(), n);
  }
  if (out != Element::kFloat64) kernels().round_to[int(out)](sums, rows * width);
}

void run(const std::vector<Product>& products, const Epilogue& epilogue) {
  struct Task {
    int64_t product, row, column;
  };
  const bool gated = epilogue.activation >= kFirstGated;
  std::vector<Task> tasks;
  for (size_t p = 0; p < products.size(); ++p)
    for (int64_t r = 0; r < products[p].M; r += kRows)
      for (int64_t c = 0; c < products[p].N / (gated ? 2 : 1); c += kColumns)
        tasks.push_back({int64_t(p), r, c});
  const int64_t bytes = bytes_of(epilogue.out);
  const auto store = kernels().cast[kFloat][int(epilogue.out)];
  share_out(
      int64_t(tasks.size()),
      [] { return Memory(); },
      [&](Memory& memory, int64_t t) {
        const Product& p = products[tasks[t].product];
        const int64_t half = gated ? p.N / 2 : p.N, r0 = tasks[t].row, c0 = tasks[t].column;
        const int64_t rows = std::min(kRows, p.M - r0), n = std::min(kColumns, half - c0);
        const int64_t width = in_lanes(n);
        float *const sums = memory.sums.data(), *const up = memory.up.data();
        for (int64_t part = 0; part < (gated ? 2 : 1); ++part) {
          float* const to = part == 0 ? sums : up;
          const int64_t c = c0 + part * half;
          multiply(p, memory, r0, rows, c, n, to);
          finish(p, memory, rows, c, n, epilogue.out, to);
          for (int64_t i = 0; p.h != nullptr && i < rows; ++i)
            store(to + i * width, p.h + ((r0 + i) * p.N + c) * bytes, n);
        }
        if (epilogue.activation != kIdentity)
          kernels().activate[epilogue.activation](sums, up, rows * width, sums);
        for (int64_t i = 0; i < rows; ++i)
          store(sums + i * width, p.out + ((r0 + i) * p.ld + c0) * bytes, n);
      });
}

// Where each group begins, and where the last one ends.
std::vector<int64_t> ends_of(const Tensor& offs, int64_t size) {
  STD_TORCH_CHECK(
      offs.is_cpu() && offs.dim() == 1 && offs.scalar_type() == ScalarType::Int,
      "grouped_mm: expected offs [E] int32 on the CPU");
  const Tensor dense = torch::stable::contiguous(offs);
  const auto* const data = static_cast<const int32_t*>(dense.const_data_ptr());
  std::vector<int64_t> ends{0};
  for (int64_t e = 0; e < dense.numel(); ++e) {
    STD_TORCH_CHECK(
        data[e] >= ends.back() && data[e] <= size,
        "grouped_mm: expected offs that do not decrease, up to ",
        size,
        ", got ",
        data[e],
        " after ",
        ends.back());
    ends.push_back(data[e]);
  }
  return ends;
}

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
  const std::vector<int64_t> ends = offs ? ends_of(*offs, grouped) : std::vector<int64_t>{};
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
  const bool has_tail = offs && !stacked;
  const auto fresh = [&](const std::vector<int64_t>& of) {
    return has_tail ? torch::stable::new_zeros(mat_a, of, out_dtype)
                    : torch::stable::new_empty(mat_a, of, out_dtype);
  };
  Tensor out = fresh(sizes), h = fresh(h_sizes);
  const Epilogue epilogue{activation, element_of(out_dtype)};
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
  run(products, epilogue);
  return {out, h};
}

}  // namespace
}  // namespace m2ae::cpu

STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CPU, m) {
  m.impl("grouped_mm", TORCH_BOX(&m2ae::cpu::grouped_mm_cpu));
}
