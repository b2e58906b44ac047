"""What the tests of expert_mlp share: routings, inputs, and the formula of its docstring."""

import torch
from torch.nn import functional as F

from m2ae_kernels.ops._activations import ACTIVATIONS
from m2ae_kernels.ops._moe_routing import MoERouting
from m2ae_kernels.ops._philox import HIDDEN, OUTPUT, dropout_factors

NAMES = ("x", "w1", "w2", "topk_weights", "b1", "b2", "shift")
SEED = (123456789012345, 7)

ACTIVATE = {
    "identity": lambda h: h,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda h: F.relu(h) ** 2,
    "silu": F.silu,
    "swiglu": lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
    "geglu": lambda h: F.gelu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
    "reglu": lambda h: F.relu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
}
GLUS = ("swiglu", "geglu", "reglu")


def routing_of(ids, E, *, capacity=None, align=1):
    """What moe_sort is to return for ids [R, k]: kept in flat order, up to `capacity` each."""
    flat = ids.flatten().tolist()
    N = len(flat) + E * (align - 1)
    N = (N + align - 1) // align * align
    sorted_ids, inverse, offsets, counts = [], [-1] * len(flat), [0], []
    for e in range(E):
        slots = [slot for slot, expert in enumerate(flat) if expert == e][:capacity]
        for slot in slots:
            inverse[slot] = len(sorted_ids)
            sorted_ids.append(slot)
        counts.append(len(slots))
        sorted_ids += [-1] * (-len(slots) % align)
        offsets.append(len(sorted_ids))
    sorted_ids += [-1] * (N - len(sorted_ids))

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device=ids.device)

    return MoERouting(ints(sorted_ids), ints(inverse).view(ids.shape), ints(offsets), ints(counts))


def case_of(T, D, H, Do, E, k, *, device="cpu", dtype=torch.float32, S=None, activation="gelu"):
    """Inputs whose h, y and out are of size one; with both biases, with `shift` for S streams."""
    wide = 2 * H if activation in GLUS else H
    R = T * (S or 1)
    ids = torch.stack([torch.randperm(E)[:k] for _ in range(R)]) if R else torch.zeros(0, k)
    tensors = {
        "x": torch.randn(T, D),
        "w1": torch.randn(E, wide, D) / D**0.5,
        "w2": torch.randn(E, Do, H) / H**0.5,
        "topk_weights": torch.rand(R, k) + 0.1,
        "b1": torch.randn(E, wide) / 2,
        "b2": torch.randn(E, Do) / 2,
        "shift": None if S is None else torch.randn(S, D) / 2,
    }
    inputs = {
        name: None
        if tensor is None
        else tensor.to(device, torch.float32 if name == "topk_weights" else dtype)
        for name, tensor in tensors.items()
    }
    return inputs, ids.to(device=device, dtype=torch.int32)


def registered_arguments(inputs, routing, *, activation, output_activation, p, at, device):
    seed = torch.tensor(SEED, device=device)
    order = (routing.sorted_ids, routing.inverse_ids, routing.expert_offsets)
    options = (ACTIVATIONS.index(activation), ACTIVATIONS.index(output_activation), p, p, at)
    return *(inputs[name] for name in NAMES), seed, *order, *options


def formula(inputs, ids, inverse_ids, *, activation="gelu", output_activation="identity", **more):
    """All experts on all rows, one slot after the other, in float64: [R, Do]."""
    x, w1, w2, weights, b1, b2, shift = (
        None if inputs[name] is None else inputs[name].double() for name in NAMES
    )
    at = more.get("apply_router_weight", "output")
    seed = torch.tensor(SEED, device=x.device)
    u = x if shift is None else torch.cat([x + row for row in shift])
    R, k = ids.shape
    E, Do, H = w2.shape
    out = x.new_zeros(R, Do)
    for j in range(k):
        slots = torch.arange(R, device=x.device) * k + j
        masks = []
        for p, columns, which in (
            (more.get("dropout_p", 0), H, HIDDEN),
            (more.get("output_dropout_p", 0), Do, OUTPUT),
        ):
            factors = dropout_factors(seed, slots, columns, p, which, torch.float64)
            masks.append(factors if p else torch.ones_like(factors))
        w = weights[:, j, None]
        for e in range(E):
            is_kept = ((ids[:, j] == e) & (inverse_ids[:, j] >= 0))[:, None]
            h = torch.where(is_kept, w * u if at == "input" else u, 0) @ w1[e].T
            h = h if b1 is None else h + b1[e]
            y = (ACTIVATE[activation](h) * masks[0]) @ w2[e].T
            y = y if b2 is None else y + b2[e]
            z = ACTIVATE[output_activation](y) * masks[1]
            out = out + torch.where(is_kept, w * z if at == "output" else z, 0)
    return out


def leaves(inputs):
    """Fresh copies that require gradients."""
    return {
        name: None if tensor is None else tensor.detach().clone().requires_grad_()
        for name, tensor in inputs.items()
    }


def call(op, inputs, ids, routing, **options):
    """Run `op` on inputs of case_of(), with the seed that formula() has if it needs one."""
    inputs = dict(inputs)
    positional = [inputs.pop(name) for name in ("x", "w1", "w2", "topk_weights")]
    if options.get("dropout_p") or options.get("output_dropout_p"):
        options = {"seed": torch.tensor(SEED, device=ids.device), **options}
    return op(*positional, ids, routing=routing, **inputs, **options)


def gradients(out, inputs, upstream):
    """By name; zeros where autograd has none, as for topk_weights that are not applied."""
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    grads = torch.autograd.grad(out, list(given.values()), upstream, allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if grad is None else grad
        for (name, tensor), grad in zip(given.items(), grads, strict=True)
    }


# Relative error of a tensor, by norms. Sums of up to a few hundred products, and two layers of
# them, err by some 2^-24 times the root of that number. For 16 bits, h is rounded to 2^-9 or 2^-12
# of its value, as is the result; bfloat16 products also round u, a and the gradients by h and y.
# Five roundings of 2^-9 at most, of which a gradient sees each once, are 2^-6.7; they do not all
# point the same way, which leaves room for derivatives of activations, of slopes up to 2, and, on
# CUDA, for one more, of what each slot adds to a token: six of random signs are 2^-9 sqrt(6).
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def assert_near(actual, expected, dtype, name):
    """|actual - expected| <= tolerance |expected|, and exact where nothing is expected."""
    assert actual.shape == expected.shape, name
    assert actual.isfinite().all(), name
    error, size = (actual.double() - expected).norm().item(), expected.norm().item()
    assert error <= TOLERANCE[dtype] * size, f"{name}: {error / max(size, 1e-300):.2e}"


def assert_matches(op, inputs, ids, routing, dtype=torch.float32, **options):
    """The output and every gradient of `op` against the formula."""
    ours, exact = leaves(inputs), leaves(inputs)
    actual = call(op, ours, ids, routing, **options)
    expected = formula(exact, ids, routing.inverse_ids, **options)
    assert actual.dtype == dtype
    assert_near(actual.detach(), expected.detach(), dtype, "out")
    upstream = torch.randn_like(actual)
    got = gradients(actual, ours, upstream)
    wanted = gradients(expected, exact, upstream.double())
    for name, grad in got.items():
        assert grad.dtype == inputs[name].dtype
        assert_near(grad, wanted[name].double(), dtype, name)
