// What the kernels of moe_permute and moe_unpermute share: vectors of 16 bytes, how threads share
// rows, and rows that belong to no slot.
#pragma once

#include "device.cuh"
#include "moe_rows.h"

namespace m2ae::cuda {

constexpr int kRowThreads = 256;
constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMaxBlocks = int64_t(1) << 20;  // more rows are taken in turns

template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) RowVector {
  T at[kWidth];
};

// The sorted row of a slot, or -1; what is out of range counts as -1.
__device__ __forceinline__ int32_t sorted_row(const MoeRows& routing, int64_t slot) {
  const int32_t i = routing.inverse[slot];
  return i < routing.N ? i : -1;
}

// Zeros for the rows that no slot has; each warp looks at 32 of them at a time.
template <typename vector_t>
__device__ void zero_empty_rows(const MoeRows& routing, vector_t* rows, int64_t vectors) {
  const int64_t thread =
      (int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int64_t warps = int64_t(gridDim.x) * kRowThreads / kLanes;
  const int lane = int(thread % kLanes);
  for (int64_t first = thread / kLanes * kLanes; first < routing.N; first += warps * kLanes) {
    const int64_t i = first + lane;
    unsigned empty = __ballot_sync(kAllLanes, i < routing.N && routing.sorted[i] < 0);
    for (; empty != 0; empty &= empty - 1) {
      vector_t* const row = rows + (first + __ffs(int(empty)) - 1) * vectors;
      for (int64_t v = lane; v < vectors; v += kLanes) row[v] = vector_t{};
    }
  }
}

// A block of kRowThreads threads: x along a row of `vectors`, as far as whole warps go, y over
// rows.
inline dim3 block_of_rows(int64_t vectors) {
  int along = kLanes;
  while (along < vectors && along < kRowThreads) along *= 2;
  return dim3(unsigned(along), unsigned(kRowThreads / along));
}

inline int blocks_of_rows(int64_t rows, int64_t rows_per_block) {
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  return int(blocks < 1 ? 1 : blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

inline bool aligned_16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace m2ae::cuda
