// Which pairs of a query and a key are in a contrastive loss, and which of them are positive, with
// absent rows left out. Contract: m2ae_kernels/ops/_contrastive_pairs.py
//
// Kernels see present rows only, counted anew: n of N queries, m of M keys. Whatever absent rows
// hold is never read.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "contrastive_tile.h"
#include "workspace.h"

namespace m2ae::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor of one value per row, whatever its stride.
template <typename T>
class RowValues {
 public:
  RowValues(const char* op, const char* name, const std::optional<Tensor>& tensor, int64_t rows) {
    if (tensor) *this = RowValues(op, name, *tensor, rows);
  }
  RowValues(const char* op, const char* name, const Tensor& tensor, int64_t rows) {
    const auto expected = torch::headeronly::CppTypeToScalarType<T>::value;
    STD_TORCH_CHECK(
        tensor.is_cpu() && tensor.dim() == 1 && tensor.size(0) == rows &&
            tensor.scalar_type() == expected,
        op,
        ": expected ",
        name,
        " [",
        rows,
        "] of ",
        toString(expected),
        " on the CPU, got another shape, dtype or device");
    data_ = static_cast<const T*>(tensor.const_data_ptr());
    stride_ = tensor.stride(0);
    given_ = true;
  }

  bool given() const { return given_; }
  T operator[](int64_t i) const { return data_[i * stride_]; }

 private:
  const T* data_ = nullptr;
  int64_t stride_ = 0;
  bool given_ = false;
};

struct PairArguments {
  const std::optional<Tensor>& target;      // [N] int64
  const std::optional<Tensor>& query_mask;  // [N] bool
  const std::optional<Tensor>& key_mask;    // [M] bool
  const std::optional<Tensor>& query_ids;   // [N] int64
  const std::optional<Tensor>& key_ids;     // [M] int64
  int64_t target_offset;
  int64_t ignore_index;
  int64_t same_id;
  bool exclude_self;
};

// The present rows of one side.
struct PresentRows {
  int64_t all = 0, count = 0;
  Buffer<int32_t> row;    // [count], which row each of them is; empty if all are present
  Buffer<int32_t> place;  // [all], and back, -1 if absent; empty if all are present
  Buffer<int32_t> id;     // [count]; empty if same_id is negative

  int64_t row_of(int64_t i) const { return row.size() == 0 ? i : row[i]; }
  int32_t place_of(int64_t i) const { return place.size() == 0 ? int32_t(i) : place[i]; }
};

struct ContrastivePairs {
  PresentRows queries, keys;
  SameId same_id = kSameIdNegative;
  Buffer<int32_t> target;  // [n], present key of the positive, or -1
  Buffer<int32_t> self;    // [n], present key that is the query itself, or -1; may be empty
  Buffer<bool> ignored;    // [n], true if the target is ignore_index; empty without a target
};

ContrastivePairs contrastive_pairs(
    const char* op, int64_t N, int64_t M, const PairArguments& arguments);

// The queries of each key: those whose target it is, rising. query[i] for i in
// [start[j], start[j + 1]).
struct QueriesOfKeys {
  Buffer<int32_t> start;  // [m + 1]
  Buffer<int32_t> query;  // [number of queries with a target]
};

QueriesOfKeys queries_of_keys(const ContrastivePairs& pairs);

}  // namespace m2ae::cpu
