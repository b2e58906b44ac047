"""ema_update_: values, edge cases, memory layouts and registration of every kernel."""

import copy
import re

import pytest
import torch
from torch.library import opcheck
from torch.testing import assert_close

from m2ae_kernels import ema_update_

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool]
# scalar, empty, one element, not a multiple of a vector, one more than a CUDA chunk and a CPU block
SHAPES = [(), (0,), (1,), (5,), (3, 7), (8193,), (2, 3, 4, 5)]
DECAYS = [0.996, 0.5, 0.25, 1 - 1e-8]


def tensors(dtype, device, shapes=SHAPES):
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def average(target, source, decay):
    """The definition, in float64."""
    return (decay * target.double() + (1 - decay) * source.double()).to(target.dtype)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("source_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("target_dtype", FLOATING, ids=str)
def test_any_pair_of_dtypes(target_dtype, source_dtype, decay, impl):
    op, device = impl
    targets, sources = tensors(target_dtype, device), tensors(source_dtype, device)
    expected = [average(t, s, decay) for t, s in zip(targets, sources, strict=True)]
    op(targets, sources, decay)
    assert_close(targets, expected)


@pytest.mark.parametrize("decay", [0.996, 0.3])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_equal_dtypes_give_the_bits_of_foreach_lerp(dtype, decay, impl):
    op, device = impl
    targets, sources = tensors(dtype, device), tensors(dtype, device)
    expected = [t.clone() for t in targets]
    torch._foreach_lerp_(expected, sources, 1 - decay)
    op(targets, sources, decay)
    for target, bits in zip(targets, expected, strict=True):
        assert torch.equal(target, bits)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_is_averaged_as_pairs_of_reals(dtype, impl):
    op, device = impl
    target = torch.randn(3, 5, dtype=dtype, device=device)
    source = torch.randn(5, 3, dtype=dtype, device=device).T  # other strides than the target
    expected = 0.9 * target + (1 - 0.9) * source
    op([target], [source], 0.9)
    assert_close(target, expected)


def test_one_list_holds_any_mix(impl):
    op, device = impl
    dtypes = [(t, s) for t in FLOATING for s in FLOATING]
    targets = [torch.randn(33, device=device).to(t) for t, _ in dtypes]
    sources = [torch.randn(33, device=device).to(s) for _, s in dtypes]
    expected = [average(t, s, 0.9) for t, s in zip(targets, sources, strict=True)]
    counts = torch.tensor([2**53 + 1, -(2**62)], device=device)
    op([*targets, torch.zeros_like(counts)], [*sources, counts], 0.9)
    assert_close(targets, expected)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_integers_are_copied_bit_for_bit(dtype, decay, impl):
    op, device = impl
    source = torch.tensor([2**53 + 1, -3, 0, 1, 7], device=device).to(dtype)
    target = torch.zeros_like(source)
    shadow = torch.zeros_like(source)
    op([target], [source], decay, shadows=[shadow])
    assert torch.equal(target, source)
    assert torch.equal(shadow, source)


@pytest.mark.parametrize("shadow_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_shadows_are_the_new_targets(dtype, decay, shadow_dtype, impl):
    op, device = impl
    targets, sources = tensors(dtype, device), tensors(torch.bfloat16, device)
    shadows = [torch.empty_like(t, dtype=shadow_dtype) for t in targets]
    op(targets, sources, decay, shadows=shadows)
    for target, shadow in zip(targets, shadows, strict=True):
        assert torch.equal(shadow, target.to(shadow_dtype))


def test_shadow_overflows_as_a_cast_does(impl):
    op, device = impl
    target = torch.full((5,), 1e6, device=device)
    shadow = torch.empty(5, dtype=torch.float16, device=device)
    op([target], [target.clone()], 0.5, shadows=[shadow])
    assert torch.isinf(shadow).all()
    assert torch.isfinite(target).all()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_decay_one_keeps_the_target_whatever_the_source(dtype, impl):
    op, device = impl
    target = torch.tensor([1.0, torch.nan, -torch.inf, 0.0], device=device).to(dtype)
    before = target.clone()
    op([target], [torch.full_like(target, torch.nan)], 1.0)
    assert_close(target, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_decay_zero_copies_whatever_the_target(dtype, impl):
    op, device = impl
    source = torch.tensor([1.0, -2.0, torch.inf], device=device).to(dtype)
    target = torch.full_like(source, torch.nan)
    op([target], [source], 0.0)
    assert torch.equal(target, source)


def copied(source, dtype, impl):
    op, device = impl
    target = torch.zeros(source.shape, dtype=dtype, device=device)
    op([target], [source.to(device)], 0.0)
    return target.cpu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_widens_exactly(dtype, impl):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    assert_close(
        copied(numbers, torch.float32, impl), numbers.float(), equal_nan=True, rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_to_nearest_even_at_every_boundary(dtype, impl):
    numbers = torch.arange(2**15, dtype=torch.int16).view(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    middles = (numbers[1:].double() + numbers[:-1].double()).div(2).float()
    largest = numbers[-1:]
    special = torch.tensor([0.0, 1e-45, 1e-8, torch.inf, torch.nan, 3.4e38])
    edges = torch.cat([numbers, middles, largest + largest / 2**9, largest * 2, special])
    up, down = (edges.nextafter(torch.tensor(x)) for x in (torch.inf, -torch.inf))
    edges = torch.cat([edges, up, down])
    edges = torch.cat([edges, -edges])
    assert_close(copied(edges, dtype, impl), edges.to(dtype), equal_nan=True, rtol=0, atol=0)


def test_nan_and_inf_spread_in_between(impl):
    op, device = impl
    target = torch.tensor([1.0, torch.nan, 2.0], device=device)
    op([target], [torch.tensor([torch.nan, 1.0, torch.inf], device=device)], 0.9)
    assert target.isnan().tolist() == [True, True, False]
    assert target[2] == torch.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_decay_as_a_tensor(dtype, impl):
    op, device = impl
    target, source = torch.randn(9, device=device), torch.randn(9, device=device)
    decay = torch.tensor(0.99999, dtype=dtype, device=device)
    expected = average(target, source, decay.double().item())
    op([target], [source], decay)
    assert_close(target, expected)


def test_float64_decay_keeps_its_distance_from_one(impl):
    # 1 - float32(0.99999) is 1.0014e-5; the tensor that a schedule writes is therefore float64.
    op, device = impl
    target, source = torch.zeros(4, device=device), torch.ones(4, device=device)
    op([target], [source], torch.tensor(0.99999, dtype=torch.float64, device=device))
    assert_close(target, torch.full_like(target, 1e-5))


@pytest.mark.parametrize("flag", [torch.float32, torch.bool], ids=str)
def test_found_inf_skips_everything(flag, impl):
    op, device = impl
    targets = [torch.randn(5, device=device), torch.zeros(2, dtype=torch.int64, device=device)]
    sources = [torch.full((5,), torch.inf, device=device), torch.ones_like(targets[1])]
    shadows = [torch.zeros(5, dtype=torch.float16, device=device), torch.zeros_like(targets[1])]
    before = copy.deepcopy([*targets, *shadows])
    op(targets, sources, 0.9, shadows=shadows, found_inf=torch.ones((), dtype=flag, device=device))
    assert_close([*targets, *shadows], before, rtol=0, atol=0)
    op(targets, sources, 0.9, shadows=shadows, found_inf=torch.zeros(1, dtype=flag, device=device))
    assert torch.isinf(targets[0]).all()
    assert targets[1].tolist() == [1, 1]


def test_empty_lists_are_fine(impl):
    op, _ = impl
    op([], [], 0.9)


def test_long_run_stays_on_the_exact_average(impl):
    op, device = impl
    target, exact = torch.zeros(8, device=device), torch.zeros(8, dtype=torch.float64)
    steps, decay = 300, 0.9999
    for step in range(steps):
        source = torch.full((8,), 1.0 + step % 7, device=device)
        op([target], [source], decay)
        exact.lerp_(source.double().cpu(), 1 - decay)
    # Each step rounds once, by at most eps/2 of a value that stays below exact; errors add up.
    eps = torch.finfo(torch.float32).eps
    assert_close(target.double().cpu(), exact, rtol=steps * eps / 2, atol=0)


def test_bfloat16_target_does_not_move_at_high_decay(impl):
    # A fact of the format, not of the op: 1 + 0.001 rounds to 1. Keep the average in float32.
    op, device = impl
    narrow, wide = (torch.ones(3, device=device, dtype=d) for d in (torch.bfloat16, torch.float32))
    source = torch.full((3,), 2.0, device=device)
    for _ in range(10):
        op([narrow, wide], [source, source], 0.999)
    assert narrow.tolist() == [1.0] * 3
    assert_close(wide, torch.full_like(wide, 2 - 0.999**10))


def test_autograd_sees_the_change(impl):
    op, device = impl
    target, source = torch.ones(3, device=device), torch.zeros(3, device=device)
    shadow = torch.zeros(3, device=device, dtype=torch.float16)
    x = torch.ones(3, device=device, requires_grad=True)
    y = (x * target).sum()  # saves target for backward
    versions = target._version, shadow._version
    op([target], [source], 0.5, shadows=[shadow])
    assert (target._version, shadow._version) > versions
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_needs_no_no_grad(impl):
    op, device = impl
    target = torch.ones(3, device=device, requires_grad=True)
    source = torch.zeros(3, device=device, requires_grad=True)
    op([target], [source], 0.5)
    assert target.requires_grad
    assert target.is_leaf
    assert target.tolist() == [0.5] * 3
    with torch.inference_mode():
        op([target.detach()], [source], 0.5)
    assert target.tolist() == [0.25] * 3


def test_registration(impl):
    _, device = impl
    op = torch.ops.m2ae_kernels.ema_update_.default
    pair = torch.randn(2, 3, 4, device=device)
    shadow = torch.zeros(3, 4, dtype=torch.bfloat16, device=device)
    opcheck(op, ([pair[0].clone()], [pair[1]], 0.9))
    opcheck(op, ([pair[0].clone().mT], [pair[1].mT], 0.9))
    decay = torch.tensor(0.9, dtype=torch.float64, device=device)
    flag = torch.zeros((), device=device)
    opcheck(op, ([pair[0].clone()], [pair[1]], 0.0, decay, [shadow], flag))


def test_compiles_without_graph_breaks(impl):
    op, device = impl

    def step(target, source, decay):
        op([target], [source * 2], decay)
        return target + 1

    target, source = torch.zeros(5, device=device), torch.ones(5, device=device)
    decay = torch.tensor(0.75, dtype=torch.float64, device=device)
    torch._dynamo.reset()
    result = torch.compile(step, fullgraph=True)(target, source, decay)
    assert_close(target, torch.full_like(target, 0.5))
    assert_close(result, torch.full_like(target, 1.5))


X, Y = torch.zeros(4), torch.ones(4)


@pytest.mark.parametrize(
    "arguments,options,error,message",
    [
        (([X], [], 0.9), {}, ValueError, "expected 1 sources, one per target, got 0"),
        (([X], [Y], 0.9), {"shadows": []}, ValueError, "expected 1 shadows, one per target, got 0"),
        ((X, [Y], 0.9), {}, TypeError, "expected targets to be a list of tensors, got Tensor"),
        (([X], [1.0], 0.9), {}, TypeError, "expected sources to be a list of tensors, got list"),
        (
            ([X], [Y[:3]], 0.9),
            {},
            ValueError,
            "expected source 0 of its target's shape [4], got [3]",
        ),
        (([X], [Y], 1.5), {}, ValueError, "expected decay in [0, 1], got 1.5"),
        (([X], [Y], -0.1), {}, ValueError, "expected decay in [0, 1], got -0.1"),
        (([X], [Y], float("nan")), {}, ValueError, "expected decay in [0, 1], got nan"),
        (([X], [Y], torch.tensor(2.0)), {}, ValueError, "expected decay in [0, 1], got 2.0"),
        (([X], [Y], torch.zeros(2)), {}, ValueError, "expected one number as decay, got shape [2]"),
        (
            ([X], [Y], torch.tensor(0.9).bfloat16()),
            {},
            TypeError,
            "expected decay in torch.float64, torch.float32, got torch.bfloat16",
        ),
        (
            ([X], [Y], 0.9),
            {"found_inf": torch.zeros(2)},
            ValueError,
            "expected one number as found_inf, got shape [2]",
        ),
        (
            ([X], [Y], 0.9),
            {"found_inf": torch.zeros((), dtype=torch.int64)},
            TypeError,
            "expected found_inf in torch.float32, torch.bool, got torch.int64",
        ),
        (([X], [Y.long()], 0.9), {}, TypeError, "for a torch.float32 target, got torch.int64"),
        (([X.long()], [Y], 0.9), {}, TypeError, "for a torch.int64 target, got torch.float32"),
        (([X], [Y + 1j], 0.9), {}, TypeError, "for a torch.float32 target, got torch.complex64"),
        (
            ([X], [Y], 0.9),
            {"shadows": [Y.double()]},
            TypeError,
            "expected shadow 0 in one of torch.bfloat16, torch.float16 for a torch.float32 target",
        ),
        (([X[:1].expand(4)], [Y], 0.9), {}, ValueError, "target 0 without expanded dimensions"),
    ],
)
def test_rejects(arguments, options, error, message, impl, request):
    op, device = impl
    if device != "cpu":
        pytest.skip("the arguments are CPU tensors")
    if "emulated" in request.node.name and message.endswith("got 2.0"):
        pytest.skip("CUDA reads a decay on the targets' device in the kernel, unjudged")
    with pytest.raises(error, match=re.escape("ema_update_: ") + ".*" + re.escape(message)):
        op(*arguments, **options)


def test_rejects_tensors_on_two_devices():
    with pytest.raises(TypeError, match="expected all tensors on cpu, got source 0 on meta"):
        ema_update_([X], [Y.to("meta")], 0.9)


@pytest.mark.gpu
def test_cuda_tensors_take_a_cpu_decay_and_refuse_the_reverse():
    target, source = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    ema_update_([target], [source], torch.tensor(0.5, dtype=torch.float64))
    assert target.tolist() == [0.5] * 3
    with pytest.raises(TypeError, match="expected decay on the targets' device cpu, got cuda"):
        ema_update_([X.clone()], [Y], torch.tensor(0.5, device="cuda"))
