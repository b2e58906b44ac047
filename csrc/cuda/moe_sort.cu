// moe_sort on CUDA: a stable counting sort. Contract: m2ae_kernels/ops/moe_sort.py
//
// Three launches. A block owns kMoeSortChunk slots, a warp of it a run of them, a lane one at a
// time. count_kernel counts the experts of each block; scan_kernel, a warp per expert, turns the
// counts into what precedes each block; place_kernel counts again, by warp, and writes each slot to
// its place: the rows of experts before, of blocks before, of warps before, and of lanes before,
// which lanes with the same expert find by a vote. Nothing is atomic, all is integer, so that the
// order is the stable one.
#include "moe_sort.h"

#include "device.cuh"

namespace m2ae::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int kWarps = kThreads / kLanes;
constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kRun = kMoeSortChunk / kWarps;  // slots of a warp: fit the counters' 16 bits

__device__ int64_t slot_at(MoeSortOrder order, int64_t k, int64_t i) {
  if (order.given != nullptr) return order.given[i];
  return order.rows > 0 ? i % order.rows * k + i / order.rows : i;
}

// visit(i, slot, expert, peers) for the warp's run, 32 at a time; -1 for what is no expert. `peers`
// are the lanes with the same expert.
template <typename Visit>
__device__ void each_slot(const MoeSortArguments& a, MoeSortOrder order, const Visit& visit) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t begin = blockIdx.x * kMoeSortChunk + warp * kRun;
  for (int64_t first = begin; first < begin + kRun && first < a.slots; first += kLanes) {
    const int64_t i = first + lane;
    int64_t slot = -1;
    int expert = -1;
    if (i < a.slots) {
      slot = slot_at(order, a.k, i);
      expert = a.ids[slot];
      if (expert < 0 || expert >= a.E) expert = -1;
    }
    visit(slot, expert, __match_any_sync(kAll, expert));
    __syncwarp();
  }
}

// counters[warp][expert]: how often each expert occurs in each warp's run.
__device__ void count_by_warp(const MoeSortArguments& a, MoeSortOrder order, uint16_t* counters) {
  for (int64_t c = threadIdx.x; c < kWarps * a.E; c += kThreads) counters[c] = 0;
  __syncthreads();
  uint16_t* const mine = counters + threadIdx.x / kLanes * a.E;
  each_slot(a, order, [&](int64_t, int expert, unsigned peers) {
    const bool leads = __ffs(int(peers)) - 1 == int(threadIdx.x % kLanes);
    if (leads && expert >= 0) mine[expert] = uint16_t(mine[expert] + __popc(peers));
  });
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads) count_kernel(MoeSortArguments a, MoeSortOrder order) {
  M2AE_DYNAMIC_SHARED(uint16_t, counters);  // [warps, E]
  count_by_warp(a, order, counters);
  for (int64_t e = threadIdx.x; e < a.E; e += kThreads) {
    int32_t sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += counters[w * a.E + e];
    a.counts[e * gridDim.x + blockIdx.x] = sum;
  }
}

// The sum over the lanes up to this one.
__device__ int32_t sum_of_lanes(int32_t x) {
  const int lane = threadIdx.x % kLanes;
  for (int by = 1; by < kLanes; by *= 2) {
    const int32_t before = __shfl_up_sync(kAll, x, by);
    if (lane >= by) x += before;
  }
  return x;
}

__global__ void __launch_bounds__(kThreads) scan_kernel(MoeSortArguments a, int64_t blocks) {
  const int64_t expert = blockIdx.x * kWarps + threadIdx.x / kLanes;
  if (expert >= a.E) return;  // whole warps
  const int lane = threadIdx.x % kLanes;
  int32_t* const counts = a.counts + expert * blocks;
  int32_t total = 0;
  for (int64_t first = 0; first < blocks; first += kLanes) {
    const int64_t b = first + lane;
    const int32_t count = b < blocks ? counts[b] : 0;
    const int32_t up_to = sum_of_lanes(count);
    if (b < blocks) counts[b] = total + up_to - count;
    total += __shfl_sync(kAll, up_to, kLanes - 1);
  }
  if (lane == 0) a.totals[expert] = total;
}

// first[e]: the first row of each expert, for the whole block; returns that behind the last.
__device__ int32_t first_rows(const MoeSortArguments& a, int32_t* first /* [E] */) {
  __shared__ int32_t sums[kWarps + 1];
  const int64_t each = (a.E + kThreads - 1) / kThreads;
  const int64_t begin = threadIdx.x * each;
  const auto rows_of = [&](int64_t e) {
    const int64_t kept = a.totals[e] < a.capacity ? a.totals[e] : a.capacity;
    return int32_t((kept + a.align - 1) / a.align * a.align);
  };
  int32_t own = 0;
  for (int64_t e = begin; e < begin + each && e < a.E; ++e) own += rows_of(e);
  const int32_t up_to = sum_of_lanes(own);
  const int warp = threadIdx.x / kLanes;
  if (threadIdx.x % kLanes == kLanes - 1) sums[warp + 1] = up_to;
  __syncthreads();
  if (threadIdx.x == 0) {
    sums[0] = 0;
    for (int w = 1; w <= kWarps; ++w) sums[w] += sums[w - 1];
  }
  __syncthreads();
  int32_t row = sums[warp] + up_to - own;
  for (int64_t e = begin; e < begin + each && e < a.E; ++e) {
    first[e] = row;
    row += rows_of(e);
  }
  __syncthreads();
  return sums[kWarps];
}

// Rows that no slot has: padding behind each expert's, and the tail.
__device__ void fill_gaps(const MoeSortArguments& a, const int32_t* first, int32_t end) {
  for (int64_t e = blockIdx.x; e < a.E; e += gridDim.x) {
    const int64_t kept = a.totals[e] < a.capacity ? a.totals[e] : a.capacity;
    const int64_t next = e + 1 < a.E ? first[e + 1] : end;
    for (int64_t row = first[e] + kept + threadIdx.x; row < next; row += kThreads)
      a.sorted[row] = -1;
    if (threadIdx.x == 0) {
      a.kept[e] = int32_t(kept);
      a.offsets[e] = first[e];
      if (e == a.E - 1) a.offsets[a.E] = end;
    }
  }
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t row = end + blockIdx.x * int64_t(kThreads) + threadIdx.x; row < a.N; row += stride)
    a.sorted[row] = -1;
}

// With `kept_ids`, only who is kept is written down; else the sort.
__global__ void __launch_bounds__(kThreads)
    place_kernel(MoeSortArguments a, MoeSortOrder order, int32_t* kept_ids) {
  M2AE_DYNAMIC_SHARED(int32_t, first);  // [E], the first row of each expert
  int32_t* const before = first + a.E;  // [E], slots of each expert in blocks before
  auto* const counters = reinterpret_cast<uint16_t*>(before + a.E);  // [warps, E], in warps before
  if (kept_ids == nullptr) {
    const int32_t end = first_rows(a, first);
    fill_gaps(a, first, end);
  }
  count_by_warp(a, order, counters);
  for (int64_t e = threadIdx.x; e < a.E; e += kThreads) {
    before[e] = a.counts[e * gridDim.x + blockIdx.x];
    uint16_t sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      const uint16_t count = counters[w * a.E + e];
      counters[w * a.E + e] = sum;
      sum = uint16_t(sum + count);
    }
  }
  __syncthreads();
  uint16_t* const mine = counters + threadIdx.x / kLanes * a.E;
  each_slot(a, order, [&](int64_t slot, int expert, unsigned peers) {
    const int lane = int(threadIdx.x % kLanes);
    int64_t place = a.capacity;
    if (expert >= 0)
      place = int64_t(before[expert]) + mine[expert] + __popc(peers & ((1u << lane) - 1));
    __syncwarp();
    if (expert >= 0 && __ffs(int(peers)) - 1 == lane)
      mine[expert] = uint16_t(mine[expert] + __popc(peers));
    if (slot < 0) return;
    const bool keeps = expert >= 0 && place < a.capacity;
    if (kept_ids != nullptr) {
      kept_ids[slot] = keeps ? expert : -1;
      return;
    }
    a.inverse[slot] = keeps ? int32_t(first[expert] + place) : -1;
    if (keeps) a.sorted[first[expert] + place] = int32_t(slot);
  });
}

cudaError_t launch(
    const MoeSortArguments& a, MoeSortOrder order, int32_t* kept_ids, cudaStream_t stream) {
  const int blocks = int(moe_sort_blocks(a.slots));
  const size_t counters = size_t(kWarps * a.E) * sizeof(uint16_t);
  M2AE_LAUNCH((count_kernel), blocks, kThreads, counters, stream, a, order);
  const int experts = int((a.E + kWarps - 1) / kWarps);
  M2AE_LAUNCH((scan_kernel), experts, kThreads, 0, stream, a, blocks);
  const size_t all = counters + 2 * size_t(a.E) * sizeof(int32_t);
  M2AE_LAUNCH((place_kernel), blocks, kThreads, all, stream, a, order, kept_ids);
  return cudaGetLastError();
}

}  // namespace

cudaError_t moe_sort_drop_launch(
    const MoeSortArguments& arguments, MoeSortOrder order, int32_t* kept_ids, cudaStream_t stream) {
  return launch(arguments, order, kept_ids, stream);
}

cudaError_t moe_sort_launch(const MoeSortArguments& arguments, cudaStream_t stream) {
  return launch(arguments, {nullptr, 0}, nullptr, stream);
}

}  // namespace m2ae::cuda
