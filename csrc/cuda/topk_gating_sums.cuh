// The second half of topk_gating's sums over rows on CUDA: over blocks, in an order that depends on
// their number alone.
#pragma once

#include "device.cuh"

namespace m2ae::cuda {
namespace {

constexpr int kSumThreads = 128;

// of_blocks [n, blocks], one row of which is a block's: its sum, for the first thread. Each thread
// adds up every kSumThreads-th, then pairs of lanes do, then the first thread.
template <typename T>
__device__ T sum_over_blocks(const T* of_blocks, int64_t blocks) {
  __shared__ T sums[kSumThreads / 32];
  T sum = 0;
#pragma unroll 4
  for (int64_t b = threadIdx.x; b < blocks; b += kSumThreads)
    sum += of_blocks[blockIdx.x * blocks + b];
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = sums[0];
  for (int w = 1; w < kSumThreads / 32; ++w) sum += sums[w];
  return sum;
}

}  // namespace
}  // namespace m2ae::cuda
