"""Two Triton kernels for tests/test_triton.py: one as ours, one that cannot fit in registers."""

import triton
import triton.language as tl


@triton.jit
def row_softmax(
    x_ptr,  # [N, D]
    y_ptr,  # [N, D]
    D,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BLOCK_D)
    # Cast right after the load: in the interpreter, bfloat16 arithmetic works on raw bits.
    x = tl.load(x_ptr + row + d, mask=d < D, other=float("-inf")).to(tl.float32)
    weights = tl.exp(x - tl.max(x, axis=0))
    y = weights / tl.sum(weights, axis=0)
    tl.store(y_ptr + row + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def spilling(
    x_ptr,  # [M, K]
    y_ptr,  # [N, K]
    out_ptr,  # [M, N]
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + m[:, None] * K + (start + k)[None, :])
        y = tl.load(y_ptr + n[:, None] * K + (start + k)[None, :])
        sums += tl.dot(x, y.T)
    sums = tl.exp(sums - tl.max(sums, axis=1)[:, None])
    tl.store(out_ptr + m[:, None] * BLOCK_N + n[None, :], sums)
