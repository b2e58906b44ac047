// The CPU kernels for the compiler's default target, and the choice between the instruction sets.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "isa.h"
#include "isa_table.h"

namespace m2ae::cpu {
namespace {

#if defined(__x86_64__)
const Kernels& choose() {
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  const auto at_most = [&](const char* name) {
    return capability != nullptr && std::strcmp(capability, name) == 0;
  };
  if (!has_avx2 || at_most("default")) return kDefault;
  return has_avx512 && !at_most("avx2") ? kAvx512 : kAvx2;
}
#else
const Kernels& choose() {
  return kDefault;
}
#endif

}  // namespace

const Kernels kDefault = M2AE_KERNELS("default");

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace m2ae::cpu
