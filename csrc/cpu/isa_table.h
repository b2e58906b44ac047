// Kernels{name, ...} for the instruction set that isa_<name>.cpp is being compiled for.
#pragma once

#include "ema_update_kernel.h"

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

#define M2AE_KERNELS(name) \
  {name, M2AE_BY_TARGET_AND_SOURCE(ema_update_kernel), M2AE_BY_TARGET_AND_SOURCE(cast_kernel)}
