// moe_unpermute on CUDA: checks, memory, launches. The kernels are in moe_unpermute.cu; contract
// and math: m2ae_kernels/ops/moe_unpermute.py
#include <tuple>

#include "moe_rows_host.h"

namespace m2ae::cuda {
namespace {

constexpr const char* kOp = "moe_unpermute";

void combine(
    const Tensor& y /* [N, D] */,
    const Tensor& inverse_ids /* [R, k] */,
    const std::optional<Tensor>& topk_weights /* [R, k] */,
    const std::optional<Tensor>& residual /* [R, D] */,
    Tensor& out /* [R, D], contiguous */) {
  MoeInputs inputs(kOp, y);
  STD_TORCH_CHECK(y.dim() == 2, kOp, ": expected y [N, D]");
  const ScalarType type = y.scalar_type();
  MoeRows routing{};
  routing.inverse = inputs.ids("inverse_ids", inverse_ids, 2);
  if (topk_weights)
    routing.weights = inputs.floats("topk_weights", *topk_weights, inverse_ids.numel());
  routing.T = inverse_ids.size(0);
  routing.S = 1;
  routing.k = inverse_ids.size(1);
  routing.N = y.size(0);
  routing.D = y.size(1);
  routing.element = floating_element(kOp, "y", y);
  const void* const rows = inputs.matrix("y", y, routing.N, routing.D, type);
  const void* const added =
      residual ? inputs.matrix("residual", *residual, routing.T, routing.D, type) : nullptr;
  [[maybe_unused]] const auto guard = device_guard(y);
  M2AE_CUDA_CHECK(
      moe_combine_launch(routing, rows, added, out.mutable_data_ptr(), current_stream(y)));
}

Tensor moe_unpermute_cuda(
    const Tensor& y,
    const Tensor&,
    const Tensor& inverse_ids,
    const std::optional<Tensor>& topk_weights,
    const std::optional<Tensor>& residual) {
  STD_TORCH_CHECK(
      y.dim() == 2 && inverse_ids.dim() == 2, kOp, ": expected y [N, D] and inverse_ids [R, k]");
  [[maybe_unused]] const auto guard = device_guard(y);
  Tensor out = torch::stable::new_empty(y, {inverse_ids.size(0), y.size(1)});
  combine(y, inverse_ids, topk_weights, residual, out);
  return out;
}

void moe_unpermute_out_cuda(
    const Tensor& y,
    const Tensor&,
    const Tensor& inverse_ids,
    const std::optional<Tensor>& topk_weights,
    const std::optional<Tensor>& residual,
    Tensor out) {
  STD_TORCH_CHECK(
      out.device() == y.device() && out.dim() == 2 && out.is_contiguous() &&
          out.size(0) == inverse_ids.size(0) && out.size(1) == y.size(1) &&
          out.scalar_type() == y.scalar_type(),
      kOp,
      ": expected out [R, D], contiguous, in the dtype and on the device of y");
  combine(y, inverse_ids, topk_weights, residual, out);
}

std::tuple<Tensor, Tensor> moe_unpermute_backward_cuda(
    const Tensor& grad_out /* [R, D] */,
    const std::optional<Tensor>& y /* [N, D] */,
    const Tensor& sorted_ids /* [N] */,
    const Tensor& inverse_ids /* [R, k] */,
    const std::optional<Tensor>& topk_weights /* [R, k] */,
    const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 2, kOp, ": expected 2 flags, got ", output_mask.size());
  STD_TORCH_CHECK(grad_out.dim() == 2, kOp, ": expected grad_out [R, D]");
  MoeInputs inputs(kOp, grad_out);
  const ScalarType type = grad_out.scalar_type();
  MoeRows routing{};
  routing.sorted = inputs.ids("sorted_ids", sorted_ids, 1);
  routing.inverse = inputs.ids("inverse_ids", inverse_ids, 2);
  if (topk_weights)
    routing.weights = inputs.floats("topk_weights", *topk_weights, inverse_ids.numel());
  routing.T = inverse_ids.size(0);
  routing.S = 1;
  routing.k = inverse_ids.size(1);
  routing.N = sorted_ids.size(0);
  routing.D = grad_out.size(1);
  routing.element = floating_element(kOp, "grad_out", grad_out);
  const void* const grad = inputs.matrix("grad_out", grad_out, routing.T, routing.D, type);
  const bool need_weights = y && topk_weights && output_mask[1];
  const void* const rows =
      need_weights ? inputs.matrix("y", *y, routing.N, routing.D, type) : nullptr;

  [[maybe_unused]] const auto guard = device_guard(grad_out);
  Tensor grad_y = torch::stable::new_empty(grad_out, {0});
  Tensor grad_weights = torch::stable::new_empty(grad_out, {0}, ScalarType::Float);
  if (output_mask[0]) grad_y = torch::stable::new_empty(grad_out, {routing.N, routing.D});
  if (need_weights)
    grad_weights = torch::stable::new_empty(grad_out, {routing.T, routing.k}, ScalarType::Float);
  M2AE_CUDA_CHECK(moe_unpermute_backward_launch(
      routing,
      grad,
      rows,
      output_mask[0] ? grad_y.mutable_data_ptr() : nullptr,
      need_weights ? grad_weights.mutable_data_ptr<float>() : nullptr,
      current_stream(grad_out)));
  return {grad_y, grad_weights};
}

}  // namespace
}  // namespace m2ae::cuda

M2AE_CUDA_LIBRARY(m) {
  m.impl("moe_unpermute", TORCH_BOX(&m2ae::cuda::moe_unpermute_cuda));
  m.impl("moe_unpermute_out", TORCH_BOX(&m2ae::cuda::moe_unpermute_out_cuda));
  m.impl("moe_unpermute_backward", TORCH_BOX(&m2ae::cuda::moe_unpermute_backward_cuda));
}
