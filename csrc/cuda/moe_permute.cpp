// moe_permute on CUDA: checks, memory, launches. The kernels are in moe_permute.cu and
// moe_unpermute.cu; contract and math: m2ae_kernels/ops/moe_permute.py
#include <tuple>

#include "../moe_arguments.h"
#include "moe_rows_host.h"

namespace m2ae::cuda {
namespace {

constexpr const char* kOp = "moe_permute";

std::tuple<Tensor, Tensor> moe_permute_cuda(
    const Tensor& x /* [T, D] */,
    const Tensor& sorted_ids /* [N] */,
    const Tensor& inverse_ids /* [R, k] */,
    const std::optional<Tensor>& topk_weights /* [R, k] */) {
  MoeInputs inputs(kOp, x);
  MoeRows routing{};
  routing.sorted = inputs.ids("sorted_ids", sorted_ids, 1);
  routing.inverse = inputs.ids("inverse_ids", inverse_ids, 2);
  if (topk_weights)
    routing.weights = inputs.floats("topk_weights", *topk_weights, inverse_ids.numel());
  STD_TORCH_CHECK(x.dim() == 2, kOp, ": expected x [T, D]");
  routing.T = x.size(0);
  routing.S = streams_of(kOp, inverse_ids.size(0), routing.T);
  routing.k = inverse_ids.size(1);
  routing.N = sorted_ids.size(0);
  routing.D = x.size(1);
  routing.element = floating_element(kOp, "x", x);
  const void* const from = inputs.matrix("x", x, routing.T, routing.D, x.scalar_type());

  [[maybe_unused]] const auto guard = device_guard(x);
  const int64_t numbers = topk_weights ? routing.N : 0;
  Tensor rows = torch::stable::new_empty(x, {routing.N, routing.D});
  Tensor row_weights = torch::stable::new_empty(x, {numbers}, ScalarType::Float);
  M2AE_CUDA_CHECK(moe_permute_launch(
      routing,
      from,
      rows.mutable_data_ptr(),
      topk_weights ? row_weights.mutable_data_ptr<float>() : nullptr,
      current_stream(x)));
  return {rows, row_weights};
}

std::tuple<Tensor, Tensor> moe_permute_backward_cuda(
    const std::optional<Tensor>& grad_rows /* [N, D] */,
    const std::optional<Tensor>& grad_row_weights /* [N] */,
    const Tensor& inverse_ids /* [R, k] */,
    int64_t T,
    int64_t D,
    const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 2, kOp, ": expected 2 flags, got ", output_mask.size());
  MoeInputs inputs(kOp, inverse_ids);
  MoeRows routing{};
  routing.inverse = inputs.ids("inverse_ids", inverse_ids, 2);
  routing.T = T;
  routing.S = streams_of(kOp, inverse_ids.size(0), T);
  routing.k = inverse_ids.size(1);
  routing.D = D;
  [[maybe_unused]] const auto guard = device_guard(inverse_ids);
  const cudaStream_t stream = current_stream(inverse_ids);
  Tensor grad_x = torch::stable::new_empty(inverse_ids, {0}, ScalarType::Float);
  Tensor grad_weights = torch::stable::new_empty(inverse_ids, {0}, ScalarType::Float);
  if (grad_rows && output_mask[0]) {
    const ScalarType type = grad_rows->scalar_type();
    routing.N = grad_rows->size(0);
    routing.element = floating_element(kOp, "grad_rows", *grad_rows);
    const void* const from = inputs.matrix("grad_rows", *grad_rows, routing.N, D, type);
    grad_x = torch::stable::new_empty(*grad_rows, {T, D});
    M2AE_CUDA_CHECK(moe_combine_launch(routing, from, nullptr, grad_x.mutable_data_ptr(), stream));
  }
  if (grad_row_weights && output_mask[1]) {
    routing.N = grad_row_weights->numel();
    const float* const from = inputs.floats("grad_row_weights", *grad_row_weights, routing.N);
    grad_weights = torch::stable::new_empty(
        *grad_row_weights, {inverse_ids.size(0), routing.k}, ScalarType::Float);
    M2AE_CUDA_CHECK(
        moe_gather_weights_launch(routing, from, grad_weights.mutable_data_ptr<float>(), stream));
  }
  return {grad_x, grad_weights};
}

}  // namespace
}  // namespace m2ae::cuda

M2AE_CUDA_LIBRARY(m) {
  m.impl("moe_permute", TORCH_BOX(&m2ae::cuda::moe_permute_cuda));
  m.impl("moe_permute_backward", TORCH_BOX(&m2ae::cuda::moe_permute_backward_cuda));
}
