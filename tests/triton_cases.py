"""What tests/test_triton.py compiles: each Triton kernel of m2ae_kernels as it is launched.

A case is (kernel, type of each runtime argument, compile-time constants, launch options). A kernel
joins CASES in the change that adds m2ae_kernels/triton/<op>.py.
"""

import triton_selftest

CASES = []

SELFTEST = {
    "fits": [
        (
            triton_selftest.row_softmax,
            {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "D": "i32"},
            {"BLOCK_D": 1024},
            {"num_warps": 4},
        )
        for dtype in ("fp32", "bf16", "fp16")
    ],
    "spills": [
        (
            triton_selftest.spilling,
            {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*fp32", "K": "i32"},
            {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64},
            {"num_warps": 4},
        )
    ],
}
