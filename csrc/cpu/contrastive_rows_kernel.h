// Loops over rows of the contrastive losses: packing them, and what is made of their gradients.
// Packed rows are float or BFloat16, of n elements, a multiple of 32, aligned to 64 bytes or 32.
// Included by isa_*.cpp only.
#pragma once

#include "convert.h"
#include "multiply_add.h"

namespace m2ae::cpu {
namespace {

// Sum of squares; in double, because those of float32 rows of norm 1e20 or 1e-30 are no float32.
template <typename element_t>
double square_norm_kernel(const void* row /* [n] */, int64_t stride, int64_t n) {
  const auto* const x = static_cast<const element_t*>(row);
  double sum = 0;
  if (stride == 1) {
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < n; ++d) {
      const double value = convert<float>(x[d]);
      sum += value * value;
    }
  } else {
    for (int64_t d = 0; d < n; ++d) {
      const double value = convert<float>(x[d * stride]);
      sum += value * value;
    }
  }
  return sum;
}

// The row times a and b, zeros behind it.
template <typename element_t, typename operand_t>
void pack_row_kernel(
    const void* row /* [n] */,
    int64_t stride,
    int64_t n,
    float a,
    float b,
    void* packed /* [depth] */,
    int64_t depth) {
  const auto* const x = static_cast<const element_t*>(row);
  auto* const y = static_cast<operand_t*>(packed);
  if (stride == 1) {
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) y[d] = convert<operand_t>(convert<float>(x[d]) * a * b);
  } else {
    for (int64_t d = 0; d < n; ++d)
      y[d] = convert<operand_t>(convert<float>(x[d * stride]) * a * b);
  }
  for (int64_t d = n; d < depth; ++d) y[d] = convert<operand_t>(0.0f);
}

// to [columns, rows] <- from [rows, columns], in blocks that stay in the first-level cache.
template <typename unit_t>
void transpose_kernel(
    const void* from, int64_t ld_from, int64_t rows, int64_t columns, void* to, int64_t ld_to) {
  constexpr int64_t kBlock = 16;  // divides rows and columns
  const auto* const x = static_cast<const unit_t*>(from);
  auto* const y = static_cast<unit_t*>(to);
  for (int64_t i = 0; i < rows; i += kBlock)
    for (int64_t j = 0; j < columns; j += kBlock)
      for (int64_t b = 0; b < kBlock; ++b) {
        const unit_t* const column = x + i * ld_from + j + b;
        unit_t* const row = y + (j + b) * ld_to + i;
        for (int64_t a = 0; a < kBlock; ++a) row[a] = column[a * ld_from];
      }
}

// to [rows / 2, n, 2] <- from [rows, n], ld apart: two rows in turn.
inline void pair_rows_kernel(const void* from, int64_t ld, int64_t rows, int64_t n, void* to) {
  const auto* const x = static_cast<const uint16_t*>(from);
  auto* const y = static_cast<uint32_t*>(to);
  for (int64_t i = 0; i < rows; i += 2) {
    const uint16_t *first = x + i * ld, *second = first + ld;
    uint32_t* const pairs = y + i / 2 * n;
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) pairs[d] = first[d] | uint32_t(second[d]) << 16;
  }
}

template <typename a_t, typename b_t>
inline double dot(const a_t* a, const b_t* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < n; ++d)
    sum += double(convert<float>(a[d])) * double(convert<float>(b[d]));
  return sum;
}

template <typename operand_t>
double dot_rows_kernel(const void* a /* [n] */, const void* b /* [n] */, int64_t n) {
  return dot(static_cast<const operand_t*>(a), static_cast<const operand_t*>(b), n);
}

template <typename operand_t>
double dot_gradient_kernel(const void* row /* [n] */, const float* gradient /* [n] */, int64_t n) {
  return dot(static_cast<const operand_t*>(row), gradient, n);
}

// gradient += factor * row
template <typename operand_t>
void add_row_kernel(const void* row /* [n] */, float factor, float* gradient /* [n] */, int64_t n) {
  const auto* const x = static_cast<const operand_t*>(row);
#pragma omp simd
  for (int64_t d = 0; d < n; ++d)
    gradient[d] = multiply_add(factor, convert<float>(x[d]), gradient[d]);
}

// out = a * gradient + b * row; in double, because the two may cancel.
template <typename element_t, typename operand_t>
void write_gradient_kernel(
    const float* gradient, double a, const void* row, double b, int64_t n, void* out /* [n] */) {
  const auto* const x = static_cast<const operand_t*>(row);
  auto* const y = static_cast<element_t*>(out);
#pragma omp simd
  for (int64_t d = 0; d < n; ++d)
    y[d] = convert<element_t>(float(a * double(gradient[d]) + b * double(convert<float>(x[d]))));
}

// sum += more
inline void add_kernel(float* sum /* [n] */, const float* more /* [n] */, int64_t n) {
#pragma omp simd
  for (int64_t d = 0; d < n; ++d) sum[d] += more[d];
}

}  // namespace
}  // namespace m2ae::cpu
