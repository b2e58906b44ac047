// topk_gating on CUDA, backward: checks, memory, launches. The kernels are in
// topk_gating_backward.cu; contract and math: m2ae_kernels/ops/topk_gating.py
#include <limits>
#include <tuple>

#include "topk_gating_host.h"

namespace m2ae::cuda {
namespace {

std::tuple<Tensor, Tensor> topk_gating_backward_cuda(
    const std::optional<Tensor>& grad_weights /* [R, k] */,
    const std::optional<Tensor>& grad_logsumexp /* [R] */,
    const std::optional<Tensor>& grad_entropy /* [R] */,
    const std::optional<Tensor>& grad_probs_sum /* [E] */,
    const Tensor& logits /* [T, E] */,
    const std::optional<Tensor>& logit_shift,  // [S, E]
    const std::optional<Tensor>& token_mask,   // [T]
    const Tensor& topk_ids /* [R, k] */,
    int64_t score_function,
    bool norm_topk_prob,
    double routed_scaling_factor,
    bool zero_nan,
    const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(
      output_mask.size() == 2 && topk_ids.dim() == 2,
      "topk_gating: expected topk_ids [R, k] and 2 flags");
  [[maybe_unused]] const auto guard = device_guard(logits);
  GatingTensors tensors(logits);
  GatingBackward given{};
  const int64_t k = topk_ids.size(1);
  tensors.read(given, logits, logit_shift, token_mask, k, score_function);
  const int64_t E = given.E, R = given.S * given.T;
  STD_TORCH_CHECK(
      given.S * E <= std::numeric_limits<int32_t>::max(),
      "topk_gating: expected logit_shift of less than 2^31 numbers, got ",
      given.S * E);
  given.ids =
      static_cast<const int32_t*>(tensors.hold("topk_ids", topk_ids, ScalarType::Int, R * k));
  given.norm_topk_prob = norm_topk_prob;
  given.zero_nan = zero_nan;
  given.routed_scaling_factor = float(routed_scaling_factor);
  given.grad_weights = tensors.floats("the gradient of topk_weights", grad_weights, R * k);
  given.grad_logsumexp = tensors.floats("the gradient of logsumexp", grad_logsumexp, R);
  given.grad_entropy = tensors.floats("the gradient of entropy", grad_entropy, R);
  given.grad_probs_sum = tensors.floats("the gradient of probs_sum", grad_probs_sum, E);

  constexpr ScalarType kFloat = ScalarType::Float;
  const bool has_shift = output_mask[1] && logit_shift;
  Tensor grad_logits = output_mask[0]
                           ? torch::stable::new_empty(logits, {given.T, E}, logits.scalar_type())
                           : torch::stable::new_empty(logits, {0}, logits.scalar_type());
  const ScalarType of_shift = has_shift ? logit_shift->scalar_type() : kFloat;
  Tensor grad_shift = has_shift ? torch::stable::new_empty(logits, {given.S, E}, of_shift)
                                : torch::stable::new_empty(logits, {0}, kFloat);
  const int64_t sums = has_shift ? given.S * E * gating_grid(given.T, given.S, E).tokens : 0;
  Tensor block_shifts = torch::stable::new_empty(logits, {sums}, kFloat);
  if (output_mask[0]) given.grad_logits = grad_logits.mutable_data_ptr();
  if (has_shift) {
    given.grad_shift = grad_shift.mutable_data_ptr();
    given.block_shifts = block_shifts.mutable_data_ptr<float>();
  }
  M2AE_CUDA_CHECK(topk_gating_backward_launch(given, current_stream(logits)));
  return {grad_logits, grad_shift};
}

}  // namespace
}  // namespace m2ae::cuda

M2AE_CUDA_LIBRARY(m) {
  m.impl("topk_gating_backward", TORCH_BOX(&m2ae::cuda::topk_gating_backward_cuda));
}
