"""grouped_mm: the four forms, with what comes on top, against a loop over the groups in float64."""

import pytest
import torch
from expert_mlp_cases import GLUS, assert_near
from grouped_mm_cases import (
    FORMS,
    assert_matches,
    case_of,
    formula,
    leaves,
    of_leaves,
)
from interpreter import fewer, interpret_only, interpreted, skip_if_interpreted

from m2ae_kernels.ops._activations import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (sizes, M, K, C): one of everything, empty groups at all places, a group larger than a block of
# any kernel, axes that are no multiples of 8 or 16
CASES = [
    ([1], 1, 1, 1),
    ([0, 3, 0, 0, 5, 0], 4, 6, 8),
    ([7, 300, 2], 33, 31, 67),
    ([5, 5, 5, 5], 16, 1, 103),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes,M,K,C", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_matches_a_loop(form, sizes, M, K, C, dtype, impl):
    interpret_only(
        "2x3-sizes0-1-1-1-torch.float32", "2x3-sizes1-4-6-8-torch.bfloat16",
        "2x3-sizes2-33-31-67-torch.float32", "3x2-sizes1-4-6-8-torch.float16",
        "3x2-sizes2-33-31-67-torch.float32", "2x2-sizes2-33-31-67-torch.bfloat16",
        "2x2-sizes1-4-6-8-torch.float32", "3x3-sizes3-16-1-103-torch.float32",
    )  # fmt: skip
    op, device = impl
    for tail in fewer((4, 0)):
        operands = case_of(form, sizes, M, K, C, tail=tail, device=device, dtype=dtype)
        assert_matches(op, operands, dtype)
        operands["bias"] = None
        assert_matches(op, operands, dtype)


@pytest.mark.parametrize("form", ["2x3", "3x3"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, form, impl):
    interpret_only("gelu-2x3", "geglu-2x3", "swiglu-3x3", "relu2-3x3", "silu-2x3")
    op, device = impl
    for biased in fewer((True, False)):
        operands = case_of(form, [4, 0, 9], 5, 8, 22, tail=3, device=device, biased=biased)
        assert_matches(op, operands, activation=activation)
    out = op(**operands, activation=activation)
    assert out.shape[-1] == (11 if activation in GLUS else 22)
    if form == "2x3":
        assert not out[13:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathered_rows(dtype, impl):
    interpret_only("torch.bfloat16", "torch.float32")
    op, device = impl
    operands = case_of("2x3", [6, 0, 9], 0, 5, 7, device=device, dtype=dtype)
    operands["mat_a"] = torch.randn(8, 5).to(device, dtype)
    # Rows that occur several times, never, and not at all; more rows than there are in groups.
    ids = torch.randint(0, 6, (18,), dtype=torch.int32)
    ids[[2, 9]] = -1
    for a_ids in (ids.to(device), ids.long().to(device)):
        assert_matches(op, operands, dtype, a_ids=a_ids)
        assert_matches(op, operands, dtype, a_ids=a_ids, activation="gelu")
    ours = leaves(operands)
    ours["mat_a"].data[6:] = torch.nan  # nobody reads these
    out = op(**ours, a_ids=ids.to(device))
    grads = of_leaves(out, ours, torch.ones_like(out))
    assert out.isfinite().all()
    assert not grads["mat_a"][6:].any()


@pytest.mark.parametrize("form", ["2x3", "3x2", "2x2"])
def test_the_tail_is_not_read_and_zero(form, impl):
    op, device = impl
    operands = leaves(case_of(form, [4, 0, 9], 5, 8, 6, tail=5, device=device))
    with torch.no_grad():
        if form[0] == "2":
            operands["mat_a"].movedim(0 if form == "2x3" else 1, 0)[13:] = torch.nan
        if form[2] == "2":
            operands["mat_b"].movedim(1 if form == "3x2" else 0, 0)[13:] = torch.nan
    out = op(**operands)
    assert out.isfinite().all()
    upstream = torch.randn_like(out)
    if form == "2x3":
        assert not out[13:].any()
        upstream[13:] = torch.nan
    if form == "3x2":
        assert not out[:, 13:].any()
        upstream[:, 13:] = torch.nan
    grads = of_leaves(out, operands, upstream)
    assert all(grad.isfinite().all() for grad in grads.values())
    if form[0] == "2":
        assert not grads["mat_a"].movedim(0 if form == "2x3" else 1, 0)[13:].any()
    if form[2] == "2":
        assert not grads["mat_b"].movedim(1 if form == "3x2" else 0, 0)[13:].any()


@pytest.mark.parametrize("form", ["2x3", "3x2", "2x2"])
def test_gradients_of_empty_groups_are_exact_zeros(form, impl):
    op, device = impl
    sizes = [0, 5, 0, 1, 0]
    operands = leaves(case_of(form, sizes, 4, 6, 3, device=device))
    out = op(**operands)
    grads = of_leaves(out, operands, torch.ones_like(out))
    if form == "2x2":
        assert [bool(part.any()) for part in out] == [size > 0 for size in sizes]
        return
    for name in ("mat_b", "bias") if form == "2x3" else ("mat_a",):
        assert [bool(part.any()) for part in grads[name]] == [size > 0 for size in sizes]


@pytest.mark.parametrize("form", ["2x3", "3x2", "2x2"])
def test_no_rows_at_all(form, impl):
    op, device = impl
    for tail in (0, 3):
        assert_matches(op, case_of(form, [0, 0], 4, 6, 3, tail=tail, device=device))


@pytest.mark.parametrize("form", FORMS)
def test_out_dtype(form, impl):
    interpret_only("2x3", "2x2")
    op, device = impl
    operands = case_of(form, [4, 0, 9], 5, 40, 6, device=device, dtype=torch.bfloat16)
    wide = op(**operands, out_dtype=torch.float32)
    # Not what the narrow result says in more digits: sums of products of 16 bits, in float32.
    assert_near(wide, formula(**operands), torch.float32, "out")
    assert torch.equal(op(**operands), wide.bfloat16())
    assert_matches(op, operands, torch.bfloat16, out_dtype=torch.float16)


@pytest.mark.parametrize("form", FORMS)
def test_strides(form, impl):
    interpret_only("2x3", "3x2")
    op, device = impl
    operands = case_of(form, [4, 0, 9], 5, 8, 6, tail=2, device=device)
    turned = {n: t.mT.contiguous().mT if n.startswith("mat") else t for n, t in operands.items()}
    assert_matches(op, turned)
    sliced = dict(operands)
    for name in ("mat_a", "mat_b"):
        shape = operands[name].shape
        wide = torch.zeros(*shape[:-1], 2 * shape[-1] + 3, device=device)
        sliced[name] = wide[..., 3::2]
        sliced[name].copy_(operands[name])
    assert_near(op(**sliced), formula(**operands), torch.float32, "out")
    # A gradient that is expanded from one number, which torch's own refuses.
    ours = leaves(operands)
    op(**ours).sum().backward()
    exact = leaves(operands)
    formula(**exact).sum().backward()
    assert_near(ours["mat_b"].grad, exact["mat_b"].grad.double(), torch.float32, "mat_b")


@pytest.mark.parametrize("form", FORMS)
def test_is_torchs_where_that_has_it(form, impl):
    interpret_only("2x3", "3x3")
    op, device = impl
    sizes = [8, 0, 16]
    operands = case_of(form, sizes, 8, 16, 24, device=device, dtype=torch.bfloat16, biased=False)
    mat_a, mat_b = operands["mat_a"], operands["mat_b"]
    theirs = torch.nn.functional.grouped_mm(mat_a, mat_b, offs=operands["offs"])
    ours = op(mat_a, mat_b, offs=operands["offs"])
    assert ours.shape == theirs.shape
    assert_near(ours, theirs.double(), torch.bfloat16, "out")


def test_sums_over_many_rows_are_float32(impl):
    skip_if_interpreted("step by step")
    # 70,000 products of 1 in one sum: in 16 bits it would stop growing at 256.
    op, device = impl
    ones = torch.ones(1, 70_000, dtype=torch.bfloat16, device=device)
    offs = torch.tensor([1, 70_000], dtype=torch.int32, device=device)
    out = op(ones, ones.mT, offs=offs, out_dtype=torch.float32)
    assert out.flatten().tolist() == [1.0, 69_999.0]


def test_larger_than_every_tile(impl):
    # Rows, columns and depth in several pieces, each with a rest.
    op, device = impl
    rows, M, K, C = (100, 66, 66, 130) if interpreted() else (1100, 150, 530, 270)
    for form in FORMS:
        operands = case_of(form, [rows, 30], M, K, C, device=device)
        assert_matches(op, operands)
        if not interpreted():
            # Multiples of a vector, so that products read and write in place, but for rests of rows
            operands = case_of(
                form, [1100, 36], 150, 560, 288, tail=16, device=device, biased=False
            )
            assert_matches(op, operands)
        if form[2] == "3":
            operands = case_of(form, [rows, 30], M, K, 2 * C, device=device)
            assert_matches(op, operands, activation="swiglu")


def test_threads_change_nothing(impl):
    skip_if_interpreted("in one thread")
    op, device = impl
    threads = torch.get_num_threads()
    operands = case_of("2x3", [1100, 30], 0, 64, 270, device=device)
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            ours = leaves(operands)
            out = op(**ours, activation="gelu")
            results.append((out, *of_leaves(out, ours, torch.ones_like(out)).values()))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


def test_rows_do_not_see_each_other(impl):
    op, device = impl
    operands = case_of("2x3", [40, 30], 0, 16, 24, device=device)
    out = op(**operands)
    few = operands | {"mat_a": operands["mat_a"][38:43]}
    few["offs"] = torch.tensor([2, 5], dtype=torch.int32, device=device)
    assert_near(op(**few), out[38:43].double(), torch.float32, "out")
