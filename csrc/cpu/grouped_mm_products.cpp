// The products of grouped_mm.h.
//
// A worker owns kRows x kColumns of one product and adds up the depth in steps of kDepth, in their
// order: no sum depends on the number of threads. B is packed in float32, and so is A unless it
// lies in memory as it should; sums go to where they belong if that is float32 and nothing comes
// after.
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "expert_mlp.h"
#include "grouped_mm.h"

namespace m2ae::cpu {
namespace {

constexpr int64_t kRows = 1024, kRowBlock = 128, kColumns = 256, kDepth = 512;
constexpr int kFloat = int(Element::kFloat32);

struct Memory {
  Buffer<float> a, b, tail, sums, up, bias;
  Memory(bool sums_elsewhere, bool gated)
      : a(kRowBlock * kDepth),
        b(kDepth * kColumns),
        tail(kRowBlock * kColumns),
        sums(sums_elsewhere ? 0 : kRows * kColumns),
        up(gated ? kRows * kColumns : 0),
        bias(kColumns) {}
};

// Depths as they are multiplied; one step of zeros if there is nothing to sum.
int64_t lanes_of(int64_t depth) {
  return std::max(in_lanes(depth), kLanes);
}

// A block of A as an operand: m rows of it, m_padded of what is packed.
struct Left {
  const float* data;
  int64_t ld, rows;
};

Left left_of(const Product& p, Memory& memory, int64_t r, int64_t m, int64_t k0, int64_t depth) {
  const Matrix from = p.a.from(r, k0);
  const int64_t m_padded = in_lanes(m), ld = lanes_of(depth);
  const bool is_dense = from.element == Element::kFloat32 && from.column == 1;
  // Only whole blocks: each new number of rows or depths would be a new kernel to compile.
  if (p.a_ids == nullptr && is_dense && m == kRowBlock && depth == ld)
    return {reinterpret_cast<const float*>(from.data), from.row, m};
  float* const a = memory.a.data();
  if (p.a_ids == nullptr) {
    from.pack(m, depth, m_padded, ld, a);
    return {a, ld, m_padded};
  }
  std::fill_n(a, m_padded * ld, 0.0f);
  for (int64_t i = 0; i < m; ++i) {
    const int32_t id = p.a_ids[r + i];
    if (id >= 0) p.a.from(id, k0).load_row(0, depth, a + i * ld);
  }
  return {a, ld, m_padded};
}

// sums [in_lanes(rows), ld] <- rows r0 on and columns c0 on of the product. If `exact`, no more
// than [rows, n] of it is written.
void multiply(
    const Product& p,
    Memory& memory,
    int64_t r0,
    int64_t rows,
    int64_t c0,
    int64_t n,
    float* sums,
    int64_t ld,
    bool exact) {
  const int64_t width = in_lanes(n);
  for (int64_t k0 = 0; k0 < p.K || k0 == 0; k0 += kDepth) {
    const int64_t depth = std::min(kDepth, p.K - k0), lanes = lanes_of(depth);
    p.b.from(k0, c0).pack(depth, n, lanes, width, memory.b.data());
    for (int64_t i = 0; i < rows; i += kRowBlock) {
      const Left a = left_of(p, memory, r0 + i, std::min(kRowBlock, rows - i), k0, depth);
      const bool overhangs = exact && i + a.rows > rows;
      float* const to = overhangs ? memory.tail.data() : sums + i * ld;
      const int64_t ld_to = overhangs ? width : ld;
      if (overhangs && k0 > 0)
        for (int64_t r = i; r < rows; ++r) std::copy_n(sums + r * ld, n, to + (r - i) * width);
      gemm(
          Operand::kFloat32,
          a.rows,
          width,
          lanes,
          a.data,
          a.ld,
          memory.b.data(),
          width,
          k0 > 0,
          to,
          ld_to);
      for (int64_t r = i; overhangs && r < rows; ++r)
        std::copy_n(to + (r - i) * width, n, sums + r * ld);
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
    // Columns that lie in a row, kLanes of them at a time, are turned in the first-level cache.
    std::vector<float> strip(kLanes * padded_rows, 0.0f);
    for (int64_t i = 0; i < ld; i += kLanes) {
      const int64_t count = std::min(kLanes, std::max<int64_t>(n - i, 0));
      for (int64_t c = 0; c < count; ++c)
        turned().load_row(i + c, rows, strip.data() + c * padded_rows);
      std::fill(strip.begin() + count * padded_rows, strip.end(), 0.0f);
      kernels().transpose32(strip.data(), padded_rows, kLanes, padded_rows, to + i, ld);
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
  // What is multiplied is the result.
  const bool is_plain = epilogue.out == Element::kFloat32 && epilogue.activation == kIdentity &&
                        std::none_of(products.begin(), products.end(), [](const Product& p) {
                          return p.bias.data != nullptr || p.h != nullptr || p.N % kLanes != 0;
                        });
  const int64_t bytes = bytes_of(epilogue.out);
  const auto store = kernels().cast[kFloat][int(epilogue.out)];
  share_out(
      int64_t(tasks.size()),
      [&] { return Memory(is_plain, gated); },
      [&](Memory& memory, int64_t t) {
        const Product& p = products[tasks[t].product];
        const int64_t half = gated ? p.N / 2 : p.N, r0 = tasks[t].row, c0 = tasks[t].column;
        const int64_t rows = std::min(kRows, p.M - r0), n = std::min(kColumns, half - c0);
        const int64_t width = in_lanes(n);
        float *const sums = memory.sums.data(), *const up = memory.up.data();
        if (is_plain) {
          auto* const out = reinterpret_cast<float*>(p.out) + r0 * p.ld + c0;
          return multiply(p, memory, r0, rows, c0, n, out, p.ld, true);
        }
        for (int64_t part = 0; part < (gated ? 2 : 1); ++part) {
          float* const to = part == 0 ? sums : up;
          const int64_t c = c0 + part * half;
          multiply(p, memory, r0, rows, c, n, to, width, false);
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
