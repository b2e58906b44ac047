r"""expert_mlp: each token goes through its k experts, two layers each, and what they say is summed.

Letters: T tokens, S streams, R = S T rows of the routing (row s T + t), E experts, k per row, D
channels in, H hidden, Do out, N rows after the sort by expert.

Math, for slot j of row r = s T + t, expert e and router weight w, with m1 and m2 the dropouts' 0 or
1 / (1 - p), act the activation and act_o that of the output:

    u = x_t + shift_s          h = W1_e u + b1_e      a = m1 act(h)
    y = W2_e a + b2_e          z = m2 act_o(y)        out_r = sum_j w z

(with the weight at the input, h = W1_e (w u) + b1_e and out_r = sum_j z). Backward, where y is not
needed if act_o is the identity; g = m2 dout_r act_o'(y):

    da' = W2_e^T g             dw = <da', a> + <g, b2_e>, or <dout_r, z> for an output activation
    dh = w m1 da' act'(h)      dW2_e = sum w g a^T    db2_e = sum w g
    du = W1_e^T dh             dW1_e = sum dh u^T     db1_e = sum dh
    dx_t = sum_s sum_j du      dshift_s = sum_t sum_j du

(at the input, dw = <du, u>, and then du and u are multiplied by w). Saved are x, h and the routing:
no mask, no permuted x, no output of an expert; on the CPU no h beyond 16 MB, unless there is an
output activation: the backward computes it again. A mask is Philox4x32-10 with key seed[0], counter
(slot id, column / 4, 2 seed[1] + which of the two): ops/_philox.py.

Kernels: csrc/cpu/expert_mlp.cpp and expert_mlp_backward.cpp on the CPU, an expert's rows in blocks
and their hidden channels in panels that stay in its cache; m2ae_kernels/triton/expert_mlp.py on
CUDA, two grouped products and a sum over each token's slots. Elsewhere the reference serves,
sparsely: ops/_expert_mlp_reference.py.
Papers: Shazeer et al. 2017, "Outrageously large neural networks"; Guo et al. 2025, "SonicMoE", for
dw without y, which b2 and both dropouts survive.
"""

import re
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from m2ae_kernels.ops import _expert_mlp_reference
from m2ae_kernels.ops._checks import expect_dtype, refuse_forward_mode
from m2ae_kernels.ops._expert_mlp_arguments import (
    check_routing,
    check_seed,
    check_shapes,
    in_one_dtype,
    options_of,
)
from m2ae_kernels.ops._expert_mlp_op import registered, saves_h
from m2ae_kernels.ops._moe_routing import MoERouting
from m2ae_kernels.ops.moe_sort import moe_sort

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def expert_mlp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str = "gelu",
    output_activation: str = "identity",
    dropout_p: float = 0.0,
    output_dropout_p: float = 0.0,
    seed: Tensor | None = None,
    routing: MoERouting | None = None,
    apply_router_weight: Literal["output", "input", "none"] = "output",
    shift: Tensor | None = None,
) -> Tensor:
    """Each row's sum, over its k experts, of router weight times the expert's two layers.

    Args:
        x: tokens, [T, D]; float32, bfloat16 or float16.
        w1: first layers, [E, H, D]; [E, 2 H, D] for a gated activation, gate rows first, then up
            rows. As all of w2, b1, b2 and shift, in the dtype of `x`.
        w2: second layers, [E, Do, H].
        topk_weights: router weights, [R, k] float32; R = T, or S T with `shift`.
        topk_ids: expert of each slot, [R, k] int32 or int64; -1 is skipped.
        b1: [E, H] or [E, 2 H].
        b2: [E, Do].
        activation: "gelu" (exact), "gelu_tanh", "relu", "relu2", "silu", "identity", or gated:
            "swiglu", "geglu", "reglu".
        output_activation: one that is not gated, after w2 and b2, before the output dropout.
        dropout_p: share of hidden values that are dropped, after the activation, in [0, 1).
        output_dropout_p: share of each expert's outputs that are dropped, in [0, 1).
        seed: [2] int64 on the device of `x`: a key, and an offset of which 31 bits count; the
            masks are a function of it, of the slot and of the column. None draws it from torch's
            generator of that device, if there is dropout.
        routing: what moe_sort returned for `topk_ids`, of which capacity may have dropped slots;
            `topk_ids` is not looked at then. None sorts here.
        apply_router_weight: multiply the "output" of each expert by its weight, its "input", or
            "none".
        shift: [S, D]: row s T + t of the routing computes on x[t] + shift[s].

    Returns:
        [R, Do] in the dtype of `x`. Differentiable once with respect to x, w1, w2, topk_weights,
        b1, b2 and shift. A row without a kept slot is 0, and passes no gradient; its token may
        hold NaN. Gradients of an expert without rows are exactly 0.

    Precision: sums are float32 for every dtype, in an order that depends on shapes and routing
    alone; h, and y before an output activation, are rounded to the dtype of `x`, out and gradients
    once. Factors of products are float32 or, where the machine multiplies it, bfloat16 for a
    bfloat16 `x`: then u, a and the gradients by h and y are rounded to it too. On CUDA that is so
    for both dtypes of 16 bits, and each slot's z and du are rounded before they are summed; factors
    of float32 are rounded to tf32 where torch allows its own products that.
    Under autocast x, w1, w2, b1, b2 and shift are rounded to the autocast dtype. For float64, see
    m2ae_kernels.reference.expert_mlp.

    Raises:
        ValueError: a shape does not fit, an id is out of range (on the CPU), an activation, a
            probability or apply_router_weight is not as above.
        TypeError: a dtype or a device is not as above.
    """
    cure = "; m2ae_kernels.reference.expert_mlp takes float64"
    expect_dtype("expert_mlp", "x", x, FLOATING, cure)
    expect_dtype("expert_mlp", "topk_weights", topk_weights, (torch.float32,), cure)
    refuse_forward_mode("expert_mlp", x, w1, w2, topk_weights, b1, b2, shift)
    inputs = (x, w1, w2, topk_weights, topk_ids, (b1, b2), shift, seed, routing)
    options = (activation, output_activation, dropout_p, output_dropout_p, apply_router_weight)
    try:
        return _expert_mlp_of(registered, *inputs, options)
    except RuntimeError as error:
        expected = re.search("expert_mlp: expected a routing.*", str(error))
        if expected is None:
            raise
        raise ValueError(expected[0]) from None  # what only the kernel looks at: values


def reference(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str = "gelu",
    output_activation: str = "identity",
    dropout_p: float = 0.0,
    output_dropout_p: float = 0.0,
    seed: Tensor | None = None,
    routing: MoERouting | None = None,
    apply_router_weight: Literal["output", "input", "none"] = "output",
    shift: Tensor | None = None,
) -> Tensor:
    """What expert_mlp means, in plain PyTorch, differentiable; float64 computes in float64."""
    inputs = (x, w1, w2, topk_weights, topk_ids, (b1, b2), shift, seed, routing)
    options = (activation, output_activation, dropout_p, output_dropout_p, apply_router_weight)
    return _expert_mlp_of(_expert_mlp_reference.forward, *inputs, options)


def _expert_mlp_of(
    op: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    biases: tuple[Tensor | None, Tensor | None],
    shift: Tensor | None,
    seed: Tensor | None,
    routing: MoERouting | None,
    options: tuple[str, str, float, float, str],
) -> Tensor:
    """Check the arguments, sort if nobody has, draw the seed if nobody gave one, and run `op`."""
    numbers = options_of(*options)
    inputs = in_one_dtype(x, w1, w2, *biases, shift)
    check_shapes(x, w1, w2, topk_weights, topk_ids, *biases, shift, numbers[0])
    check_routing(x, topk_weights, topk_ids, routing, len(w1))
    check_seed(x, seed)
    if seed is None and (numbers[2] > 0 or numbers[3] > 0):
        seed = torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=x.device)
    if routing is None:
        routing = moe_sort(topk_ids, len(w1))
    order = (routing.sorted_ids, routing.inverse_ids, routing.expert_offsets)
    differentiable = (*inputs[:3], topk_weights, *inputs[3:])
    needs_grad = (t is not None and t.requires_grad for t in differentiable)
    saves = torch.is_grad_enabled() and any(needs_grad)
    saves = saves and saves_h(x, w1, len(routing.sorted_ids), numbers[1])
    return op(*differentiable, seed, *order, *numbers, saves)[0]
