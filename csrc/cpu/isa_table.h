// Kernels{name, ...} for the instruction set that isa_<name>.cpp is being compiled for.
#pragma once

#include "contrastive_rows_kernel.h"
#include "ema_update_kernel.h"
#include "expert_mlp_kernel.h"
#include "info_nce_loss_backward_kernel.h"
#include "info_nce_loss_kernel.h"
#include "moe_unpermute_kernel.h"
#include "siglip_loss_kernel.h"
#include "topk_gating_backward_kernel.h"
#include "topk_gating_kernel.h"

#define M2AE_BY_SOURCE(kernel, target_t)           \
  {&kernel<target_t, float>,                       \
   &kernel<target_t, double>,                      \
   &kernel<target_t, torch::headeronly::BFloat16>, \
   &kernel<target_t, torch::headeronly::Half>}

// In the order of csrc/element.h.
#define M2AE_BY_TARGET_AND_SOURCE(kernel)               \
  {M2AE_BY_SOURCE(kernel, float),                       \
   M2AE_BY_SOURCE(kernel, double),                      \
   M2AE_BY_SOURCE(kernel, torch::headeronly::BFloat16), \
   M2AE_BY_SOURCE(kernel, torch::headeronly::Half)}

#define M2AE_BY_ELEMENT(kernel) \
  {&kernel<float>, nullptr, &kernel<torch::headeronly::BFloat16>, &kernel<torch::headeronly::Half>}

// As above, with float64.
#define M2AE_BY_FLOATING_ELEMENT(kernel) \
  {&kernel<float>,                       \
   &kernel<double>,                      \
   &kernel<torch::headeronly::BFloat16>, \
   &kernel<torch::headeronly::Half>}

// In the order of Operand.
#define M2AE_BY_OPERAND(kernel) {&kernel<float>, &kernel<torch::headeronly::BFloat16>}

#define M2AE_OPERANDS_OF(kernel, element_t) \
  {&kernel<element_t, float>, &kernel<element_t, torch::headeronly::BFloat16>}

#define M2AE_BY_ELEMENT_AND_OPERAND(kernel)               \
  {M2AE_OPERANDS_OF(kernel, float),                       \
   {nullptr, nullptr},                                    \
   M2AE_OPERANDS_OF(kernel, torch::headeronly::BFloat16), \
   M2AE_OPERANDS_OF(kernel, torch::headeronly::Half)}

#define M2AE_SAME_IDS_OF(kernel, operand) \
  {&kernel<operand, 0>, &kernel<operand, 1>, &kernel<operand, 2>}

#define M2AE_BY_OPERAND_AND_SAME_ID(kernel) \
  {M2AE_SAME_IDS_OF(kernel, Operand::kFloat32), M2AE_SAME_IDS_OF(kernel, Operand::kBFloat16)}

#define M2AE_SCORES_OF(kernel, element_t) \
  {&kernel<element_t, kSoftmax>, &kernel<element_t, kSigmoid>, &kernel<element_t, kSqrtSoftplus>}

#define M2AE_BY_ELEMENT_AND_SCORE(kernel)               \
  {M2AE_SCORES_OF(kernel, float),                       \
   {nullptr, nullptr, nullptr},                         \
   M2AE_SCORES_OF(kernel, torch::headeronly::BFloat16), \
   M2AE_SCORES_OF(kernel, torch::headeronly::Half)}

// In the order of expert_mlp_tile.h: gated ones last, by the activation of their gate.
#define M2AE_BY_ACTIVATION(kernel)        \
  {&kernel<Activation::kIdentity, false>, \
   &kernel<Activation::kGelu, false>,     \
   &kernel<Activation::kGeluTanh, false>, \
   &kernel<Activation::kRelu, false>,     \
   &kernel<Activation::kRelu2, false>,    \
   &kernel<Activation::kSilu, false>,     \
   &kernel<Activation::kSilu, true>,      \
   &kernel<Activation::kGelu, true>,      \
   &kernel<Activation::kRelu, true>}

#define M2AE_KERNELS(name)                                  \
  {name,                                                    \
   M2AE_BY_TARGET_AND_SOURCE(ema_update_kernel),            \
   M2AE_BY_TARGET_AND_SOURCE(cast_kernel),                  \
   M2AE_BY_ELEMENT(square_norm_kernel),                     \
   M2AE_BY_ELEMENT_AND_OPERAND(pack_row_kernel),            \
   M2AE_BY_ELEMENT_AND_OPERAND(write_gradient_kernel),      \
   M2AE_BY_OPERAND(dot_rows_kernel),                        \
   M2AE_BY_OPERAND(dot_gradient_kernel),                    \
   M2AE_BY_OPERAND(add_row_kernel),                         \
   &transpose_kernel<uint32_t>,                             \
   &transpose_kernel<uint16_t>,                             \
   &pair_rows_kernel,                                       \
   &add_kernel,                                             \
   M2AE_BY_OPERAND_AND_SAME_ID(nce_sums_kernel),            \
   M2AE_BY_OPERAND_AND_SAME_ID(nce_robust_sums_kernel),     \
   M2AE_BY_OPERAND_AND_SAME_ID(nce_ranks_kernel),           \
   M2AE_BY_OPERAND_AND_SAME_ID(nce_gradient_kernel),        \
   M2AE_BY_OPERAND_AND_SAME_ID(nce_robust_gradient_kernel), \
   M2AE_BY_OPERAND_AND_SAME_ID(siglip_loss_kernel),         \
   M2AE_BY_OPERAND_AND_SAME_ID(siglip_gradient_kernel),     \
   M2AE_BY_FLOATING_ELEMENT(siglip_scale_kernel),           \
   M2AE_BY_ELEMENT(moe_combine_kernel),                     \
   M2AE_BY_ELEMENT(moe_scale_kernel),                       \
   M2AE_BY_ELEMENT(moe_dot_kernel),                         \
   M2AE_BY_ELEMENT_AND_SCORE(topk_gating_kernel),           \
   M2AE_BY_ELEMENT_AND_SCORE(topk_gating_backward_kernel),  \
   M2AE_BY_ACTIVATION(activate_kernel),                     \
   M2AE_BY_ACTIVATION(activate_backward_kernel),            \
   M2AE_BY_ACTIVATION(hidden_backward_kernel),              \
   M2AE_BY_FLOATING_ELEMENT(round_to_kernel),               \
   &pair_floats_kernel,                                     \
   &add_to_rows_kernel,                                     \
   &dropout_row_kernel,                                     \
   &dropout_columns_kernel}
