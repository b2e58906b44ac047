// How the host functions of topk_gating check their inputs and hold them as raw memory.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "../floating_element.h"
#include "../topk_gating_choice.h"
#include "host.h"
#include "topk_gating.h"

namespace m2ae::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Keeps contiguous versions of the inputs, on one device, for as long as they are read.
class GatingTensors {
 public:
  explicit GatingTensors(const Tensor& logits) : device_(logits.device()) {}

  // Fills in what forward and backward are given alike.
  void read(
      GatingInput& input,
      const Tensor& logits,
      const std::optional<Tensor>& logit_shift,
      const std::optional<Tensor>& token_mask,
      int64_t top_k,
      int64_t score_function) {
    STD_TORCH_CHECK(logits.dim() == 2, "topk_gating: expected logits [T, E]");
    input.T = logits.size(0);
    const int64_t E = logits.size(1);
    check_gating_choice(E, top_k, score_function);
    input.E = int(E);
    input.k = int(top_k);
    input.score = GatingScore(score_function);
    input.element = float32_element("topk_gating", "logits", logits);
    input.logits = hold("logits", logits, logits.scalar_type(), input.T * E);
    input.S = 1;
    if (logit_shift) {
      STD_TORCH_CHECK(
          logit_shift->dim() == 2 && logit_shift->size(1) == E,
          "topk_gating: expected logit_shift [S, E = ",
          E,
          "]");
      const ScalarType type = logit_shift->scalar_type();
      input.S = logit_shift->size(0);
      input.shift_element = float32_element("topk_gating", "logit_shift", *logit_shift);
      input.shift = hold("logit_shift", *logit_shift, type, input.S * E);
    }
    if (token_mask)
      input.mask =
          static_cast<const bool*>(hold("token_mask", *token_mask, ScalarType::Bool, input.T));
  }

  const void* hold(const char* name, const Tensor& tensor, ScalarType dtype, int64_t numel) {
    STD_TORCH_CHECK(
        tensor.device() == device_ && tensor.scalar_type() == dtype &&
            int64_t(tensor.numel()) == numel,
        "topk_gating: expected ",
        name,
        " of ",
        numel,
        " numbers in ",
        toString(dtype),
        " on the device of the logits");
    held_.push_back(torch::stable::contiguous(tensor));
    return held_.back().const_data_ptr();
  }

  const float* floats(const char* name, const std::optional<Tensor>& tensor, int64_t numel) {
    if (!tensor) return nullptr;
    return static_cast<const float*>(hold(name, *tensor, ScalarType::Float, numel));
  }

 private:
  torch::stable::Device device_;
  std::vector<Tensor> held_;
};

}  // namespace m2ae::cuda
