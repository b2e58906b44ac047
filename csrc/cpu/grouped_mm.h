// Products of strided matrices, of which all of grouped_mm consists on the CPU.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "../floating_element.h"
#include "expert_mlp_tile.h"

namespace m2ae::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A matrix in memory, whatever its strides.
struct Matrix {
  const char* data = nullptr;
  Element element = Element::kFloat32;
  int64_t row = 0, column = 0;  // elements from one to the next

  Matrix() = default;
  explicit Matrix(const Tensor& tensor)  // of the last two axes
      : data(static_cast<const char*>(tensor.const_data_ptr())),
        element(floating_element("grouped_mm", "operands", tensor.scalar_type())),
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
  void load_row(int64_t r, int64_t n, float* to) const;
  // to [padded_rows, ld] <- rows x n of it, and zeros.
  void pack(int64_t rows, int64_t n, int64_t padded_rows, int64_t ld, float* to) const;
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

// All of them, on all threads.
void run_products(const std::vector<Product>& products, const Epilogue& epilogue);

// Where each group begins, and where the last one ends, for an axis of `size`.
std::vector<int64_t> grouped_mm_ends(const Tensor& offs, int64_t size);

}  // namespace m2ae::cpu
