// The CPU kernels, one table per instruction set. isa_<name>.cpp compiles every *_kernel.h for its
// set and fills its table; kernels() is the best one this machine runs.
#pragma once

#include <cstdint>

#include "../element.h"
#include "expert_mlp_tile.h"
#include "gemm.h"
#include "info_nce_loss_tile.h"
#include "siglip_loss_tile.h"
#include "topk_gating_rows.h"

namespace m2ae::cpu {

struct Kernels {
  const char* name;

  // target <- average of target and source, weight of the source in (0, 1), or a plain copy.
  using EmaUpdate =
      void(void* target /* [n] */, const void* source /* [n] */, int64_t n, double weight);
  EmaUpdate* ema_update[kFloatingElements][kFloatingElements];  // by target and source element

  // to <- from, rounded to nearest even.
  using Cast = void(const void* from /* [n] */, void* to /* [n] */, int64_t n);
  Cast* cast[kFloatingElements][kFloatingElements];  // by the element of from and of to

  // Rows of the contrastive losses: contrastive_rows_kernel.h. No loss takes float64.
  using SquareNorm = double(const void* row, int64_t stride, int64_t n);
  using PackRow = void(
      const void* row, int64_t stride, int64_t n, float a, float b, void* packed, int64_t depth);
  using WriteGradient =
      void(const float* gradient, double a, const void* row, double b, int64_t n, void* out);
  using Transpose = void(
      const void* from, int64_t ld_from, int64_t rows, int64_t columns, void* to, int64_t ld_to);
  SquareNorm* square_norm[kFloatingElements];
  PackRow* pack_row[kFloatingElements][kOperands];
  WriteGradient* write_gradient[kFloatingElements][kOperands];
  double (*dot_rows[kOperands])(const void* a, const void* b, int64_t n);
  double (*dot_gradient[kOperands])(const void* row, const float* gradient, int64_t n);
  void (*add_row[kOperands])(const void* row, float factor, float* gradient, int64_t n);
  Transpose* transpose32;
  Transpose* transpose16;
  void (*pair_rows)(const void* from, int64_t ld, int64_t rows, int64_t n, void* to);
  void (*add)(float* sum, const float* more, int64_t n);

  // Tiles of info_nce_loss.
  NceSumsKernel* nce_sums[kOperands][kSameIds];
  NceSumsKernel* nce_robust_sums[kOperands][kSameIds];
  NceRanksKernel* nce_ranks[kOperands][kSameIds];
  NceGradientKernel* nce_gradient[kOperands][kSameIds];
  NceGradientKernel* nce_robust_gradient[kOperands][kSameIds];

  // Tiles of siglip_loss: the loss, or with its gradient.
  SiglipKernel* siglip_loss[kOperands][kSameIds];
  SiglipKernel* siglip_gradient[kOperands][kSameIds];
  void (*siglip_scale[kFloatingElements])(const float* from, float factor, int64_t n, void* to);

  // Rows of moe_unpermute: moe_unpermute_kernel.h. No float64.
  using MoeCombine = void(
      const void* const* rows,
      const float* weights,
      int64_t count,
      const void* residual,
      int64_t D,
      void* out);
  MoeCombine* moe_combine[kFloatingElements];
  void (*moe_scale[kFloatingElements])(const void* row, float weight, int64_t D, void* out);
  float (*moe_dot[kFloatingElements])(const void* a, const void* b, int64_t D);

  // Rows of topk_gating; none in float64.
  GatingForwardKernel* topk_gating[kFloatingElements][kScoreFunctions];
  GatingBackwardKernel* topk_gating_backward[kFloatingElements][kScoreFunctions];

  // Layers of experts: expert_mlp_kernel.h. By activation, and by the element to round to.
  ActivateKernel* activate[kActivations];
  ActivateBackwardKernel* activate_backward[kActivations];
  HiddenBackwardKernel* hidden_backward[kActivations];
  void (*round_to[kFloatingElements])(float* x, int64_t n);
  void (*pair_floats)(const float* from, int64_t ld, int64_t rows, int64_t n, void* to);
  void (*add_to_rows)(float* tile, int64_t rows, int64_t columns, const float* bias);
  void (*dropout_row)(const Dropout& dropout, int32_t slot, int64_t first, float* row, int64_t n);
  void (*dropout_columns)(
      const Dropout& dropout,
      const int32_t* slots,
      int64_t first,
      float* tile,
      int64_t rows,
      int64_t columns);
};

extern const Kernels kDefault, kAvx2, kAvx512;

// Follows ATEN_CPU_CAPABILITY = default | avx2 | avx512, as torch's own kernels do.
const Kernels& kernels();

}  // namespace m2ae::cpu
