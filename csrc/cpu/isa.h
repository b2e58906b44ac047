// The CPU kernels, one table per instruction set. isa_<name>.cpp compiles every *_kernel.h for its
// set and fills its table; kernels() is the best one this machine runs.
#pragma once

#include <cstdint>

#include "../element.h"

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
};

extern const Kernels kDefault, kAvx2, kAvx512;

// Follows ATEN_CPU_CAPABILITY = default | avx2 | avx512, as torch's own kernels do.
const Kernels& kernels();

}  // namespace m2ae::cpu
