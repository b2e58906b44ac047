// topk_gating on CUDA, backward. Contract and math: m2ae_kernels/ops/topk_gating.py
//
// Rows are a thread's or a warp's, as in forward; the distribution is made again from the logits.
// The gradients of the chosen go to the row's column of a tile, the others' are added to them in
// registers. Where there are several streams, their gradients of one logit meet in one thread, in
// order; that of the shift, which a block adds up by stream, is a launch of its own, and the sum
// over blocks another. Nothing is atomic.
#include "topk_gating_row.cuh"
#include "topk_gating_sums.cuh"

namespace m2ae::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kLanes;
// As many registers as a row takes. Many experts of a lane fill shared memory before registers.
constexpr int kRegisters = 65536;  // of a multiprocessor
template <bool kWarp, int kN>
constexpr int kMinBlocksOf = kRegisters / (kN < (kWarp ? 16 : 32) ? 64 : 96) / kThreads;

template <bool kWarp, int kN>
class GradientRows {
 public:
  using Row = GatingRow<kWarp, kN>;
  static constexpr int kRows = kWarp ? kWarps : kThreads;  // of a block
  static constexpr int kTile = kN * kLanes;                // of a warp

  __device__ GradientRows(const GatingBackward& backward, float* shared)
      : given(backward),
        lane(int(threadIdx.x) % kLanes),
        tile_(shared + int(threadIdx.x) / kLanes * kTile),
        chosen_(tile_ + kWarps * kTile),
        sums_(tile_ + 2 * kWarps * kTile + lane) {}

  // Rows [first, first + kRows) of streams [begin, end). Of one stream, gradients go to the logits
  // if no other stream has them, and to the sums of the shift; of all, to the logits.
  __device__ __forceinline__ void operator()(
      int64_t begin, int64_t end, int64_t first, bool by_stream) {
    Row row(given, tile_);
    row.t = first + (kWarp ? int(threadIdx.x) / kLanes : int(threadIdx.x));
    if (kWarp && row.t >= given.T) return;  // whole warps
#pragma unroll 1
    for (int64_t s = begin; s < end; ++s) {
      find_gradient(row, s, row.t);
      if (by_stream) continue;
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        if (s > 0) row.z[i] += sums_[i * kLanes];
        sums_[i * kLanes] = row.z[i];
      }
    }
    if (begin == end) {
#pragma unroll
      for (int i = 0; i < kN; ++i) row.z[i] = 0;
    }
    if (given.grad_logits != nullptr && (!by_stream || given.S == 1)) write(row);
    if (by_stream && given.grad_shift != nullptr) add_to_sums(row);
  }

  __device__ void clear_sums() {
#pragma unroll
    for (int i = 0; i < kN; ++i) sums_[i * kLanes] = 0;
  }

  // The block's sums of stream s to memory.
  __device__ void write_sums(const float* shared, int64_t s) const {
    __syncthreads();
    for (int e = threadIdx.x; e < given.E; e += kThreads) {
      const float* const of_warp =
          shared + 2 * kWarps * kTile + (kWarp ? e % kN * kLanes + e / kN : e);
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += of_warp[w * kTile];
      given.block_shifts[(s * given.E + e) * gridDim.x + blockIdx.x] = sum;
    }
    __syncthreads();
  }

 private:
  __device__ __forceinline__ void add_to_sums(const Row& row) {
    if constexpr (kWarp) {
#pragma unroll
      for (int i = 0; i < kN; ++i) sums_[i * kLanes] += row.z[i];
    } else {
      // Lane e adds up expert e of the warp's rows.
#pragma unroll
      for (int i = 0; i < kN; ++i) row.column[i * kLanes] = row.z[i];
      __syncwarp();
      float sum = 0;
      if (lane < given.E) {
#pragma unroll 4
        for (int i = 0; i < kLanes; ++i)  // in an order that spreads the lanes over the banks
          sum += tile_[lane * kLanes + (lane + i) % kLanes];
      }
      sums_[0] += sum;
      __syncwarp();
    }
  }

  // Where expert e of the row is in a tile.
  __device__ int place(int e) const { return kWarp ? e % kN * kLanes + e / kN : e * kLanes + lane; }

  __device__ __forceinline__ void write(const Row& row) const {
    if (row.t >= given.T || row.n <= 0) return;
    const int64_t at = row.t * given.E + row.first;
    void* const to = given.grad_logits;
    if (given.element == Element::kFloat32)
      store(row.z, row.n, given.in_vectors, static_cast<float*>(to) + at);
    else if (given.element == Element::kBFloat16)
      store(row.z, row.n, given.in_vectors, static_cast<__nv_bfloat16*>(to) + at);
    else
      store(row.z, row.n, given.in_vectors, static_cast<__half*>(to) + at);
  }

  // row.z <- the gradient of the logits of row (s, t)
  __device__ __forceinline__ void find_gradient(Row& row, int64_t s, int64_t t) {
    row.read(s, t);
    const bool in_softmax = given.score == kSoftmax && !given.norm_topk_prob;
    const bool has_weights = given.grad_weights != nullptr;
    const bool has_lse = given.score == kSoftmax && given.grad_logsumexp != nullptr;
    const bool has_entropy = given.grad_entropy != nullptr;
    const bool of_all =
        given.grad_probs_sum != nullptr || has_entropy || has_lse || (in_softmax && has_weights);
    if (of_all) row.find_distribution(false, has_entropy, given.grad_probs_sum);
    float* const chosen = chosen_ + lane;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      row.column[i * kLanes] = row.z[i];
      chosen[i * kLanes] = 0;
    }
    if (kWarp) __syncwarp();
    const bool is_there = t < given.T;
    const int64_t r = row.row();
    // p (dP - dot + dlse - dH (log p + H)), with log p + H = a - top + sum of p (top - a)
    float common = 0, dH = 0;
    if (has_weights && row.present) common = -find_chosen(row, in_softmax);
    if (kWarp) __syncwarp();
    const float inverse = of_all ? 1.f / row.total : 0.f;
    if (given.grad_probs_sum != nullptr) common -= row.dot * inverse;
    if (has_lse && is_there) common += given.grad_logsumexp[r];
    if (has_entropy && is_there) {
      dH = given.grad_entropy[r];
      common += dH * row.weighed * inverse;
    }
    if (row.is_plain && !row.is_infinite && row.present) {
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        const float d = row.column[i * kLanes] - row.top;
        row.z[i] = chosen[i * kLanes] + dense(row, i, d, common, dH, inverse, of_all);
      }
      return;
    }
    find_special(row, chosen, common, dH, inverse, of_all);
  }

  __device__ __forceinline__ float dense(
      const Row& row, int i, float d, float common, float dH, float inverse, bool of_all) const {
    if (!of_all) return 0;
    float x = common;
    if (given.grad_probs_sum != nullptr && i < row.n) x += given.grad_probs_sum[row.first + i];
    x -= dH * fmaxf(d, kLowestExponent);
    return exp_of(d) * inverse * x;
  }

  // The same for other scores and for rows without a gradient; not unrolled, as it is long.
  __device__ __forceinline__ void find_special(
      Row& row, float* chosen, float common, float dH, float inverse, bool of_all) {
    const bool is_nan = row.has_nan && !given.zero_nan;
#pragma unroll 1
    for (int i = 0; i < row.n; ++i) {
      const float z = row.column[i * kLanes], d = row.relative_score_of(z) - row.top;
      float x = chosen[i * kLanes] + dense(row, i, d, common, dH, inverse, of_all);
      x *= slope_of(z == z ? z : 0.f, given.score);
      if (row.is_infinite) x = 0;
      if (is_nan) x = not_a_number();
      chosen[i * kLanes] = row.present ? x : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kN; ++i) row.z[i] = chosen[i * kLanes];
  }

  // visit(logit, gradient of the weight, where that of the log-score goes) for the chosen of a row:
  // by one thread, or by the lanes of a warp.
  template <typename Visit>
  __device__ __forceinline__ void each_chosen(const Row& row, const Visit& visit) const {
    const int64_t slots = row.row() * given.k;
#pragma unroll 1
    for (int j = kWarp ? lane : 0; j < given.k; j += kWarp ? kLanes : 1) {
      const int id = given.ids[slots + j];
      if (id < 0 || id >= given.E) continue;
      const float dw = given.grad_weights[slots + j] * given.routed_scaling_factor;
      visit(tile_[place(id)], dw, chosen_[place(id)]);
    }
  }

  // The gradients by the log-scores of the chosen; returns the sum of them that p spreads.
  __device__ float find_chosen(const Row& row, bool in_softmax) {
    if (!given.norm_topk_prob) {
      const float inverse = 1.f / row.total;
      float sum = 0;
      each_chosen(row, [&](float z, float dw, float& gradient) {
        const float x = in_softmax ? exp_of(row.relative_score_of(z) - row.top) * inverse * dw
                                   : exp_of(row.log_score_of(z)) * dw;
        sum += x;
        gradient = x;
      });
      if (!in_softmax) return 0;
      return kWarp ? sum_of_lanes(sum) : sum;
    }
    float base = -infinity();
    each_chosen(row, [&](float z, float, float&) { base = fmaxf(base, row.relative_score_of(z)); });
    if (kWarp)
      for (int bits = kLanes / 2; bits > 0; bits /= 2)
        base = fmaxf(base, __shfl_xor_sync(kAll, base, bits));
    if (base == -infinity()) base = 0;
    float sum = 0, dot = 0;
    each_chosen(row, [&](float z, float dw, float& gradient) {
      const float x = exp_of(row.relative_score_of(z) - base);
      sum += x;
      dot += x * dw;
      gradient = x;
    });
    if (kWarp) {
      sum = sum_of_lanes(sum);
      dot = sum_of_lanes(dot);
    }
    const float inverse = 1.f / (sum == 0 ? 1.f : sum);
    each_chosen(
        row, [&](float, float dw, float& gradient) { gradient *= inverse * (dw - dot * inverse); });
    return 0;
  }

  const GatingBackward& given;
  const int lane;
  float *const tile_, *const chosen_;  // of the warp
  float* const sums_;                  // of the lane
};

// With `by_stream`, a block has rows of streams blockIdx.y, blockIdx.y + gridDim.y, ..., one after
// the other; else rows of all streams.
template <bool kWarp, int kN>
__global__ void __launch_bounds__(kThreads, kMinBlocksOf<kWarp, kN>)
    topk_gating_backward_kernel(GatingBackward given, bool by_stream) {
  using Rows = GradientRows<kWarp, kN>;
  M2AE_DYNAMIC_SHARED(float, shared);
  Rows rows(given, shared);
  const int64_t begin = int64_t(blockIdx.x) * Rows::kRows;
  const int64_t step = int64_t(gridDim.x) * Rows::kRows;
  const int64_t end = by_stream ? given.S : 1;
#pragma unroll 1
  for (int64_t s = by_stream ? blockIdx.y : 0; s < end; s += gridDim.y) {
    const bool has_sums = by_stream && given.grad_shift != nullptr;
    if (has_sums) rows.clear_sums();
#pragma unroll 1
    for (int64_t t = begin; t < given.T; t += step)
      rows(s, by_stream ? s + 1 : given.S, t, by_stream);
    if (has_sums) rows.write_sums(shared, s);
  }
}

__global__ void __launch_bounds__(kSumThreads)
    topk_gating_shift_kernel(GatingBackward given, int64_t blocks) {
  const float sum = sum_over_blocks(given.block_shifts, blocks);
  if (threadIdx.x != 0) return;
  const int64_t i = blockIdx.x;
  if (given.shift_element == Element::kFloat32)
    static_cast<float*>(given.grad_shift)[i] = sum;
  else if (given.shift_element == Element::kBFloat16)
    static_cast<__nv_bfloat16*>(given.grad_shift)[i] = convert<__nv_bfloat16>(sum);
  else
    static_cast<__half*>(given.grad_shift)[i] = convert<__half>(sum);
}

template <bool kWarp, int kN>
cudaError_t launch(GatingBackward given, cudaStream_t stream) {
  constexpr int64_t kWidth = kN < 4 ? kN : 4;
  const int64_t bytes = kWidth * bytes_of(given.element);
  given.in_vectors = given.E % kWidth == 0 &&
                     reinterpret_cast<uintptr_t>(given.logits) % bytes == 0 &&
                     reinterpret_cast<uintptr_t>(given.grad_logits) % bytes == 0;
  const GatingGrid grid = gating_grid(given.T, given.S, given.E);
  const size_t shared = 3 * kWarps * GradientRows<kWarp, kN>::kTile * sizeof(float);
  const auto run = [&](unsigned streams, bool by_stream) {
    M2AE_LAUNCH(
        (topk_gating_backward_kernel<kWarp, kN>),
        dim3(grid.tokens, streams),
        kThreads,
        shared,
        stream,
        given,
        by_stream);
  };
  if (given.S != 1 && given.grad_logits != nullptr) run(1, false);
  if (given.S == 1 || (given.grad_shift != nullptr && given.S > 0)) run(grid.streams, true);
  if (given.grad_shift != nullptr && given.S > 0) {
    const unsigned numbers = unsigned(given.S * given.E);
    M2AE_LAUNCH((topk_gating_shift_kernel), numbers, kSumThreads, 0, stream, given, grid.tokens);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t topk_gating_backward_launch(GatingBackward given, cudaStream_t stream) {
  const int E = given.E;
  if (E <= 8) return launch<false, 8>(given, stream);
  if (E <= 12) return launch<false, 12>(given, stream);
  if (E <= 16) return launch<false, 16>(given, stream);
  if (E <= 32) return launch<false, 32>(given, stream);
  if (E <= 64) return launch<true, 2>(given, stream);
  if (E <= 128) return launch<true, 4>(given, stream);
  if (E <= 256) return launch<true, 8>(given, stream);
  if (E <= 512) return launch<true, 16>(given, stream);
  return launch<true, 32>(given, stream);
}

}  // namespace m2ae::cuda
