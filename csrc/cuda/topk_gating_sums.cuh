// The second half of topk_gating's sums over rows on CUDA: over blocks, in an order that depends on
// their number alone.
#pragma once

#include "device.cuh"

namespace m2ae::cuda {
namespace {

constexpr int kSumThreads = 128;

// of_blocks [n, blocks], one number of which is a block's: its sum, for the first thread. Each
// thread adds up every kSumThreads-th, then pairs of threads do.
template <typename T>
__device__ T sum_over_blocks(const T* of_blocks, int64_t blocks) {
  __shared__ T sums[kSumThreads];
  T sum = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += kSumThreads)
    sum += of_blocks[blockIdx.x * blocks + b];
  sums[threadIdx.x] = sum;
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

}  // namespace
}  // namespace m2ae::cuda
