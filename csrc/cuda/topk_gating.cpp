// topk_gating on CUDA, forward: checks, memory, launches. The kernels are in topk_gating.cu;
// contract and math: m2ae_kernels/ops/topk_gating.py
#include <tuple>

#include "topk_gating_host.h"

namespace m2ae::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topk_gating_cuda(
    const Tensor& logits /* [T, E] */,
    const std::optional<Tensor>& logit_shift,  // [S, E]
    const std::optional<Tensor>& expert_bias,  // [E]
    const std::optional<Tensor>& token_mask,   // [T]
    int64_t top_k,
    int64_t score_function,
    bool norm_topk_prob,
    int64_t n_group,
    int64_t topk_group,
    int64_t group_best,
    double routed_scaling_factor,
    bool return_entropy,
    bool return_probs_sum,
    bool zero_nan) {
  [[maybe_unused]] const auto guard = device_guard(logits);
  GatingTensors tensors(logits);
  GatingForward given{};
  tensors.read(given, logits, logit_shift, token_mask, top_k, score_function);
  const int64_t E = given.E, R = given.S * given.T;
  check_gating_groups(E, top_k, n_group, topk_group, group_best);
  given.bias = tensors.floats("expert_bias", expert_bias, E);
  constexpr ScalarType kFloat = ScalarType::Float, kInt = ScalarType::Int;
  Tensor weights = torch::stable::new_empty(logits, {R, top_k}, kFloat);
  Tensor ids = torch::stable::new_empty(logits, {R, top_k}, kInt);
  Tensor logsumexp = torch::stable::new_empty(logits, {R}, kFloat);
  Tensor entropy = torch::stable::new_empty(logits, {return_entropy ? R : 0}, kFloat);
  Tensor probs_sum = torch::stable::new_empty(logits, {return_probs_sum ? E : 0}, kFloat);
  Tensor counts = torch::stable::new_empty(logits, {E}, kInt);
  const int64_t sums = E * gating_grid(given.T, given.S, E).blocks();
  Tensor block_counts = torch::stable::new_empty(logits, {sums}, kInt);
  Tensor block_probs = torch::stable::new_empty(logits, {return_probs_sum ? sums : 0}, kFloat);

  given.norm_topk_prob = norm_topk_prob;
  given.zero_nan = zero_nan;
  given.routed_scaling_factor = float(routed_scaling_factor);
  given.n_group = int(n_group);
  given.topk_group = int(topk_group);
  given.group_best = int(group_best);
  given.weights = weights.mutable_data_ptr<float>();
  given.ids = ids.mutable_data_ptr<int32_t>();
  given.logsumexp = logsumexp.mutable_data_ptr<float>();
  given.counts = counts.mutable_data_ptr<int32_t>();
  given.block_counts = block_counts.mutable_data_ptr<int32_t>();
  if (return_entropy) given.entropy = entropy.mutable_data_ptr<float>();
  if (return_probs_sum) {
    given.probs_sum = probs_sum.mutable_data_ptr<float>();
    given.block_probs = block_probs.mutable_data_ptr<float>();
  }
  M2AE_CUDA_CHECK(topk_gating_launch(given, current_stream(logits)));
  return {weights, ids, logsumexp, entropy, probs_sum, counts};
}

}  // namespace
}  // namespace m2ae::cuda

M2AE_CUDA_LIBRARY(m) {
  m.impl("topk_gating", TORCH_BOX(&m2ae::cuda::topk_gating_cuda));
}
