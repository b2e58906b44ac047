// moe_unpermute on the CPU. The loops are in moe_unpermute_kernel.h; contract and math:
// m2ae_kernels/ops/moe_unpermute.py
//
// Both directions walk over the rows of the routing. Forward gathers the k rows of y that a row
// has; backward reads a row of the gradient once, and writes to the places of its slots, which no
// other row has. So neither depends on the number of threads.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <tuple>

#include "isa.h"
#include "moe_permute_rows.h"
#include "workspace.h"

namespace m2ae::cpu {
namespace {

constexpr const char* kOp = "moe_unpermute";

struct Combine {
  const Rows y;
  const SortedSlots slots;
  const SlotWeights weights;
  std::optional<Rows> residual;

  Combine(
      const Tensor& y,
      const Tensor& sorted_ids,
      const Tensor& inverse_ids,
      const std::optional<Tensor>& topk_weights,
      const std::optional<Tensor>& given)
      : y(kOp, "y", y),
        slots(kOp, &sorted_ids, inverse_ids, y.size(0)),
        weights(kOp, pointer_to(topk_weights), slots) {
    if (!given) return;
    residual.emplace(kOp, "residual", *given);
    STD_TORCH_CHECK(
        residual->rows() == slots.rows() && residual->width() == this->y.width() &&
            residual->element() == this->y.element(),
        kOp,
        ": expected residual [R, D] in the dtype of y");
  }

  void operator()(void* out /* [R, D] */) const {
    auto* const to = static_cast<char*>(out);
    const int64_t k = slots.slots(), D = y.width(), bytes = y.row_bytes();
    const auto combine = kernels().moe_combine[int(y.element())];
    share(slots.rows(), (k + 1) * bytes, [&](int64_t begin, int64_t end) {
      std::vector<const void*> rows(k);
      std::vector<float> of_rows(k);
      for (int64_t r = begin; r < end; ++r) {
        int64_t count = 0;
        for (int64_t j = 0; j < k; ++j) {
          const int64_t i = slots.at(r, j);
          if (i < 0) continue;
          if (weights.given()) of_rows[count] = weights.of(r)[j];
          rows[count++] = y[i];
        }
        combine(
            rows.data(),
            weights.given() ? of_rows.data() : nullptr,
            count,
            residual ? (*residual)[r] : nullptr,
            D,
            to + r * bytes);
      }
    });
    slots.check();
  }
};

Tensor moe_unpermute_cpu(
    const Tensor& y /* [N, D] */,
    const Tensor& sorted_ids /* [N] */,
    const Tensor& inverse_ids /* [R, k] */,
    const std::optional<Tensor>& topk_weights /* [R, k] */,
    const std::optional<Tensor>& residual /* [R, D] */) {
  const Combine combine(y, sorted_ids, inverse_ids, topk_weights, residual);
  Tensor out = empty_rows(y, combine.slots.rows(), combine.y.width(), combine.y.dtype());
  combine(out.mutable_data_ptr());
  return out;
}

void moe_unpermute_out_cpu(
    const Tensor& y,
    const Tensor& sorted_ids,
    const Tensor& inverse_ids,
    const std::optional<Tensor>& topk_weights,
    const std::optional<Tensor>& residual,
    Tensor out /* [R, D], contiguous; no memory of the inputs but for the residual's */) {
  const Combine combine(y, sorted_ids, inverse_ids, topk_weights, residual);
  STD_TORCH_CHECK(
      out.is_cpu() && out.dim() == 2 && out.is_contiguous() &&
          out.size(0) == combine.slots.rows() && out.size(1) == combine.y.width() &&
          out.scalar_type() == combine.y.dtype(),
      kOp,
      ": expected out [R, D], contiguous, in the dtype of y, on the CPU");
  combine(out.mutable_data_ptr());
}

std::tuple<Tensor, Tensor> moe_unpermute_backward_cpu(
    const Tensor& grad_out /* [R, D] */,
    const std::optional<Tensor>& y /* [N, D] */,
    const Tensor& sorted_ids /* [N] */,
    const Tensor& inverse_ids /* [R, k] */,
    const std::optional<Tensor>& topk_weights /* [R, k] */,
    const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 2, kOp, ": expected 2 flags, got ", output_mask.size());
  const Rows from(kOp, "grad_out", grad_out);
  const int64_t N = sorted_ids.numel(), D = from.width(), bytes = from.row_bytes();
  const SortedSlots slots(kOp, &sorted_ids, inverse_ids, N);
  const SlotWeights weights(kOp, pointer_to(topk_weights), slots);
  const int64_t R = slots.rows(), k = slots.slots();
  STD_TORCH_CHECK(from.rows() == R, kOp, ": expected grad_out [R = ", R, ", D]");
  std::optional<Rows> experts;
  if (y && weights.given() && output_mask[1]) {
    experts.emplace(kOp, "y", *y);
    STD_TORCH_CHECK(
        experts->rows() == N && experts->width() == D && experts->element() == from.element(),
        kOp,
        ": expected y [N, D] in the dtype of grad_out");
  }
  Tensor grad_y = output_mask[0] ? empty_rows(grad_out, N, D, from.dtype())
                                 : torch::stable::new_empty(grad_out, {0});
  Tensor grad_weights = experts ? torch::stable::new_empty(grad_out, {R, k}, ScalarType::Float)
                                : torch::stable::new_empty(grad_out, {0}, ScalarType::Float);
  char* const to = output_mask[0] ? static_cast<char*>(grad_y.mutable_data_ptr()) : nullptr;
  auto* const of_weights = static_cast<float*>(grad_weights.mutable_data_ptr());
  const bool past_caches = N * bytes > kStreamBytes;
  if (to != nullptr) zero_empty_rows(to, bytes, slots, past_caches);
  const auto scale = kernels().moe_scale[int(from.element())];
  const auto dot = kernels().moe_dot[int(from.element())];
  share(R, (2 * k + 1) * bytes, [&](int64_t begin, int64_t end) {
    const Buffer<char> scaled(past_caches ? bytes : 0);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t j = 0; j < k; ++j) {
        const int64_t i = slots.at(r, j);
        if (experts) of_weights[r * k + j] = i < 0 ? 0 : dot(from[r], (*experts)[i], D);
        if (i < 0 || to == nullptr) continue;
        char* const row = to + i * bytes;
        if (!weights.given()) {
          copy_row(row, from[r], bytes, past_caches);
        } else if (past_caches) {
          scale(from[r], weights.of(r)[j], D, scaled.data());
          copy_row(row, scaled.data(), bytes, true);
        } else {
          scale(from[r], weights.of(r)[j], D, row);
        }
      }
    }
    if (past_caches) finish_streams();
  });
  slots.check();
  return {grad_y, grad_weights};
}

}  // namespace
}  // namespace m2ae::cpu

STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CPU, m) {
  m.impl("moe_unpermute", TORCH_BOX(&m2ae::cpu::moe_unpermute_cpu));
  m.impl("moe_unpermute_out", TORCH_BOX(&m2ae::cpu::moe_unpermute_out_cpu));
  m.impl("moe_unpermute_backward", TORCH_BOX(&m2ae::cpu::moe_unpermute_backward_cpu));
}
