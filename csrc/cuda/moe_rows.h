// The launchers that moe_permute and moe_unpermute share, on raw pointers: implemented in
// moe_permute.cu and moe_unpermute.cu, called by the .cpp files of the same names.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../element.h"

namespace m2ae::cuda {

// A routing: S streams of T tokens, k slots each, and N sorted rows of D numbers.
struct MoeRows {
  const int32_t* sorted;   // [N]; null where nobody asks which rows belong to no slot
  const int32_t* inverse;  // [S T, k]
  const float* weights;    // [S T, k], or null
  int64_t T;
  int64_t S;
  int64_t k;
  int64_t N;
  int64_t D;
  Element element;  // of the matrices: float32, bfloat16 or float16
};

// rows[i] = x[token of i], row_weights[i] its weight if there are weights; zeros where no slot is.
cudaError_t moe_permute_launch(
    const MoeRows& routing,
    const void* x /* [T, D] */,
    void* rows /* [N, D] */,
    float* row_weights /* [N] */,
    cudaStream_t stream);

// to[slot] = from[inverse[slot]], or 0.
cudaError_t moe_gather_weights_launch(
    const MoeRows& routing,
    const float* from /* [N] */,
    float* to /* [S T, k] */,
    cudaStream_t stream);

// out[t] = residual[t] + sum over streams, then slots, of weight * y[inverse]; without weights a
// plain sum. `residual` may be null, or `out` itself.
cudaError_t moe_combine_launch(
    const MoeRows& routing,
    const void* y /* [N, D] */,
    const void* residual /* [T, D] */,
    void* out /* [T, D] */,
    cudaStream_t stream);

// grad_y[i] = weight * grad_out[row of i], zeros where no slot is, and grad_weights[slot] =
// <grad_out[row], y[i]>; either may be null.
cudaError_t moe_unpermute_backward_launch(
    const MoeRows& routing,
    const void* grad_out /* [T, D], S = 1 */,
    const void* y /* [N, D] */,
    void* grad_y /* [N, D] */,
    float* grad_weights /* [T, k] */,
    cudaStream_t stream);

}  // namespace m2ae::cuda
