// topk_gating on the CPU, backward: arguments, threads, sums over tasks. The loops are in
// topk_gating_backward_kernel.h; contract and math: m2ae_kernels/ops/topk_gating.py
#include <tuple>
#include <vector>

#include "../topk_gating_choice.h"
#include "topk_gating_tasks.h"

namespace m2ae::cpu {
namespace {

// A gradient of an output, if it has one; the tensor is what keeps it.
const float* gradient_of(const char* name, std::optional<Tensor>& gradient, int64_t numel) {
  if (!gradient) return nullptr;
  gradient = gating_tensor(name, *gradient, ScalarType::Float, numel);
  return gradient->const_data_ptr<float>();
}

void run_backward(
    const GatingBackward& given, GatingBackwardKernel& kernel, float* grad_shift /* [S, E] */) {
  const int64_t E = given.E, rows = gating_task(E), tasks = (given.T + rows - 1) / rows;
  const int64_t numbers = grad_shift == nullptr ? 0 : given.S * E;
  const Buffer<double> sums(tasks * numbers);
  run_gating(tasks, given.S * given.T * E, [&](int64_t task) {
    const int64_t begin = task * rows, end = std::min(begin + rows, given.T);
    const Buffer<float> scratch(gating_scratch(E) + numbers * kGatingRows);
    double* const of_task = numbers == 0 ? nullptr : &sums[task * numbers];
    std::fill_n(of_task, numbers, 0.0);
    kernel(given, begin, end, scratch.data(), scratch.data() + gating_scratch(E), of_task);
  });
  for (int64_t i = 0; i < numbers; ++i) {
    double sum = 0;
    for (int64_t task = 0; task < tasks; ++task) sum += sums[task * numbers + i];
    grad_shift[i] = float(sum);
  }
}

std::tuple<Tensor, Tensor> topk_gating_backward_cpu(
    std::optional<Tensor> grad_weights /* [R, k] */,
    std::optional<Tensor> grad_logsumexp /* [R] */,
    std::optional<Tensor> grad_entropy /* [R] */,
    std::optional<Tensor> grad_probs_sum /* [E] */,
    const Tensor& logits /* [T, E] */,
    const std::optional<Tensor>& logit_shift,  // [S, E]
    const std::optional<Tensor>& token_mask,   // [T]
    const Tensor& topk_ids /* [R, k] */,
    int64_t score_function,
    bool norm_topk_prob,
    double routed_scaling_factor,
    bool zero_nan,
    const std::vector<bool>& output_mask) {
  const GatingTensors tensors(logits, logit_shift, token_mask);
  GatingBackward given{tensors.input};
  const int64_t E = given.E, R = given.S * given.T;
  STD_TORCH_CHECK(
      output_mask.size() == 2 && topk_ids.dim() == 2,
      "topk_gating: expected topk_ids [R, k] and 2 flags");
  const int64_t k = topk_ids.size(1);
  check_gating_choice(E, k, score_function);
  const Tensor ids = gating_tensor("topk_ids", topk_ids, ScalarType::Int, R * k);
  const bool has_shift = output_mask[1] && logit_shift;
  Tensor grad_logits = output_mask[0] ? pooled_tensor(logits, {given.T, E}, logits.scalar_type())
                                      : torch::stable::new_empty(logits, {0}, logits.scalar_type());
  constexpr ScalarType kFloat = ScalarType::Float;
  const ScalarType of_shift = has_shift ? logit_shift->scalar_type() : kFloat;
  Tensor grad_shift = has_shift ? torch::stable::new_empty(logits, {given.S, E}, of_shift)
                                : torch::stable::new_empty(logits, {0}, kFloat);

  given.k = k;
  given.norm_topk_prob = norm_topk_prob;
  given.zero_nan = zero_nan;
  given.routed_scaling_factor = float(routed_scaling_factor);
  given.ids = ids.const_data_ptr<int32_t>();
  given.grad_weights = gradient_of("the gradient of topk_weights", grad_weights, R * k);
  given.grad_logsumexp = gradient_of("the gradient of logsumexp", grad_logsumexp, R);
  given.grad_entropy = gradient_of("the gradient of entropy", grad_entropy, R);
  given.grad_probs_sum = gradient_of("the gradient of probs_sum", grad_probs_sum, E);
  given.grad_logits = output_mask[0] ? grad_logits.mutable_data_ptr() : nullptr;
  const Buffer<float> sums(has_shift ? given.S * E : 0);
  run_backward(
      given, *kernels().topk_gating_backward[int(tensors.element)][score_function], sums.data());
  if (has_shift) {
    const Element to = tensors.shift_element;
    kernels().cast[int(Element::kFloat32)][int(to)](
        sums.data(), grad_shift.mutable_data_ptr(), given.S * E);
  }
  return {grad_logits, grad_shift};
}

}  // namespace
}  // namespace m2ae::cpu

STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CPU, m) {
  m.impl("topk_gating_backward", TORCH_BOX(&m2ae::cpu::topk_gating_backward_cpu));
}
