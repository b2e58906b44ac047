#include "topk_gating_tasks.h"

#include "../floating_element.h"

namespace m2ae::cpu {
namespace {

constexpr const char* kOp = "topk_gating";

}  // namespace

Tensor gating_tensor(const char* name, const Tensor& tensor, ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.scalar_type() == dtype && int64_t(tensor.numel()) == numel,
      kOp,
      ": expected ",
      name,
      " of ",
      numel,
      " numbers in ",
      toString(dtype),
      " on the CPU");
  return torch::stable::contiguous(tensor);
}

GatingTensors::GatingTensors(
    const Tensor& given_logits,
    const std::optional<Tensor>& logit_shift,
    const std::optional<Tensor>& token_mask)
    : logits(given_logits), element(float32_element(kOp, "logits", given_logits)) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 2, kOp, ": expected logits [T, E] on the CPU");
  logits = torch::stable::contiguous(logits);
  input.logits = logits.const_data_ptr();
  input.T = logits.size(0);
  input.E = logits.size(1);
  input.S = 1;
  if (logit_shift) {
    STD_TORCH_CHECK(
        logit_shift->is_cpu() && logit_shift->dim() == 2 && logit_shift->size(1) == input.E,
        kOp,
        ": expected logit_shift [S, E = ",
        input.E,
        "] on the CPU");
    shift_element = float32_element(kOp, "logit_shift", *logit_shift);
    const Tensor rows = torch::stable::contiguous(*logit_shift);
    input.S = rows.size(0);
    shift = torch::stable::new_empty(rows, rows.sizes(), ScalarType::Float);
    kernels().cast[int(shift_element)][int(Element::kFloat32)](
        rows.const_data_ptr(), shift->mutable_data_ptr(), rows.numel());
    input.shift = shift->const_data_ptr<float>();
  }
  if (token_mask) {
    mask = gating_tensor("token_mask", *token_mask, ScalarType::Bool, input.T);
    input.mask = static_cast<const bool*>(mask->const_data_ptr());
  }
}

}  // namespace m2ae::cpu
