// topk_gating on CUDA, forward. Contract and math: m2ae_kernels/ops/topk_gating.py
//
// Two launches. Up to kGatingThreadExperts experts a thread has a row, above a warp has. Both read
// the logits once, keep them in registers, and find the distribution, then the k best by keys that
// order as the logits do. Sums over rows are the block's, by warp, in order, and become those of
// all by the second launch; only integers are added atomically, in shared memory.
#include "topk_gating_choose.cuh"
#include "topk_gating_sums.cuh"

namespace m2ae::cuda {
namespace {

constexpr int64_t kMaxWarps = 4224;  // 32 for each of 132 multiprocessors
// As many registers as a row takes. 32 experts of a lane fill shared memory before registers.
constexpr int kRegisters = 65536;  // of a multiprocessor
template <bool kWarp, int kN>
constexpr int kRegistersOf = kN < 32 ? 64
                             : kWarp ? 96
                                     : 80;
template <bool kWarp, int kN>
constexpr int kMinBlocksOf = kRegisters / kRegistersOf<kWarp, kN> / kThreadsOf<kWarp, kN>;

template <bool kWarp, int kN>
__global__ void __launch_bounds__(kThreadsOf<kWarp, kN>, kMinBlocksOf<kWarp, kN>)
    topk_gating_kernel(GatingForward given) {
  constexpr int kThreads = kThreadsOf<kWarp, kN>;
  using Rows = std::conditional_t<kWarp, WarpRows<kN>, ThreadRows<kN>>;
  using Memory = WarpMemory<kWarp, kN>;
  M2AE_DYNAMIC_SHARED(float, shared);
  int32_t* const counts = Memory::counts(shared, given.k);
  for (int i = threadIdx.x; i < Memory::kCounts; i += kThreads) counts[i] = 0;
  __syncthreads();
  Rows rows(given, shared);
#pragma unroll 1
  for (int64_t s = blockIdx.y; s < given.S; s += gridDim.y)
#pragma unroll 1
    for (int64_t t = int64_t(blockIdx.x) * Rows::kRows; t < given.T;
         t += int64_t(gridDim.x) * Rows::kRows)
      rows(s, t);
  rows.finish(counts);
  __syncthreads();
  const int64_t blocks = int64_t(gridDim.x) * gridDim.y;
  const int64_t block = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
  const float* const sums = shared + Memory::kWarps * Memory::kTile;
  for (int e = threadIdx.x; e < given.E; e += kThreads) {
    const int at = Rows::place(e);
    given.block_counts[e * blocks + block] = counts[at];
    if (given.probs_sum == nullptr) continue;
    float sum = 0;
    for (int w = 0; w < Memory::kWarps; ++w) sum += sums[w * Memory::kSums + at];
    given.block_probs[e * blocks + block] = sum;
  }
}

__global__ void __launch_bounds__(kSumThreads)
    topk_gating_sums_kernel(GatingForward given, int64_t blocks) {
  const int32_t count = sum_over_blocks(given.block_counts, blocks);
  if (threadIdx.x == 0) given.counts[blockIdx.x] = count;
  if (given.probs_sum == nullptr) return;
  const float sum = sum_over_blocks(given.block_probs, blocks);
  if (threadIdx.x == 0) given.probs_sum[blockIdx.x] = sum;
}

template <bool kWarp, int kN>
cudaError_t launch(GatingForward given, cudaStream_t stream) {
  constexpr int64_t kWidth = kN < 4 ? kN : 4;
  given.in_vectors =
      given.E % kWidth == 0 &&
      reinterpret_cast<uintptr_t>(given.logits) % (kWidth * bytes_of(given.element)) == 0;
  const GatingGrid grid = gating_grid(given.T, given.S, given.E);
  M2AE_LAUNCH(
      (topk_gating_kernel<kWarp, kN>),
      dim3(grid.tokens, grid.streams),
      (kThreadsOf<kWarp, kN>),
      (WarpMemory<kWarp, kN>::bytes(given.k)),
      stream,
      given);
  const unsigned experts = unsigned(given.E);
  M2AE_LAUNCH((topk_gating_sums_kernel), experts, kSumThreads, 0, stream, given, grid.blocks());
  return cudaGetLastError();
}

}  // namespace

GatingGrid gating_grid(int64_t T, int64_t S, int64_t E) {
  const bool by_thread = E <= kGatingThreadExperts;
  const int64_t threads = by_thread         ? kThreadsOf<false, kGatingThreadExperts>
                          : E <= 8 * kLanes ? kThreadsOf<true, 8>
                                            : kThreadsOf<true, 32>;
  const int64_t warps = threads / kLanes, rows = by_thread ? threads : warps;
  const int64_t most = kMaxWarps / warps, blocks = (T + rows - 1) / rows;
  const int64_t streams = S < 1 ? 1 : S < most ? S : most, of_stream = most / streams;
  return {unsigned(blocks < 1 ? 1 : blocks < of_stream ? blocks : of_stream), unsigned(streams)};
}

cudaError_t topk_gating_launch(GatingForward given, cudaStream_t stream) {
  const int E = given.E;
  if (E <= 4) return launch<false, 4>(given, stream);
  if (E <= 8) return launch<false, 8>(given, stream);
  if (E <= 12) return launch<false, 12>(given, stream);
  if (E <= 16) return launch<false, 16>(given, stream);
  if (E <= 24) return launch<false, 24>(given, stream);
  if (E <= 32) return launch<false, 32>(given, stream);
  if (E <= 64) return launch<true, 2>(given, stream);
  if (E <= 128) return launch<true, 4>(given, stream);
  if (E <= 256) return launch<true, 8>(given, stream);
  if (E <= 512) return launch<true, 16>(given, stream);
  return launch<true, 32>(given, stream);
}

}  // namespace m2ae::cuda
