// topk_gating's launchers, on raw pointers: implemented in topk_gating.cu and
// topk_gating_backward.cu, called by the .cpp files of the same names.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../element.h"

namespace m2ae::cuda {

constexpr int kGatingThreadExperts = 32;  // more than so many are shared by the lanes of a warp

// In the order of m2ae_kernels/ops/_topk_gating_reference.py
enum GatingScore : int { kSoftmax = 0, kSigmoid = 1, kSqrtSoftplus = 2 };

// Of the shapes alone, so that sums are cut the same way on every device.
struct GatingGrid {
  unsigned tokens, streams;
  int64_t blocks() const { return int64_t(tokens) * streams; }
};

GatingGrid gating_grid(int64_t T, int64_t S, int64_t E);

struct GatingInput {
  const void* logits;  // [T, E]
  const void* shift;   // [S, E] or null
  const bool* mask;    // [T] or null
  Element element, shift_element;
  int64_t T, S;
  int E, k;
  GatingScore score;
  bool norm_topk_prob, zero_nan;
  bool in_vectors;  // set by the launchers: rows are read and written 16 bytes at a time
  float routed_scaling_factor;
};

struct GatingForward : GatingInput {
  const float* bias;  // [E] or null
  int n_group, topk_group, group_best;
  float* weights;         // [S T, k]
  int32_t* ids;           // [S T, k]
  float* logsumexp;       // [S T]
  float* entropy;         // [S T] or null
  float* probs_sum;       // [E] or null
  int32_t* counts;        // [E]
  float* block_probs;     // scratch, [E, blocks]; null as probs_sum is
  int32_t* block_counts;  // scratch, [E, blocks]
};

cudaError_t topk_gating_launch(GatingForward arguments, cudaStream_t stream);

struct GatingBackward : GatingInput {
  const int32_t* ids;           // [S T, k]
  const float* grad_weights;    // [S T, k] or null
  const float* grad_logsumexp;  // [S T] or null
  const float* grad_entropy;    // [S T] or null
  const float* grad_probs_sum;  // [E] or null
  void* grad_logits;            // [T, E] or null
  void* grad_shift;             // [S, E] or null
  float* block_shifts;          // scratch, [S, E, blocks of tokens]; null as grad_shift is
};

cudaError_t topk_gating_backward_launch(GatingBackward arguments, cudaStream_t stream);

}  // namespace m2ae::cuda
