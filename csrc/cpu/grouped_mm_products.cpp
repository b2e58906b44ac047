// The products of grouped_mm.h.
//
// A worker owns kRows x kColumns of one product, packs its operands in float32 and adds up the
// depth in steps of kDepth, in their order: no sum depends on the number of threads.
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "expert_mlp.h"
#include "grouped_mm.h"

namespace m2ae::cpu {
namespace {

constexpr int64_t kRows = 1024, kRowBlock = 128, kColumns = 256, kDepth = 512;
constexpr int kFloat = int(Element::kFloat32);

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

}  // namespace

Element grouped_mm_element(ScalarType dtype) {
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

void Matrix::load_row(int64_t r, int64_t n, float* to) const {
  const auto cast = kernels().cast[int(element)][kFloat];
  const char* const begin = data + r * row * bytes_of(element);
  if (column == 1) return cast(begin, to, n);
  for (int64_t i = 0; i < n; ++i) cast(begin + i * column * bytes_of(element), to + i, 1);
}

void Matrix::pack(int64_t rows, int64_t n, int64_t padded_rows, int64_t ld, float* to) const {
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

void run_products(const std::vector<Product>& products, const Epilogue& epilogue) {
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
std::vector<int64_t> grouped_mm_ends(const Tensor& offs, int64_t size) {
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

}  // namespace m2ae::cpu
