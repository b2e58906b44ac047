// Rows that moe_permute and moe_unpermute move: matrices and routings as raw memory, and how the
// work is shared among threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "../element.h"
#include "pooled_tensor.h"

namespace m2ae::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMoveBytes = int64_t(1) << 18;  // of a thread, at least: pays for waking it
// Larger outputs leave a second-level cache before they are read: they are written past the caches,
// which saves reading what is overwritten. 4,096 x 4 rows of 512 floats, one thread of a Zen 5:
// 0.9 ms for 2.0 (2026-11).
constexpr int64_t kStreamBytes = int64_t(1) << 20;

// A matrix whose rows are runs of memory; others are copied first.
class Rows {
 public:
  Rows(const char* op, const char* name, const Tensor& tensor);

  const void* operator[](int64_t i) const { return data_ + i * stride_bytes_; }
  int64_t rows() const { return tensor_.size(0); }
  int64_t width() const { return tensor_.size(1); }
  int64_t row_bytes() const { return width() * bytes_of(element_); }
  Element element() const { return element_; }
  ScalarType dtype() const { return tensor_.scalar_type(); }

 private:
  Tensor tensor_;
  Element element_;
  const char* data_;
  int64_t stride_bytes_;
};

// Where slots went: sorted_ids [N], if given, and inverse_ids [R, k].
class SortedSlots {
 public:
  SortedSlots(const char* op, const Tensor* sorted_ids, const Tensor& inverse_ids, int64_t N);

  int64_t rows() const { return rows_; }                // R
  int64_t slots() const { return slots_; }              // k
  int64_t sorted_rows() const { return sorted_rows_; }  // N
  bool is_empty(int64_t i) const { return sorted_[i] < 0; }
  // The sorted row of slot j of row r, or -1. What is out of range counts as -1 and is told by
  // check(), as an exception must not leave a thread of a parallel loop.
  int64_t at(int64_t r, int64_t j) const {
    const int64_t i = inverse_[r * slots_ + j];
    if (i >= sorted_rows_ || i < -1) {
      is_out_of_range_.store(true, std::memory_order_relaxed);
      return -1;
    }
    return i;
  }
  void check() const;

 private:
  const char* op_;
  Tensor inverse_tensor_;
  std::vector<Tensor> sorted_tensor_;
  const int32_t* inverse_;
  const int32_t* sorted_ = nullptr;
  int64_t rows_, slots_, sorted_rows_;
  mutable std::atomic<bool> is_out_of_range_{false};
};

// Router weights [R, k] in float32, contiguous; or none.
class SlotWeights {
 public:
  SlotWeights(const char* op, const Tensor* weights, const SortedSlots& slots);

  bool given() const { return data_ != nullptr; }
  const float* of(int64_t r) const { return data_ + r * slots_; }

 private:
  std::vector<Tensor> tensor_;
  const float* data_ = nullptr;
  int64_t slots_;
};

// Copies past the caches if `streams`; a thread that did calls finish_streams() before it ends.
void copy_row(void* to, const void* from, int64_t bytes, bool streams);
void zero_row(void* to, int64_t bytes, bool streams);
void finish_streams();

// work(begin, end) over [0, count), each item of which moves `bytes`.
template <typename Work>
void share(int64_t count, int64_t bytes, const Work& work) {
  const int64_t grain = std::max<int64_t>(kMoveBytes / std::max<int64_t>(bytes, 1), 1);
  torch::stable::parallel_for(0, count, grain, work);
}

// Memory of sorted rows that belong to no slot.
void zero_empty_rows(char* rows, int64_t row_bytes, const SortedSlots& slots, bool streams);

inline const Tensor* pointer_to(const std::optional<Tensor>& tensor) {
  return tensor ? &*tensor : nullptr;
}

}  // namespace m2ae::cpu
