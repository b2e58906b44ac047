"""expert_mlp on a GPU: waits, graphs with another routing, streams, tiles, routing nonsense, size.

No routing is given where waits and graphs are looked at: moe_sort is part of what must not wait.
"""

import itertools

import pytest
import torch
from expert_mlp_cases import NAMES, assert_matches, call, case_of, routing_of
from gpu_streams import captured, own_stream
from torch.testing import assert_close

from m2ae_kernels import moe_sort

pytestmark = pytest.mark.gpu
T, D, H, Do, E, k = 700, 64, 96, 80, 6, 2
OPTIONS = [
    {},
    {"activation": "swiglu", "dropout_p": 0.1, "output_dropout_p": 0.1},
    {"output_activation": "silu", "dropout_p": 0.1},
    {"activation": "geglu", "apply_router_weight": "input"},
    {"apply_router_weight": "none", "output_dropout_p": 0.3},
]


def inputs_of(options, dtype, S=2):
    activation = options.get("activation", "gelu")
    given = {"device": "cuda", "dtype": dtype, "S": S, "activation": activation}
    inputs, ids = case_of(T, D, H, Do, E, k, **given)
    return {name: None if t is None else t.requires_grad_() for name, t in inputs.items()}, ids


def step(op, inputs, ids, options):
    out = call(op, inputs, ids, None, **options)
    wanted = [t for t in inputs.values() if t is not None]
    if options.get("apply_router_weight") == "none":
        wanted = [t for name, t in inputs.items() if t is not None and name != "topk_weights"]
    return out, *torch.autograd.grad(out.square().sum(), wanted)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_sync(dtype, options, on_gpu, no_sync):
    inputs, ids = inputs_of(options, dtype)
    options = {"seed": torch.tensor([5, 6], device="cuda"), **options}
    step(on_gpu, inputs, ids, options)  # compiles, which may wait
    no_sync()
    step(on_gpu, inputs, ids, options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_in_one_graph(dtype, options, on_gpu):
    inputs, ids = inputs_of(options, dtype)
    seed = torch.tensor([5, 6], device="cuda")
    options = {"seed": seed, **options}
    graph, outputs = captured(lambda: step(on_gpu, inputs, ids, options))
    for replay in range(3):  # another routing and another mask at each; at last, one expert alone
        others, other_ids = inputs_of(options, dtype)
        with torch.no_grad():
            ids.copy_(other_ids if replay < 2 else torch.tensor([3, -1], device="cuda"))
            seed += 1
            for name in NAMES:
                inputs[name].copy_(others[name])
        graph.replay()
        replayed = [t.clone() for t in outputs]
        assert all(map(torch.equal, replayed, step(on_gpu, inputs, ids, options)))


def test_another_stream(on_gpu):
    inputs, ids = inputs_of(OPTIONS[0], torch.bfloat16)
    expected = step(on_gpu, inputs, ids, {})
    with own_stream(busy=True):
        copies = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
        result = step(on_gpu, copies, ids.clone(), {})  # not there before
    assert all(map(torch.equal, result, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device(on_gpu):
    inputs, ids = inputs_of(OPTIONS[0], torch.float32)
    there = {name: t.detach().to("cuda:1").requires_grad_() for name, t in inputs.items()}
    expected = step(on_gpu, inputs, ids, {})
    result = step(on_gpu, there, ids.to("cuda:1"), {})
    assert result[0].device == torch.device("cuda:1")
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(result, expected, strict=True))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tiles_of_every_height(dtype, options, on_gpu):
    # By the rows of an average expert; matrices are aligned, and are not.
    for rows, width in itertools.product((1, 10, 30, 60, 400), (64, 51)):
        T, activation = 4 * rows, options.get("activation", "gelu")
        given = {"device": "cuda", "dtype": dtype, "activation": activation}
        inputs, ids = case_of(T, width, 3 * width, width, 8, 2, **given)
        routing = routing_of(ids, 8)
        assert_matches(on_gpu, inputs, ids, routing, dtype, **options)


def test_routings_that_point_outside_are_harmless(on_gpu):
    # The CPU refuses them; here that would be a wait. Nothing may be read or written elsewhere.
    inputs, ids = inputs_of(OPTIONS[0], torch.float32, S=None)
    good = moe_sort(ids, E)
    for name, value in (("expert_offsets", 1 << 30), ("expert_offsets", -5)):
        bad = good._replace(**{name: getattr(good, name).clone()})
        getattr(bad, name)[2] = value
        call(on_gpu, inputs, ids, bad)
    torch.cuda.synchronize()
    assert_close(call(on_gpu, inputs, ids, good), call(on_gpu, inputs, ids, None))


def test_more_numbers_than_2_to_the_31(on_gpu):
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB")
    T, D, H = 300_000, 64, 4096  # T k H of 2.5e9
    given = {"device": "cuda", "dtype": torch.bfloat16}
    inputs, ids = case_of(1, D, H, D, 4, 2, **given)
    ids = torch.rand(T, 4, device="cuda").argsort(1)[:, :2].int()
    inputs["x"] = torch.randn(T, D, device="cuda", dtype=torch.bfloat16).requires_grad_()
    inputs["topk_weights"] = torch.rand(T, 2, device="cuda")
    out = call(on_gpu, inputs, ids, None)
    last = slice(T - 100, T)
    few = inputs | {name: inputs[name].detach()[last] for name in ("x", "topk_weights")}
    few["x"].requires_grad_()
    expected = call(on_gpu, few, ids[last], None)
    # Tiles of another height sum in the same order, but may round in the last digit of float32.
    assert_close(out[last], expected, rtol=2**-7, atol=2**-7)
    (by_x,) = torch.autograd.grad(out[last].sum(), inputs["x"])
    (wanted,) = torch.autograd.grad(expected.sum(), few["x"])
    assert not by_x[: T - 100].any()
    assert_close(by_x[last], wanted, rtol=2**-6, atol=2**-6)
