// topk_gating on the CPU, forward: arguments, threads, sums over tasks. The loops are in
// topk_gating_kernel.h; contract and math: m2ae_kernels/ops/topk_gating.py
//
// A task owns up to gating_task(E) consecutive rows of one stream, and its own sums over them,
// which are added up in the order of the rows.
#include <tuple>

#include "../topk_gating_choice.h"
#include "topk_gating_tasks.h"

namespace m2ae::cpu {

void select_experts(const int32_t* keys, int64_t E, int64_t k, int32_t* ids) {
  // One number that is smaller for the better expert: the key's complement, then the index.
  Buffer<uint64_t> order(E);
  for (int64_t e = 0; e < E; ++e) {
    const uint32_t ascending = uint32_t(keys[e]) ^ 0x7fffffffu;
    order[e] = uint64_t(ascending) << 32 | uint64_t(e);
  }
  uint64_t* const begin = order.data();
  if (k < E) std::nth_element(begin, begin + k, begin + E);
  std::sort(begin, begin + k);
  for (int64_t j = 0; j < k; ++j) ids[j] = int32_t(order[j]);
}

namespace {

struct TaskSums {
  Buffer<double> probs;    // [tasks, E] or none
  Buffer<int32_t> counts;  // [tasks, E]
};

// The sums over tasks, in their order.
void add_up(const TaskSums& sums, int64_t tasks, int64_t E, float* probs_sum, int32_t* counts) {
  std::fill_n(counts, E, 0);
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t e = 0; e < E; ++e) counts[e] += sums.counts[task * E + e];
  if (probs_sum == nullptr) return;
  for (int64_t e = 0; e < E; ++e) {
    double sum = 0;
    for (int64_t task = 0; task < tasks; ++task) sum += sums.probs[task * E + e];
    probs_sum[e] = float(sum);
  }
}

void run_forward(
    const GatingForward& given,
    GatingForwardKernel& kernel,
    float* probs_sum /* [E] or nullptr */,
    int32_t* counts /* [E] */) {
  const int64_t E = given.E, rows = gating_task(E);
  const int64_t tasks_of_stream = (given.T + rows - 1) / rows, tasks = given.S * tasks_of_stream;
  TaskSums sums{Buffer<double>(probs_sum == nullptr ? 0 : tasks * E), Buffer<int32_t>(tasks * E)};
  run_gating(tasks, given.S * given.T * E, [&](int64_t task) {
    const int64_t s = task / tasks_of_stream, begin = task % tasks_of_stream * rows;
    const int64_t end = std::min(begin + rows, given.T);
    const Buffer<float> scratch(gating_scratch(E));
    double* const probs = probs_sum == nullptr ? nullptr : &sums.probs[task * E];
    if (probs != nullptr) std::fill_n(probs, E, 0.0);
    std::fill_n(&sums.counts[task * E], E, 0);
    kernel(given, s, begin, end, scratch.data(), probs, &sums.counts[task * E]);
  });
  add_up(sums, tasks, E, probs_sum, counts);
}

static_assert(kScoreFunctions == kGatingScores);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topk_gating_cpu(
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
  const GatingTensors tensors(logits, logit_shift, token_mask);
  GatingForward given{tensors.input};
  const int64_t E = given.E, R = given.S * given.T;
  given.k = top_k;
  given.n_group = n_group;
  given.topk_group = topk_group;
  given.group_best = group_best;
  check_gating_choice(E, top_k, score_function);
  check_gating_groups(E, top_k, n_group, topk_group, group_best);
  std::optional<Tensor> bias;
  if (expert_bias) bias = gating_tensor("expert_bias", *expert_bias, ScalarType::Float, E);
  constexpr ScalarType kFloat = ScalarType::Float, kInt = ScalarType::Int;
  Tensor weights = pooled_tensor(logits, {R, top_k}, kFloat);
  Tensor ids = pooled_tensor(logits, {R, top_k}, kInt);
  Tensor logsumexp = torch::stable::new_empty(logits, {R}, kFloat);
  Tensor entropy = torch::stable::new_empty(logits, {return_entropy ? R : 0}, kFloat);
  Tensor probs_sum = torch::stable::new_empty(logits, {return_probs_sum ? E : 0}, kFloat);
  Tensor counts = torch::stable::new_empty(logits, {E}, kInt);

  given.norm_topk_prob = norm_topk_prob;
  given.zero_nan = zero_nan;
  given.routed_scaling_factor = float(routed_scaling_factor);
  given.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  given.weights = weights.mutable_data_ptr<float>();
  given.ids = ids.mutable_data_ptr<int32_t>();
  given.logsumexp = logsumexp.mutable_data_ptr<float>();
  given.entropy = return_entropy ? entropy.mutable_data_ptr<float>() : nullptr;
  given.has_probs_sum = return_probs_sum;
  run_forward(
      given,
      *kernels().topk_gating[int(tensors.element)][score_function],
      return_probs_sum ? probs_sum.mutable_data_ptr<float>() : nullptr,
      counts.mutable_data_ptr<int32_t>());
  return {weights, ids, logsumexp, entropy, probs_sum, counts};
}

}  // namespace
}  // namespace m2ae::cpu

STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CPU, m) {
  m.impl("topk_gating", TORCH_BOX(&m2ae::cpu::topk_gating_cpu));
}
