// CUDA C++ as g++ understands it, for running .cu files on the CPU (fibers.h is the machine):
//   g++ -x c++ -std=c++17 -DM2AE_EMU -Itests/emu -I$CUDA_HOME/include file.cu
// Understood: grids, blocks, static and dynamic shared memory, __syncthreads and its votes,
// __syncwarp, shuffles, votes, match, maximum of a warp, atomics, __ldg, the usual intrinsics, bf16
// and fp16. Not: inline PTX, CUB, cooperative groups, clusters, textures. Memory is sequentially
// consistent, so a missing fence is not found.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fibers.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

#define M2AE_LAUNCH(kernel, grid, block, smem, stream, ...) \
  emu::launch(dim3(grid), dim3(block), smem, [&] { M2AE_UNPAREN kernel(__VA_ARGS__); })
#define M2AE_DYNAMIC_SHARED(T, name) \
  T* name = reinterpret_cast<T*>(    \
      (reinterpret_cast<uintptr_t>(emu::block->dynamic_shared.data()) + 15) & ~uintptr_t(15))

#define threadIdx (emu::block->current->index)
#define blockIdx (emu::block->index)
#define blockDim (emu::block->size)
#define gridDim (emu::block->grid)
#define warpSize 32

// ---- barriers and warp operations

inline void __syncthreads() {
  emu::barrier(false);
}
inline int __syncthreads_or(int vote) {
  return emu::barrier(vote != 0).any;
}
inline int __syncthreads_and(int vote) {
  return emu::barrier(vote != 0).all;
}
inline int __syncthreads_count(int vote) {
  return emu::barrier(vote != 0).count;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emu::meet(mask, 0, "__syncwarp");
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace emu {

template <typename T>
T value_of(const Round& round, int lane) {
  T value;
  std::memcpy(&value, &round.values[lane], sizeof value);
  return value;
}

// `from` outside of the caller's segment of `width` lanes means the caller's own value.
template <typename T>
T shuffle(unsigned mask, T value, int from, int width, const char* operation) {
  const int lane = block->current->lane, base = lane & ~(width - 1);
  const Round& round = meet(mask, value, operation);
  return value_of<T>(round, from < base || from >= base + width ? lane : from);
}

template <typename Test>
unsigned lanes_where(const Round& round, const Test& test) {
  unsigned lanes = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    if (round.lanes >> lane & 1) lanes |= unsigned(test(lane)) << lane;
  return lanes;
}

inline unsigned voters(const Round& round) {
  return lanes_where(round, [&](int lane) { return value_of<bool>(round, lane); });
}

}  // namespace emu

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return emu::shuffle(mask, value, emu::block->current->lane ^ bits, width, "__shfl_xor_sync");
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return emu::shuffle(mask, value, emu::block->current->lane + int(by), width, "__shfl_down_sync");
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return emu::shuffle(mask, value, emu::block->current->lane - int(by), width, "__shfl_up_sync");
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int base = emu::block->current->lane & ~(width - 1);
  return emu::shuffle(mask, value, base + (from & (width - 1)), width, "__shfl_sync");
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  return emu::voters(emu::meet(mask, vote != 0, "__ballot_sync"));
}
inline int __any_sync(unsigned mask, int vote) {
  return emu::voters(emu::meet(mask, vote != 0, "__any_sync")) != 0;
}
inline int __all_sync(unsigned mask, int vote) {
  const emu::Round& round = emu::meet(mask, vote != 0, "__all_sync");
  return emu::voters(round) == round.lanes;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  const emu::Round& round = emu::meet(mask, value, "__match_any_sync");
  return emu::lanes_where(round, [&](int lane) { return emu::value_of<T>(round, lane) == value; });
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  const emu::Round& round = emu::meet(mask, value, "__reduce_max_sync");
  unsigned largest = value;
  for (int lane = 0; lane < emu::kLanes; ++lane) {
    if (!(round.lanes >> lane & 1)) continue;
    const unsigned other = emu::value_of<unsigned>(round, lane);
    if (other > largest) largest = other;
  }
  return largest;
}

// ---- atomics: one OS thread runs the whole grid, so plain read-modify-write is atomic

template <typename T, typename U>
T atomicAdd(T* at, U value) {
  return std::exchange(*at, T(*at + T(value)));
}
template <typename T, typename U>
T atomicMax(T* at, U value) {
  return std::exchange(*at, *at < T(value) ? T(value) : *at);
}
template <typename T, typename U>
T atomicMin(T* at, U value) {
  return std::exchange(*at, T(value) < *at ? T(value) : *at);
}
template <typename T, typename U>
T atomicExch(T* at, U value) {
  return std::exchange(*at, T(value));
}
template <typename T, typename U, typename V>
T atomicCAS(T* at, U expected, V value) {
  return std::exchange(*at, *at == T(expected) ? T(value) : *at);
}

// ---- intrinsics

template <typename T>
T __ldg(const T* at) {
  return *at;
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float __fdividef(float x, float y) {
  return x / y;
}
inline float rsqrtf(float x) {
  return 1.f / std::sqrt(x);
}
inline float __fmaf_rn(float x, float y, float z) {
  return std::fma(x, y, z);
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(unsigned(x));
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

using std::fma;
