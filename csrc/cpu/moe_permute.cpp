// moe_permute on the CPU. Contract and math: m2ae_kernels/ops/moe_permute.py
//
// Forward walks over tokens: a row of x is read once and written to its slots' places, which no
// other token has. Backward walks over tokens, too, and gathers; its sums are the loop of
// moe_unpermute_kernel.h. So neither depends on the number of threads.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../moe_arguments.h"
#include "isa.h"
#include "moe_permute_rows.h"

namespace m2ae::cpu {
namespace {

constexpr const char* kOp = "moe_permute";

std::tuple<Tensor, Tensor> moe_permute_cpu(
    const Tensor& x /* [T, D] */,
    const Tensor& sorted_ids /* [N] */,
    const Tensor& inverse_ids /* [R, k] */,
    const std::optional<Tensor>& topk_weights /* [R, k] */) {
  const Rows from(kOp, "x", x);
  const int64_t N = sorted_ids.numel(), T = from.rows(), D = from.width();
  const SortedSlots slots(kOp, &sorted_ids, inverse_ids, N);
  const SlotWeights weights(kOp, pointer_to(topk_weights), slots);
  const int64_t S = streams_of(kOp, slots.rows(), T), k = slots.slots(), bytes = from.row_bytes();

  Tensor rows = pooled_tensor(x, {N, D}, from.dtype());
  Tensor row_weights = torch::stable::new_empty(x, {weights.given() ? N : 0}, ScalarType::Float);
  auto* const to = static_cast<char*>(rows.mutable_data_ptr());
  auto* const of_rows = static_cast<float*>(row_weights.mutable_data_ptr());
  const bool past_caches = N * bytes > kStreamBytes;
  zero_empty_rows(to, bytes, slots, past_caches);
  if (weights.given())
    for (int64_t i = 0; i < N; ++i)
      if (slots.is_empty(i)) of_rows[i] = 0;
  share(T, (S * k + 1) * bytes, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t r = t; r < S * T; r += T) {
        for (int64_t j = 0; j < k; ++j) {
          const int64_t i = slots.at(r, j);
          if (i < 0) continue;
          copy_row(to + i * bytes, from[t], bytes, past_caches);
          if (weights.given()) of_rows[i] = weights.of(r)[j];
        }
      }
    }
    if (past_caches) finish_streams();
  });
  slots.check();
  return {rows, row_weights};
}

// Sums, for each token, of the gradients of its rows.
Tensor gradient_of_tokens(const Tensor& grad_rows, const Tensor& inverse_ids, int64_t T) {
  const Rows from(kOp, "grad_rows", grad_rows);
  const SortedSlots slots(kOp, nullptr, inverse_ids, from.rows());
  const int64_t S = streams_of(kOp, slots.rows(), T), k = slots.slots(), D = from.width();
  Tensor grad_x = pooled_tensor(grad_rows, {T, D}, from.dtype());
  auto* const to = static_cast<char*>(grad_x.mutable_data_ptr());
  const auto sum = kernels().moe_combine[int(from.element())];
  share(T, (S * k + 1) * from.row_bytes(), [&](int64_t begin, int64_t end) {
    std::vector<const void*> rows(S * k);
    for (int64_t t = begin; t < end; ++t) {
      int64_t count = 0;
      for (int64_t r = t; r < S * T; r += T)
        for (int64_t j = 0; j < k; ++j)
          if (const int64_t i = slots.at(r, j); i >= 0) rows[count++] = from[i];
      sum(rows.data(), nullptr, count, nullptr, D, to + t * from.row_bytes());
    }
  });
  slots.check();
  return grad_x;
}

Tensor gradient_of_weights(const Tensor& grad_row_weights, const Tensor& inverse_ids) {
  STD_TORCH_CHECK(
      grad_row_weights.is_cpu() && grad_row_weights.dim() == 1 &&
          grad_row_weights.scalar_type() == ScalarType::Float,
      kOp,
      ": expected grad_row_weights [N] of float32 on the CPU");
  const SortedSlots slots(kOp, nullptr, inverse_ids, grad_row_weights.size(0));
  const int64_t R = slots.rows(), k = slots.slots();
  Tensor grad = torch::stable::new_empty(grad_row_weights, {R, k});
  float* const to = grad.mutable_data_ptr<float>();
  const float* const from = grad_row_weights.const_data_ptr<float>();
  const int64_t stride = grad_row_weights.stride(0);
  share(R, 8 * k, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t j = 0; j < k; ++j) {
        const int64_t i = slots.at(r, j);
        to[r * k + j] = i < 0 ? 0 : from[i * stride];
      }
  });
  slots.check();
  return grad;
}

std::tuple<Tensor, Tensor> moe_permute_backward_cpu(
    const std::optional<Tensor>& grad_rows /* [N, D] */,
    const std::optional<Tensor>& grad_row_weights /* [N] */,
    const Tensor& inverse_ids /* [R, k] */,
    int64_t T,
    int64_t D,
    const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 2, kOp, ": expected 2 flags, got ", output_mask.size());
  STD_TORCH_CHECK(
      !grad_rows || (grad_rows->dim() == 2 && grad_rows->size(1) == D),
      kOp,
      ": expected grad_rows [N, D = ",
      D,
      "]");
  const auto none = [&] { return torch::stable::new_empty(inverse_ids, {0}, ScalarType::Float); };
  return {
      grad_rows && output_mask[0] ? gradient_of_tokens(*grad_rows, inverse_ids, T) : none(),
      grad_row_weights && output_mask[1] ? gradient_of_weights(*grad_row_weights, inverse_ids)
                                         : none()};
}

}  // namespace
}  // namespace m2ae::cpu

STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CPU, m) {
  m.impl("moe_permute", TORCH_BOX(&m2ae::cpu::moe_permute_cpu));
  m.impl("moe_permute_backward", TORCH_BOX(&m2ae::cpu::moe_permute_backward_cpu));
}
