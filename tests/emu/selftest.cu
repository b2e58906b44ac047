// Kernels with and without a fault, for tests/test_emulator.py: a fault must be seen.
#include <cuda_runtime_api.h>

#define M2AE_UNPAREN(...) __VA_ARGS__
#ifdef M2AE_EMU
#include "cuda_emu.h"
#endif

namespace {

constexpr int kThreads = 96;

// sums[b] = sum of x over the block; without the barrier, thread 0 may add up what is not written.
template <bool kWithBarrier>
__global__ void block_sum(const float* x /* [blocks * kThreads] */, float* sums /* [blocks] */) {
  __shared__ float parts[kThreads];
  parts[threadIdx.x] = x[blockIdx.x * kThreads + threadIdx.x];
  if (kWithBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < kThreads; ++i) sum += parts[i];
    sums[blockIdx.x] = sum;
  }
  if (kWithBarrier) __syncthreads();
}

// As block_sum, by shuffles: the lanes of a warp, then the sums of the warps.
__global__ void shuffle_sum(const float* x, float* sums) {
  __shared__ float parts[kThreads / 32];
  float value = x[blockIdx.x * kThreads + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) sums[blockIdx.x] = parts[0] + parts[1] + parts[2];
}

// Half of a warp waits for a shuffle of the whole warp, the other half for the block.
__global__ void diverging(float* sums) {
  if (threadIdx.x % 2 == 0)
    sums[blockIdx.x] = __shfl_xor_sync(0xffffffffu, 1.f, 2);
  else
    __syncthreads();
}

// sums[i] = how many lanes of i's warp voted; each ends as soon as it knows.
__global__ void count_votes(float* sums) {
  const unsigned votes = __ballot_sync(0xffffffffu, 1) & __match_any_sync(0xffffffffu, 7);
  sums[threadIdx.x] = float(__popc(votes));
}

// sums[i] = the largest number of i's warp, whose lanes end at once.
__global__ void largest(float* sums) {
  const unsigned mine = (threadIdx.x * 7919u) % 97u;
  sums[threadIdx.x] = float(__reduce_max_sync(0xffffffffu, mine));
}

// sums[0] = how many bytes of fresh dynamic shared memory are zero.
__global__ void count_zeros(float* sums) {
  M2AE_DYNAMIC_SHARED(unsigned char, bytes);
  int zeros = 0;
  for (int i = 0; i < 64; ++i) zeros += bytes[i] == 0;
  sums[0] = float(zeros);
}

}  // namespace

#define M2AE_VISIBLE __attribute__((visibility("default")))

extern "C" M2AE_VISIBLE void selftest(int which, const float* x, float* sums, int blocks) {
  if (which == 0) M2AE_LAUNCH((block_sum<true>), blocks, kThreads, 0, nullptr, x, sums);
  if (which == 1) M2AE_LAUNCH((block_sum<false>), blocks, kThreads, 0, nullptr, x, sums);
  if (which == 2) M2AE_LAUNCH((shuffle_sum), blocks, kThreads, 0, nullptr, x, sums);
  if (which == 3) M2AE_LAUNCH((diverging), blocks, kThreads, 0, nullptr, sums);
  if (which == 4) M2AE_LAUNCH((count_zeros), 1, 1, 64, nullptr, sums);
  if (which == 6) M2AE_LAUNCH((count_votes), 1, kThreads, 0, nullptr, sums);
  if (which == 7) M2AE_LAUNCH((largest), 1, kThreads, 0, nullptr, sums);
  if (which == 5) M2AE_LAUNCH((shuffle_sum), blocks, 2048, 0, nullptr, x, sums);
}

extern "C" M2AE_VISIBLE const char* selftest_error() {
  static std::string reported;
  reported = std::exchange(emu::last_error(), std::string());
  return reported.c_str();
}
