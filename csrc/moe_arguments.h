// What the host functions of moe_sort and moe_permute check on the CPU and on CUDA alike.
// Contracts: m2ae_kernels/ops/moe_sort.py and moe_permute.py
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>

namespace m2ae {

// Of S streams of T tokens each, S.
inline int64_t streams_of(const char* op, int64_t R, int64_t T) {
  STD_TORCH_CHECK(
      T > 0 ? R % T == 0 : R == 0,
      op,
      ": expected R of the routing to be a multiple of T = ",
      T,
      ", got ",
      R);
  return T > 0 ? R / T : 0;
}

enum class DropPolicy { kPosition = 0, kSlot = 1, kProb = 2 };

// The arguments of moe_sort that are no memory, and what follows from them.
struct MoeSortOptions {
  int64_t R;
  int64_t k;
  int64_t slots;  // R k
  int64_t E;
  int64_t N;
  std::optional<int64_t> capacity;
  DropPolicy policy;
  int64_t align;
  bool by_weight;  // slots compete for the capacity by their weights

  MoeSortOptions(
      const torch::stable::Tensor& topk_ids /* [R, k] */,
      int64_t num_experts,
      std::optional<int64_t> capacity,
      int64_t drop_policy,
      const std::optional<torch::stable::Tensor>& topk_weights /* [R, k] */,
      int64_t align)
      : E(num_experts), capacity(capacity), policy(DropPolicy(drop_policy)), align(align) {
    using torch::headeronly::ScalarType;
    STD_TORCH_CHECK(
        topk_ids.dim() == 2 && topk_ids.scalar_type() == ScalarType::Int,
        "moe_sort: expected topk_ids [R, k] of int32");
    R = topk_ids.size(0);
    k = topk_ids.size(1);
    slots = R * k;
    STD_TORCH_CHECK(
        k >= 1 && E >= 1 && align >= 1, "moe_sort: expected k, E and align of 1 or more");
    STD_TORCH_CHECK(
        drop_policy >= 0 && drop_policy <= 2 && capacity.value_or(0) >= 0,
        "moe_sort: expected drop_policy 0, 1 or 2, and no negative capacity");
    N = (slots + E * (align - 1) + align - 1) / align * align;
    STD_TORCH_CHECK(
        N <= std::numeric_limits<int32_t>::max(),
        "moe_sort: expected less than 2^31 rows, got ",
        N);
    by_weight = policy == DropPolicy::kProb && capacity;
    STD_TORCH_CHECK(
        !by_weight ||
            (topk_weights && topk_weights->device() == topk_ids.device() &&
             topk_weights->dim() == 2 && topk_weights->size(0) == R && topk_weights->size(1) == k &&
             topk_weights->scalar_type() == ScalarType::Float),
        "moe_sort: expected topk_weights [R, k] of float32 on the device of topk_ids for"
        " drop_policy 2");
  }
};

}  // namespace m2ae
