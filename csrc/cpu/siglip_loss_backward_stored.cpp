// siglip_loss_backward_stored on the CPU: gradients made in forward times the upstream one, rounded
// to the dtypes of their inputs in the same pass. Contract: m2ae_kernels/ops/_siglip_loss_op.py
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "../floating_element.h"
#include "isa.h"

namespace m2ae::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 1 << 15;  // elements: 128 KB, what pays for waking a thread

Tensor scaled(const Tensor& stored, float factor, const Tensor& input, bool is_needed) {
  if (!is_needed) return torch::stable::new_empty(input, {0});
  STD_TORCH_CHECK(
      stored.scalar_type() == ScalarType::Float && stored.numel() == input.numel(),
      "siglip_loss: expected stored gradients in float32, of their inputs' shapes");
  const Tensor from = torch::stable::contiguous(stored);
  Tensor to = torch::stable::new_empty(input, input.sizes());
  const float* const data = from.const_data_ptr<float>();
  char* const out = static_cast<char*>(to.mutable_data_ptr());
  const Element element = floating_element("siglip_loss", "inputs", input.scalar_type());
  const auto scale = kernels().siglip_scale[int(element)];
  const int64_t n = from.numel();
  const auto run = [&](int64_t begin, int64_t end) {
    scale(data + begin, factor, end - begin, out + begin * bytes_of(element));
  };
  if (n <= kChunk)
    run(0, n);
  else
    torch::stable::parallel_for(0, n, kChunk, run);
  return to;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> siglip_loss_backward_stored_cpu(
    const Tensor& grad /* [] */,
    const Tensor& images /* [N, D] */,
    const Tensor& texts /* [M, D] */,
    const Tensor& logit_scale /* [] */,
    const Tensor& logit_bias /* [] */,
    const Tensor& grad_image,  // those of the inputs, or [0]
    const Tensor& grad_text,
    const Tensor& grad_scale,
    const Tensor& grad_bias,
    const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(
      grad.is_cpu() && grad.numel() == 1 && grad.scalar_type() == ScalarType::Float &&
          output_mask.size() == 4,
      "siglip_loss: expected grad [] in float32 on the CPU and 4 flags");
  const float factor = *grad.const_data_ptr<float>();
  return {
      scaled(grad_image, factor, images, output_mask[0]),
      scaled(grad_text, factor, texts, output_mask[1]),
      scaled(grad_scale, factor, logit_scale, output_mask[2]),
      scaled(grad_bias, factor, logit_bias, output_mask[3])};
}

}  // namespace
}  // namespace m2ae::cpu

STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CPU, m) {
  m.impl("siglip_loss_backward_stored", TORCH_BOX(&m2ae::cpu::siglip_loss_backward_stored_cpu));
}
