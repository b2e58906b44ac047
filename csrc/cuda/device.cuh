// What every .cu starts with: launch macro, conversions. No torch header, so nvcc needs seconds,
// and tests/emu/cuda_emu.h can stand in for the device.
#pragma once

#ifdef M2AE_EMU
#include "cuda_emu.h"
#else
#include <cuda_runtime.h>
#define M2AE_LAUNCH(kernel, grid, block, smem, stream, ...) \
  M2AE_UNPAREN kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
#define M2AE_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char m2ae_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(m2ae_dynamic_shared)
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#define M2AE_UNPAREN(...) __VA_ARGS__

namespace m2ae::cuda {

// convert<to_t>(x), rounding to nearest even; torch compiles .cu files without the implicit
// conversions of half and bfloat16. Double goes through float to 16 bits, as tensor.to() does.
template <typename to_t, typename from_t>
__device__ __forceinline__ to_t convert(from_t x) {
  if constexpr (std::is_same_v<to_t, from_t>) {
    return x;
  } else if constexpr (std::is_same_v<from_t, __nv_bfloat16>) {
    return convert<to_t>(__bfloat162float(x));
  } else if constexpr (std::is_same_v<from_t, __half>) {
    return convert<to_t>(__half2float(x));
  } else if constexpr (std::is_same_v<to_t, __nv_bfloat16>) {
    return __float2bfloat16(float(x));
  } else if constexpr (std::is_same_v<to_t, __half>) {
    return __float2half(float(x));
  } else {
    return to_t(x);
  }
}

}  // namespace m2ae::cuda
