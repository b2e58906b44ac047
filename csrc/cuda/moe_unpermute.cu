// moe_unpermute on CUDA, and the sums of moe_permute's backward, which are the same without
// weights. Contract and math: m2ae_kernels/ops/moe_unpermute.py
//
// Forward gathers: a thread owns a few neighbouring columns of a token and adds up its slots' rows
// in order, several of which are on their way at a time. Backward: a warp owns a row of the
// gradient, and writes to the places of its slots, which no other row has; the lanes' shares of a
// dot product are added up in a fixed order.
#include "moe_rows.cuh"

namespace m2ae::cuda {
namespace {

template <typename T, int kWidth>
__device__ __forceinline__ void add(
    float (&sum)[kWidth], float weight, const RowVector<T, kWidth>& row) {
#pragma unroll
  for (int c = 0; c < kWidth; ++c) sum[c] = __fmaf_rn(weight, convert<float>(row.at[c]), sum[c]);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kRowThreads, 4) moe_combine_kernel(
    MoeRows routing,
    const RowVector<T, kWidth>* y,         // [N, vectors]
    const RowVector<T, kWidth>* residual,  // [T, vectors], or null; may be `out`
    RowVector<T, kWidth>* out,             // [T, vectors]
    int64_t vectors) {
  constexpr int kInFlight = kWidth > 4 ? 2 : 4;  // rows asked for at a time: as registers last
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  for (int64_t t = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; t < routing.T; t += step) {
    for (int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
      float sum[kWidth] = {};
      if (residual != nullptr) add(sum, 1.f, residual[t * vectors + v]);
      for (int64_t s = 0; s < routing.S; ++s) {
        const int64_t slots = (s * routing.T + t) * routing.k;
        for (int64_t first = 0; first < routing.k; first += kInFlight) {
          RowVector<T, kWidth> row[kInFlight];
          int32_t at[kInFlight];
#pragma unroll
          for (int q = 0; q < kInFlight; ++q) {
            at[q] = first + q < routing.k ? sorted_row(routing, slots + first + q) : -1;
            if (at[q] >= 0) row[q] = y[at[q] * vectors + v];
          }
#pragma unroll
          for (int q = 0; q < kInFlight; ++q) {
            if (at[q] < 0) continue;
            // A dropped slot's weight may be NaN, and is not read.
            add(sum, routing.weights ? routing.weights[slots + first + q] : 1.f, row[q]);
          }
        }
      }
      RowVector<T, kWidth> rounded;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) rounded.at[c] = convert<T>(sum[c]);
      out[t * vectors + v] = rounded;
    }
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kRowThreads, 4) moe_unpermute_backward_kernel(
    MoeRows routing,
    const RowVector<T, kWidth>* grad_out,  // [R, vectors]
    const RowVector<T, kWidth>* y,         // [N, vectors], read for grad_weights
    RowVector<T, kWidth>* grad_y,          // [N, vectors], or null
    float* grad_weights,                   // [R, k], or null
    int64_t vectors) {
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  for (int64_t r = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; r < routing.T; r += step) {
    for (int64_t j = 0; j < routing.k; ++j) {
      const int64_t slot = r * routing.k + j, i = sorted_row(routing, slot);
      float dot = 0;
      if (i >= 0) {
        const float weight = routing.weights ? routing.weights[slot] : 1.f;
        for (int64_t v = threadIdx.x; v < vectors; v += kLanes) {
          const RowVector<T, kWidth> grad = grad_out[r * vectors + v];
          if (grad_weights != nullptr) {
            const RowVector<T, kWidth> row = y[i * vectors + v];
#pragma unroll
            for (int c = 0; c < kWidth; ++c)
              dot = __fmaf_rn(convert<float>(grad.at[c]), convert<float>(row.at[c]), dot);
          }
          if (grad_y == nullptr) continue;
          RowVector<T, kWidth> scaled;
#pragma unroll
          for (int c = 0; c < kWidth; ++c)
            scaled.at[c] =
                routing.weights ? convert<T>(weight * convert<float>(grad.at[c])) : grad.at[c];
          grad_y[i * vectors + v] = scaled;
        }
      }
      if (grad_weights == nullptr) continue;
      for (int bits = kLanes / 2; bits > 0; bits /= 2) dot += __shfl_xor_sync(kAllLanes, dot, bits);
      if (threadIdx.x == 0) grad_weights[slot] = dot;
    }
  }
  if (grad_y != nullptr) zero_empty_rows(routing, grad_y, vectors);
}

template <typename T, int kWidth>
cudaError_t combine(
    const MoeRows& routing, const void* y, const void* residual, void* out, cudaStream_t stream) {
  using vector_t = RowVector<T, kWidth>;
  const int64_t vectors = routing.D / kWidth;
  const dim3 block = block_of_rows(vectors);
  M2AE_LAUNCH(
      (moe_combine_kernel<T, kWidth>),
      blocks_of_rows(routing.T, block.y),
      block,
      0,
      stream,
      routing,
      static_cast<const vector_t*>(y),
      static_cast<const vector_t*>(residual),
      static_cast<vector_t*>(out),
      vectors);
  return cudaGetLastError();
}

template <typename T, int kWidth>
cudaError_t backward(
    const MoeRows& routing,
    const void* grad_out,
    const void* y,
    void* grad_y,
    float* grad_weights,
    cudaStream_t stream) {
  using vector_t = RowVector<T, kWidth>;
  const dim3 block(kLanes, kRowThreads / kLanes);
  const int64_t by_rows = (routing.N + kRowThreads - 1) / kRowThreads * block.y;
  const int64_t rows_of_grid = routing.T > by_rows ? routing.T : by_rows;
  M2AE_LAUNCH(
      (moe_unpermute_backward_kernel<T, kWidth>),
      blocks_of_rows(rows_of_grid, block.y),
      block,
      0,
      stream,
      routing,
      static_cast<const vector_t*>(grad_out),
      static_cast<const vector_t*>(y),
      static_cast<vector_t*>(grad_y),
      grad_weights,
      routing.D / kWidth);
  return cudaGetLastError();
}

}  // namespace

cudaError_t moe_combine_launch(
    const MoeRows& routing, const void* y, const void* residual, void* out, cudaStream_t stream) {
  const bool wide = routing.D * bytes_of(routing.element) % 16 == 0 && aligned_16(y) &&
                    aligned_16(residual) && aligned_16(out);
  switch (routing.element) {
    case Element::kBFloat16:
      return wide ? combine<__nv_bfloat16, 8>(routing, y, residual, out, stream)
                  : combine<__nv_bfloat16, 1>(routing, y, residual, out, stream);
    case Element::kFloat16:
      return wide ? combine<__half, 8>(routing, y, residual, out, stream)
                  : combine<__half, 1>(routing, y, residual, out, stream);
    default:
      return wide ? combine<float, 4>(routing, y, residual, out, stream)
                  : combine<float, 1>(routing, y, residual, out, stream);
  }
}

cudaError_t moe_unpermute_backward_launch(
    const MoeRows& routing,
    const void* grad_out,
    const void* y,
    void* grad_y,
    float* grad_weights,
    cudaStream_t stream) {
  const bool wide = routing.D * bytes_of(routing.element) % 16 == 0 && aligned_16(grad_out) &&
                    aligned_16(y) && aligned_16(grad_y);
  switch (routing.element) {
    case Element::kBFloat16:
      return wide ? backward<__nv_bfloat16, 8>(routing, grad_out, y, grad_y, grad_weights, stream)
                  : backward<__nv_bfloat16, 1>(routing, grad_out, y, grad_y, grad_weights, stream);
    case Element::kFloat16:
      return wide ? backward<__half, 8>(routing, grad_out, y, grad_y, grad_weights, stream)
                  : backward<__half, 1>(routing, grad_out, y, grad_y, grad_weights, stream);
    default:
      return wide ? backward<float, 4>(routing, grad_out, y, grad_y, grad_weights, stream)
                  : backward<float, 1>(routing, grad_out, y, grad_y, grad_weights, stream);
  }
}

}  // namespace m2ae::cuda
