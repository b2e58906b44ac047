// moe_sort on CUDA: checks, memory, launches. The kernels are in moe_sort.cu; contract:
// m2ae_kernels/ops/moe_sort.py
//
// Where an expert's slots compete for its capacity in another order than they are sorted in, who is
// kept is found out first, in that order, and the sort sees the others as skipped.
#include "moe_sort.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>
#include <tuple>

#include "../moe_arguments.h"
#include "host.h"

namespace m2ae::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "moe_sort";

// Slots, largest weight first, equal ones as they stand, NaN last: ascending order of -w.
Tensor order_by_weight(const Tensor& weights /* [R, k] */) {
  using torch::stable::detail::from;
  const Tensor flat = torch::stable::flatten(torch::stable::contiguous(weights));
  std::array<StableIValue, 1> negated{from(flat)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::neg", "", negated.data(), TORCH_ABI_VERSION));
  std::array<StableIValue, 4> sorted{negated[0], from(true), from(int64_t(0)), from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::argsort", "stable", sorted.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(sorted[0]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_sort_cuda(
    const Tensor& topk_ids /* [R, k] */,
    int64_t num_experts,
    std::optional<int64_t> capacity,
    int64_t drop_policy,
    const std::optional<Tensor>& topk_weights /* [R, k] */,
    int64_t align) {
  const MoeSortOptions options(topk_ids, num_experts, capacity, drop_policy, topk_weights, align);
  const int64_t R = options.R, k = options.k, slots = options.slots, E = options.E, N = options.N;
  STD_TORCH_CHECK(
      E <= kMoeSortMaxExperts,
      kOp,
      ": expected at most ",
      kMoeSortMaxExperts,
      " experts on CUDA, got ",
      E);

  [[maybe_unused]] const auto guard = device_guard(topk_ids);
  const cudaStream_t stream = current_stream(topk_ids);
  const Tensor ids = torch::stable::contiguous(topk_ids);
  Tensor sorted_ids = torch::stable::new_empty(topk_ids, {N});
  Tensor inverse_ids = torch::stable::new_empty(topk_ids, {R, k});
  Tensor expert_offsets = torch::stable::new_empty(topk_ids, {E + 1});
  Tensor tokens_per_expert = torch::stable::new_empty(topk_ids, {E});
  Tensor counts = torch::stable::new_empty(topk_ids, {E * (moe_sort_blocks(slots) + 1)});
  MoeSortArguments arguments{};
  arguments.ids = ids.const_data_ptr<int32_t>();
  arguments.slots = slots;
  arguments.k = k;
  arguments.E = E;
  arguments.N = N;
  arguments.capacity = capacity.value_or(kMoeSortNoCapacity);
  arguments.align = align;
  arguments.totals = counts.mutable_data_ptr<int32_t>();
  arguments.counts = arguments.totals + E;
  arguments.sorted = sorted_ids.mutable_data_ptr<int32_t>();
  arguments.inverse = inverse_ids.mutable_data_ptr<int32_t>();
  arguments.offsets = expert_offsets.mutable_data_ptr<int32_t>();
  arguments.kept = tokens_per_expert.mutable_data_ptr<int32_t>();

  if (capacity && options.policy != DropPolicy::kPosition && slots > 0) {
    Tensor kept_ids = torch::stable::new_empty(topk_ids, {R, k});
    int32_t* const kept = kept_ids.mutable_data_ptr<int32_t>();
    if (options.by_weight) {
      const Tensor order = order_by_weight(*topk_weights);
      M2AE_CUDA_CHECK(
          moe_sort_drop_launch(arguments, {order.const_data_ptr<int64_t>(), 0}, kept, stream));
    } else {
      M2AE_CUDA_CHECK(moe_sort_drop_launch(arguments, {nullptr, R}, kept, stream));
    }
    arguments.ids = kept;
    M2AE_CUDA_CHECK(moe_sort_launch(arguments, stream));
  } else {
    M2AE_CUDA_CHECK(moe_sort_launch(arguments, stream));
  }
  return {sorted_ids, inverse_ids, expert_offsets, tokens_per_expert};
}

}  // namespace
}  // namespace m2ae::cuda

M2AE_CUDA_LIBRARY(m) {
  m.impl("moe_sort", TORCH_BOX(&m2ae::cuda::moe_sort_cuda));
}
