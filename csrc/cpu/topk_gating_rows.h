// What the loops of topk_gating are given: one task owns rows [begin, end) of each stream.
// Included by isa.h; contract and math: m2ae_kernels/ops/topk_gating.py
#pragma once

#include <cstdint>

namespace m2ae::cpu {

// In the order of m2ae_kernels/ops/_topk_gating_reference.py
enum ScoreFunction : int { kSoftmax = 0, kSigmoid = 1, kSqrtSoftplus = 2 };
constexpr int kScoreFunctions = 3;

// Rows that are side by side in the lanes of a vector of the widest set; tasks begin at multiples.
constexpr int64_t kGatingRows = 16;
// More than so many experts per row are chosen by select_experts().
constexpr int64_t kMostChosen = 16;

struct GatingInput {
  const void* logits;  // [T, E]
  const float* shift;  // [S, E] or nullptr
  const bool* mask;    // [T] or nullptr
  int64_t T, S, E, k;
  bool norm_topk_prob, zero_nan;
  float routed_scaling_factor;
};

struct GatingForward : GatingInput {
  const float* bias;  // [E] or nullptr
  int64_t n_group, topk_group, group_best;
  float* weights;    // [S * T, k]
  int32_t* ids;      // [S * T, k]
  float* logsumexp;  // [S * T]
  float* entropy;    // [S * T] or nullptr
  bool has_probs_sum;
};

// Rows begin to end of stream s. probs_sum [E] and counts [E] of these rows alone are added up.
using GatingForwardKernel = void(
    const GatingForward& given,
    int64_t s,
    int64_t begin,
    int64_t end,
    float* scratch /* [gating_scratch(E)] */,
    double* probs_sum,
    int32_t* counts);

struct GatingBackward : GatingInput {
  const int32_t* ids;           // [S * T, k]
  const float* grad_weights;    // [S * T, k] or nullptr
  const float* grad_logsumexp;  // [S * T] or nullptr
  const float* grad_entropy;    // [S * T] or nullptr
  const float* grad_probs_sum;  // [E] or nullptr
  void* grad_logits;            // [T, E] or nullptr
};

// Tokens begin to end, all streams. grad_shift [S, E] of these tokens alone is added up.
using GatingBackwardKernel = void(
    const GatingBackward& given,
    int64_t begin,
    int64_t end,
    float* scratch /* [gating_scratch(E)] */,
    float* shift_sums /* [S, E, kGatingRows] if there is grad_shift */,
    double* grad_shift /* or nullptr */);

// Ten numbers for each expert of each of kGatingRows rows, experts padded: see GatingScratch.
inline int64_t gating_scratch(int64_t E) {
  return 10 * (((E + 15) / 16) * 16 + 16) * kGatingRows;
}

// The k experts of the largest keys [E], a tie to the lowest; one row.
void select_experts(const int32_t* keys, int64_t E, int64_t k, int32_t* ids /* [k] */);

}  // namespace m2ae::cpu
