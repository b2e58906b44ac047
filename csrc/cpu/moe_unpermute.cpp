// moe_unpermute on the CPU. The loops are in moe_unpermute_kernel.h; contract and math:
// m2ae_kernels/ops/moe_unpermute.py
//
// Both directions walk over the rows of the routing. Forward gathers the k rows of y that a row
// has; backward reads a row of the gradient once, and writes to the places of its slots, which no
// other row has. So neither depends on the number of threads.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "isa.h"
#include "moe_permute_rows.h"
#include "workspace.h"

namespace m2ae::cpu {
namespace {

constexpr const char* kOp = "moe_unpermute";
// Rows of the gradient whose dots are made before their products are written. Reads of y between
// writes past the caches slow down both: 4,096 x 512 in float32, k = 4, one thread of a Zen 5 takes
// 5.0 ms row by row and 2.7 ms so (2026-11). This many rows stay in a second-level cache.
constexpr int64_t kBackwardRows = 64;

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
  Tensor out = pooled_tensor(y, {combine.slots.rows(), combine.y.width()}, combine.y.dtype());
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

class Gradients {
 public:
  Gradients(
      const Tensor& grad_out,
      const std::optional<Tensor>& y,
      const Tensor& sorted_ids,
      const Tensor& inverse_ids,
      const std::optional<Tensor>& topk_weights,
      const std::vector<bool>& wanted)
      : grad_(kOp, "grad_out", grad_out),
        slots_(kOp, &sorted_ids, inverse_ids, sorted_ids.numel()),
        weights_(kOp, pointer_to(topk_weights), slots_) {
    STD_TORCH_CHECK(wanted.size() == 2, kOp, ": expected 2 flags, got ", wanted.size());
    const int64_t N = slots_.sorted_rows(), R = slots_.rows();
    STD_TORCH_CHECK(grad_.rows() == R, kOp, ": expected grad_out [R = ", R, ", D]");
    of_weights_ = wanted[1] && y && weights_.given();
    if (of_weights_) {
      y_.emplace(kOp, "y", *y);
      STD_TORCH_CHECK(
          y_->rows() == N && y_->width() == grad_.width() && y_->element() == grad_.element(),
          kOp,
          ": expected y [N, D] in the dtype of grad_out");
    }
    of_y_ = wanted[0];
    streams_ = N * grad_.row_bytes() > kStreamBytes;
  }

  std::tuple<Tensor, Tensor> operator()(const Tensor& like) const {
    const int64_t N = slots_.sorted_rows(), R = slots_.rows(), k = slots_.slots();
    Tensor of_y = of_y_ ? pooled_tensor(like, {N, grad_.width()}, grad_.dtype())
                        : torch::stable::new_empty(like, {0});
    Tensor of_weights = of_weights_ ? torch::stable::new_empty(like, {R, k}, ScalarType::Float)
                                    : torch::stable::new_empty(like, {0}, ScalarType::Float);
    auto* const rows = static_cast<char*>(of_y.mutable_data_ptr());
    auto* const dots = static_cast<float*>(of_weights.mutable_data_ptr());
    if (of_y_) zero_empty_rows(rows, grad_.row_bytes(), slots_, streams_);
    share(R, (2 * k + 1) * grad_.row_bytes(), [&](int64_t begin, int64_t end) {
      const Buffer<char> scaled(streams_ ? grad_.row_bytes() : 0);
      for (int64_t r = begin; r < end; r += kBackwardRows) {
        const int64_t last = std::min(r + kBackwardRows, end);
        if (of_weights_) write_dots(r, last, dots);
        if (of_y_) write_rows(r, last, rows, scaled.data());
      }
      if (streams_) finish_streams();
    });
    slots_.check();
    return {of_y, of_weights};
  }

 private:
  void write_dots(int64_t begin, int64_t end, float* dots /* [R, k] */) const {
    const auto dot = kernels().moe_dot[int(grad_.element())];
    const int64_t k = slots_.slots();
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t j = 0; j < k; ++j) {
        const int64_t i = slots_.at(r, j);
        dots[r * k + j] = i < 0 ? 0 : dot(grad_[r], (*y_)[i], grad_.width());
      }
    }
  }

  void write_rows(int64_t begin, int64_t end, char* rows /* [N, D] */, char* scaled) const {
    const auto scale = kernels().moe_scale[int(grad_.element())];
    const int64_t bytes = grad_.row_bytes();
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t j = 0; j < slots_.slots(); ++j) {
        const int64_t i = slots_.at(r, j);
        if (i < 0) continue;
        char* const row = rows + i * bytes;
        if (!weights_.given()) {
          copy_row(row, grad_[r], bytes, streams_);
        } else if (streams_) {
          scale(grad_[r], weights_.of(r)[j], grad_.width(), scaled);
          copy_row(row, scaled, bytes, true);
        } else {
          scale(grad_[r], weights_.of(r)[j], grad_.width(), row);
        }
      }
    }
  }

  const Rows grad_;
  const SortedSlots slots_;
  const SlotWeights weights_;
  std::optional<Rows> y_;
  bool of_y_, of_weights_, streams_;
};

std::tuple<Tensor, Tensor> moe_unpermute_backward_cpu(
    const Tensor& grad_out /* [R, D] */,
    const std::optional<Tensor>& y /* [N, D] */,
    const Tensor& sorted_ids /* [N] */,
    const Tensor& inverse_ids /* [R, k] */,
    const std::optional<Tensor>& topk_weights /* [R, k] */,
    const std::vector<bool>& output_mask) {
  const Gradients gradients(grad_out, y, sorted_ids, inverse_ids, topk_weights, output_mask);
  return gradients(grad_out);
}

}  // namespace
}  // namespace m2ae::cpu

STABLE_TORCH_LIBRARY_IMPL(m2ae_kernels, CPU, m) {
  m.impl("moe_unpermute", TORCH_BOX(&m2ae::cpu::moe_unpermute_cpu));
  m.impl("moe_unpermute_out", TORCH_BOX(&m2ae::cpu::moe_unpermute_out_cpu));
  m.impl("moe_unpermute_backward", TORCH_BOX(&m2ae::cpu::moe_unpermute_backward_cpu));
}
