// How topk_gating is cut into tasks, and its arguments as the loops take them; forward and
// backward.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "isa.h"
#include "pooled_tensor.h"
#include "workspace.h"

namespace m2ae::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of a task: of the shapes alone, so that sums do not depend on the number of threads. Enough
// work to pay for waking a thread, and for adding up the lanes at the end.
inline int64_t gating_task(int64_t E) {
  const int64_t rows = int64_t(1 << 16) / std::max<int64_t>(E, 1);
  return std::clamp<int64_t>(rows / kGatingRows * kGatingRows, 256, 2048);
}

// run(task) for each; on one thread if that is done before a second one would be awake.
template <typename Run>
void run_gating(int64_t tasks, int64_t work, const Run& run) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i);
  };
  if (tasks > 1 && work >= int64_t(1 << 15))
    torch::stable::parallel_for(0, tasks, 1, range);
  else
    range(0, tasks);
}

// The tensors that the pointers of `input` point into, contiguous.
struct GatingTensors {
  Tensor logits;                      // [T, E]
  std::optional<Tensor> shift, mask;  // [S, E] float32, [T]
  Element element, shift_element = Element::kFloat32;
  GatingInput input{};

  GatingTensors(
      const Tensor& given_logits,
      const std::optional<Tensor>& logit_shift,
      const std::optional<Tensor>& token_mask);
};

// Contiguous, on the CPU, of `dtype` and as many numbers as said.
Tensor gating_tensor(const char* name, const Tensor& tensor, ScalarType dtype, int64_t numel);

}  // namespace m2ae::cpu
