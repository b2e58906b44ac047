// The CPU kernels for AVX-512 (F, BW, DQ, VL).
//
// The pragma comes after every system header, and the kernels are in an anonymous namespace: no
// inline function compiled for this set can then be linked into code that runs on every machine.
#if defined(__x86_64__)

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "isa.h"

#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")

#define M2AE_HAS_FMA
#define M2AE_VECTOR_BYTES 64
#include "isa_table.h"

namespace m2ae::cpu {

const Kernels kAvx512 = M2AE_KERNELS("avx512");

}  // namespace m2ae::cpu

#endif
