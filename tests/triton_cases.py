"""What tests/test_triton.py compiles: each Triton kernel of m2ae_kernels as it is launched.

The launchers run on CPU tensors, told that these are on a GPU of some capability, while launches
are recorded instead of run. So tiles, descriptors and options are those of that GPU, and a launcher
that read a result back would be found out by the garbage it reads. A kernel joins by being launched
in CALLS. A case is (kernel, type of each runtime argument, compile-time constants, launch options,
runtime arguments that 16 divides).
"""

import contextlib
import functools
import importlib
from unittest import mock

import torch
import triton_selftest
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from m2ae_kernels.ops._activations import ACTIVATIONS, IDENTITY, is_glu
from m2ae_kernels.ops._expert_mlp_reference import AT_INPUT, AT_OUTPUT
from m2ae_kernels.triton import _device

GELU, SILU, SWIGLU = (ACTIVATIONS.index(name) for name in ("gelu", "silu", "swiglu"))

TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


def cases(capability, which="kernels"):
    """Cases for a GPU of `capability`, 90 being 9.0."""
    if which != "kernels":
        return SELFTEST[which]
    seen = {}
    for case in recorded(capability):
        kernel, *rest = case
        seen.setdefault((kernel.fn.__module__, kernel.fn.__name__, str(rest)), case)
    return list(seen.values())


def recorded(capability):
    launches = []

    def record(kernel, *arguments, grid, warmup, **given):
        launches.append(case_of(kernel, arguments, given))

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", record))
        gpu = functools.partial(lambda major, _: (major, 100), capability // 10)
        patches.enter_context(mock.patch.object(_device, "capability", gpu))
        for call in CALLS:
            call()
    return launches


def case_of(kernel, arguments, given):
    """As Triton specializes a launch: None and 1 are constants, multiples of 16 are known to be."""
    given = {**dict(zip(kernel.arg_names, arguments, strict=False)), **given}
    types, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, given.pop(parameter.name)
        specialized = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and value == 1):
            constants[name] = value
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            types[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, torch.Tensor):
            types[name] = f"*{TYPES[value.dtype]}"
            divisible += [name] if value.data_ptr() % 16 == 0 else []
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible += [name] if specialized and value % 16 == 0 else []
        else:
            types[name] = "fp32"
    return kernel, types, constants, given, divisible


def rows(dtype, D, every_option):
    """Features, and either what is left out by default or every option there is."""
    N, M = 300, 400
    x, y = torch.zeros(N, D, dtype=dtype), torch.zeros(M, D, dtype=dtype)
    none = (None,) * 5
    some = (
        torch.zeros(N, dtype=torch.int64),  # target
        torch.ones(N, dtype=torch.bool),
        torch.ones(M, dtype=torch.bool),
        torch.zeros(N, dtype=torch.int64),  # ids
        torch.zeros(M, dtype=torch.int64),
    )
    return x, y, some if every_option else none


def info_nce_loss(dtype, D, same_id=0, every_option=False, ranks=False, allow_tf32=False):
    module = importlib.import_module("m2ae_kernels.triton.info_nce_loss")
    x, y, pairing = rows(dtype, D, every_option)
    options = (0, -100, same_id, every_option, every_option, 1e-12, True)
    inputs = (x, y, torch.ones(()), *pairing)
    workspace = 512 << 20
    outputs = module.info_nce_loss(*inputs, *options, ranks, False, allow_tf32, workspace)
    grads = outputs[:2]
    given = (*outputs[2:10], outputs[12], *options, allow_tf32, workspace, [True] * 3)
    module.info_nce_loss_backward(*grads, *inputs, *given)


def siglip_loss(dtype, D, same_id=0, every_option=False, allow_tf32=False):
    module = importlib.import_module("m2ae_kernels.triton.siglip_loss")
    x, y, pairing = rows(dtype, D, every_option)
    weight = torch.ones(len(x)) if every_option else None
    inputs = (x, y, torch.ones(()), torch.ones(()), *pairing, weight)
    options = (0, -100, same_id, every_option, 1e-12)
    limits = (allow_tf32, 512 << 20)
    module.siglip_loss(*inputs, *options, False, [True] * 4, *limits)
    *_, rnorm_q, rnorm_k = module.siglip_loss(*inputs, *options, True, [False] * 4, *limits)
    grad = torch.ones(len(x))
    module.siglip_loss_backward(grad, *inputs, rnorm_q, rnorm_k, *options, *limits, [True] * 4)


def expert_mlp(dtype, D, rows, activation, *, every_option=False, needs=(True,) * 7, tf32=False):
    """`rows` for each expert on average; the plain call, or everything there is.

    A width of 1 comes with one expert per token and in all, which are constants then, too.
    """
    module = importlib.import_module("m2ae_kernels.triton.expert_mlp")
    E, k, S = *((4, 2) if D > 1 else (1, 1)), 2 if every_option else 1
    T = rows * E // k // S
    ids = torch.arange(T * S * k, dtype=torch.int32)
    wide = 2 * D if is_glu(activation) else D

    def zeros(*shape):
        return torch.zeros(shape, dtype=dtype)

    inputs = (
        *(zeros(T, D), zeros(E, wide, D), zeros(E, D, D), torch.zeros(T * S, k)),
        *(zeros(E, wide), zeros(E, D), zeros(S, D) if every_option else None),
        torch.zeros(2, dtype=torch.int64),
        *(ids, ids.view(-1, k), torch.zeros(E + 1, dtype=torch.int32)),
    )
    output, weight_at = (SILU, AT_INPUT) if every_option else (IDENTITY, AT_OUTPUT)
    options = (activation, output, 0.1, 0.1 if every_option else 0.0, weight_at)
    with mock.patch.object(_device, "allows_tf32", return_value=tf32):
        out, h, y = module.expert_mlp(*inputs, *options, True)
        given = (h, y, *options, list(needs))
        module.expert_mlp_backward(torch.zeros_like(out), *inputs, *given)


def grouped_mm(dtype, form, D, activation=IDENTITY, *, gathered=False, tf32=False):
    """Forward and backward of a form, with a bias where there may be one."""
    module = importlib.import_module("m2ae_kernels.triton.grouped_mm")
    E, M = 4, 800
    shapes = {
        "2x3": ((M, D), (E, D, 2 * D)),
        "3x2": ((E, D, D), (D, M)),
        "2x2": ((D, M), (M, D)),
        "3x3": ((E, M, D), (E, D, 2 * D)),
    }[form]
    mat_a, mat_b = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    offs = None if form == "3x3" else torch.zeros(E, dtype=torch.int32)
    bias = torch.zeros(E, 2 * D, dtype=dtype) if form[2] == "3" else None
    a_ids = torch.zeros(M, dtype=torch.int32) if gathered else None
    inputs = (mat_a, mat_b, offs, bias, a_ids)
    with mock.patch.object(_device, "allows_tf32", return_value=tf32):
        out, h = module.grouped_mm(*inputs, activation, dtype, activation != IDENTITY)
        module.grouped_mm_backward(torch.zeros_like(out), *inputs, h, activation, [True] * 3)


half, single = torch.bfloat16, torch.float32
# The plain loss, by descriptor where there are any and, for an odd width, by pointer; every option,
# of which one kind of id takes the most registers; the other dtypes; a width of 1, a constant.
CALLS = [
    functools.partial(op, dtype, D, **given)
    for op in (info_nce_loss, siglip_loss)
    for dtype, D, given in (
        (half, 64, {}),
        (half, 36, {}),
        (half, 64, {"every_option": True, "same_id": 1}),
        (half, 64, {"every_option": True, "same_id": 2}),
        (half, 36, {"every_option": True, "same_id": 2}),
        (torch.float16, 64, {}),
        (single, 64, {}),
        (single, 1, {}),
        (single, 64, {"every_option": True, "same_id": 2}),
        (single, 64, {"allow_tf32": True}),
        (single, 64, {"every_option": True, "same_id": 2, "allow_tf32": True}),
    )
]
CALLS.append(functools.partial(info_nce_loss, half, 64, every_option=True, same_id=2, ranks=True))
CALLS.append(functools.partial(info_nce_loss, half, 64, ranks=True))
# Experts: every height of a tile with the activation that takes the most registers; every option;
# widths that are no multiple of 16 bytes, and of 1; the other dtypes.
ROUTER_ALONE = tuple(i == 3 for i in range(7))
CALLS += [
    functools.partial(expert_mlp, dtype, D, rows, activation, **given)
    for dtype, D, rows, activation, given in (
        (half, 256, 200, GELU, {}),
        (half, 256, 200, SWIGLU, {"every_option": True}),
        (half, 64, 50, SWIGLU, {"needs": ROUTER_ALONE}),
        (half, 64, 30, SWIGLU, {"needs": ROUTER_ALONE}),
        (half, 64, 10, SWIGLU, {"needs": ROUTER_ALONE}),
        (half, 36, 200, SWIGLU, {}),
        (torch.float16, 64, 200, GELU, {"needs": ROUTER_ALONE}),
        (single, 64, 200, SWIGLU, {"every_option": True}),
        (single, 1, 10, GELU, {}),
        (single, 64, 200, SWIGLU, {"every_option": True, "tf32": True}),
        (single, 64, 50, SWIGLU, {"needs": ROUTER_ALONE, "tf32": True}),
        (single, 64, 10, SWIGLU, {"needs": ROUTER_ALONE, "tf32": True}),
    )
]
CALLS += [
    functools.partial(grouped_mm, dtype, form, D, *given, **options)
    for dtype, form, D, given, options in (
        (half, "2x3", 64, [SWIGLU], {"gathered": True}),
        (half, "2x3", 36, [GELU], {}),
        (half, "3x2", 64, [], {}),
        (half, "2x2", 64, [], {}),
        (half, "3x3", 64, [GELU], {}),
        (single, "2x3", 64, [SWIGLU], {"gathered": True}),
        (single, "3x2", 64, [], {"tf32": True}),
        (single, "2x2", 64, [], {"tf32": True}),
    )
]

SELFTEST = {
    "fits": [
        (
            triton_selftest.row_softmax,
            {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "D": "i32"},
            {"BLOCK_D": 1024},
            {"num_warps": 4},
            ["x_ptr", "y_ptr"],
        )
        for dtype in ("fp32", "bf16", "fp16")
    ],
    "spills": [
        (
            triton_selftest.spilling,
            {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*fp32", "K": "i32"},
            {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64},
            {"num_warps": 4},
            ["x_ptr", "y_ptr", "out_ptr"],
        )
    ],
}
