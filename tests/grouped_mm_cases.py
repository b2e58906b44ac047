"""What the tests of grouped_mm share: operands of each form, and a loop over the groups."""

import itertools

import torch
from expert_mlp_cases import ACTIVATE, assert_near

FORMS = ("2x3", "3x2", "2x2", "3x3")


def offsets(sizes, device="cpu"):
    return torch.tensor(sizes).cumsum(0).to(device=device, dtype=torch.int32)


def case_of(form, sizes, M, K, C, *, tail=0, device="cpu", dtype=torch.float32, biased=True):
    """mat_a, mat_b, offs, bias; the axis in groups has sum(sizes) + tail elements.

    That axis takes the place of M, C, K or none, by form. Products are of size one.
    """
    E, total = len(sizes), sum(sizes) + tail
    depth = max(total, 1) / E if form == "2x2" else K
    shapes = {
        "2x3": ((total, K), (E, K, C)),
        "3x2": ((E, M, K), (K, total)),
        "2x2": ((M, total), (total, C)),
        "3x3": ((E, M, K), (E, K, C)),
    }[form]
    mat_a, mat_b = (torch.randn(shape).to(device, dtype) for shape in shapes)
    mat_b = (mat_b / depth**0.5).to(dtype)
    offs = None if form == "3x3" else offsets(sizes, device)
    bias = torch.randn(E, C).to(device, dtype) if biased and form[2] == "3" else None
    return {"mat_a": mat_a, "mat_b": mat_b, "offs": offs, "bias": bias}


def formula(mat_a, mat_b, *, offs=None, bias=None, activation=None, a_ids=None):
    """Group by group in float64."""
    a, b = mat_a.double(), mat_b.double()
    act = ACTIVATE[activation or "identity"]
    ends = [] if offs is None else [0, *offs.tolist()]
    groups = [slice(*pair) for pair in itertools.pairwise(ends)]
    if offs is None:
        product = torch.einsum("emk,ekc->emc", a, b)
        return act(product if bias is None else product + bias.double()[:, None])
    if mat_a.dim() == 2 and mat_b.dim() == 2:
        return torch.stack([a[:, group] @ b[group] for group in groups])
    if mat_a.dim() == 3:
        parts = [a[e] @ b[:, group] for e, group in enumerate(groups)]
        rest = b.shape[1] - ends[-1]
        return torch.cat([*parts, a.new_zeros(a.shape[1], rest)], 1)
    if a_ids is not None:
        a = torch.cat([a, a.new_zeros(1, a.shape[1])])[a_ids.long()]
    parts = []
    for e, group in enumerate(groups):
        h = a[group] @ b[e]
        parts.append(act(h if bias is None else h + bias[e].double()))
    return torch.cat([*parts, a.new_zeros(len(a) - ends[-1], parts[0].shape[1])])


def leaves(operands):
    return {
        name: value.detach().clone().requires_grad_()
        if value is not None and value.is_floating_point()
        else value
        for name, value in operands.items()
    }


def of_leaves(out, operands, upstream):
    names = [n for n, t in operands.items() if t is not None and t.requires_grad]
    grads = torch.autograd.grad(out, [operands[name] for name in names], upstream)
    return dict(zip(names, grads, strict=True))


def assert_matches(op, operands, dtype=torch.float32, out_dtype=None, **options):
    """The output and every gradient of `op` against the formula."""
    ours, exact = leaves(operands), leaves(operands)
    actual = op(**ours, out_dtype=out_dtype, **options)
    expected = formula(**exact, **options)
    assert actual.dtype == (out_dtype or dtype)
    assert actual.is_contiguous()
    assert_near(actual.detach(), expected.detach(), dtype, "out")
    upstream = torch.randn_like(actual)
    got = of_leaves(actual, ours, upstream)
    wanted = of_leaves(expected, exact, upstream.double())
    for name, grad in got.items():
        assert grad.dtype == operands[name].dtype
        assert_near(grad, wanted[name].double(), dtype, name)
