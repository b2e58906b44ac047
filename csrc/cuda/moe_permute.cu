// moe_permute on CUDA. Contract and math: m2ae_kernels/ops/moe_permute.py
//
// Forward: a token's row is read once and written to the places of its slots, which no other token
// has. Rows are bytes here: the widest units that fit. Backward is moe_combine_launch (see
// moe_unpermute.cu) and, for the weights, a gather.
#include "moe_rows.cuh"

namespace m2ae::cuda {
namespace {

template <typename unit_t>
__global__ void __launch_bounds__(kRowThreads, 4) moe_permute_kernel(
    MoeRows routing,
    const unit_t* __restrict__ x,  // [T, units]
    unit_t* __restrict__ rows,     // [N, units]
    float* __restrict__ row_weights,
    int64_t units) {
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  for (int64_t t = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; t < routing.T; t += step) {
    for (int64_t s = 0; s < routing.S; ++s) {
      const int64_t slots = (s * routing.T + t) * routing.k;
      for (int64_t u = threadIdx.x; u < units; u += blockDim.x) {
        const unit_t unit = x[t * units + u];
        for (int64_t j = 0; j < routing.k; ++j) {
          const int64_t i = sorted_row(routing, slots + j);
          if (i >= 0) rows[i * units + u] = unit;
        }
      }
      if (row_weights == nullptr) continue;
      for (int64_t j = threadIdx.x; j < routing.k; j += blockDim.x) {
        const int64_t i = sorted_row(routing, slots + j);
        if (i >= 0) row_weights[i] = routing.weights[slots + j];
      }
    }
  }
  zero_empty_rows(routing, rows, units);
  if (row_weights == nullptr) return;
  const int64_t thread =
      (int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  for (int64_t i = thread; i < routing.N; i += int64_t(gridDim.x) * kRowThreads)
    if (routing.sorted[i] < 0) row_weights[i] = 0;
}

__global__ void __launch_bounds__(kRowThreads, 4)
    gather_weights_kernel(MoeRows routing, const float* from, float* to) {
  const int64_t slots = routing.S * routing.T * routing.k;
  const int64_t step = int64_t(gridDim.x) * kRowThreads;
  for (int64_t q = int64_t(blockIdx.x) * kRowThreads + threadIdx.x; q < slots; q += step) {
    const int64_t i = sorted_row(routing, q);
    to[q] = i < 0 ? 0.f : from[i];
  }
}

template <typename unit_t>
cudaError_t permute(
    const MoeRows& routing, const void* x, void* rows, float* row_weights, cudaStream_t stream) {
  const int64_t units = routing.D * bytes_of(routing.element) / int64_t(sizeof(unit_t));
  const dim3 block = block_of_rows(units);
  // Also enough threads to look at each sorted row once.
  const int64_t by_rows = (routing.N + kRowThreads - 1) / kRowThreads * block.y;
  const int64_t rows_of_grid = routing.T > by_rows ? routing.T : by_rows;
  M2AE_LAUNCH(
      (moe_permute_kernel<unit_t>),
      blocks_of_rows(rows_of_grid, block.y),
      block,
      0,
      stream,
      routing,
      static_cast<const unit_t*>(x),
      static_cast<unit_t*>(rows),
      row_weights,
      units);
  return cudaGetLastError();
}

}  // namespace

cudaError_t moe_permute_launch(
    const MoeRows& routing, const void* x, void* rows, float* row_weights, cudaStream_t stream) {
  const int64_t bytes = routing.D * bytes_of(routing.element);
  if (bytes % 16 == 0 && aligned_16(x) && aligned_16(rows))
    return permute<RowVector<uint32_t, 4>>(routing, x, rows, row_weights, stream);
  if (routing.element == Element::kFloat32)
    return permute<uint32_t>(routing, x, rows, row_weights, stream);
  return permute<uint16_t>(routing, x, rows, row_weights, stream);
}

cudaError_t moe_gather_weights_launch(
    const MoeRows& routing, const float* from, float* to, cudaStream_t stream) {
  const int blocks = blocks_of_rows(routing.S * routing.T * routing.k, kRowThreads);
  M2AE_LAUNCH((gather_weights_kernel), blocks, kRowThreads, 0, stream, routing, from, to);
  return cudaGetLastError();
}

}  // namespace m2ae::cuda
