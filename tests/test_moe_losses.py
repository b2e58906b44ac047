"""The router and the losses on top of topk_gating."""

import math

import pytest
import torch
from torch.testing import assert_close

import m2ae_kernels
from m2ae_kernels import gate_topk, load_balancing_loss, router_entropy_loss, router_z_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_is_a_float32_linear_and_topk_gating(dtype):
    x, weight = torch.randn(2, 5, 16).to(dtype), torch.randn(6, 16).to(dtype)
    bias = torch.randn(6).to(dtype)
    options = {"norm_topk_prob": True, "return_entropy": True, "return_probs_sum": True}
    for given in ((x, weight, bias), (x, weight)):
        ours = [tensor.clone().requires_grad_() for tensor in given]
        exact = [tensor.double().requires_grad_() for tensor in given]
        logits = torch.nn.functional.linear(*exact)
        expected = m2ae_kernels.reference.topk_gating(logits, 2, **options)
        actual = gate_topk(*ours, top_k=2, **options)
        with torch.autocast("cpu", torch.bfloat16):  # has no say
            same = gate_topk(*ours, top_k=2, **options)
        assert torch.equal(actual.topk_ids, expected.topk_ids)
        for name in ("topk_weights", "logsumexp", "entropy", "probs_sum"):
            value = getattr(actual, name)
            assert value.dtype == torch.float32
            assert_close(value, getattr(expected, name).float())
            assert torch.equal(value, getattr(same, name))
        loss, wanted = (o.topk_weights.square().sum() + o.entropy.sum() for o in (actual, expected))
        loss.backward()
        wanted.backward()
        for tensor, reference in zip(ours, exact, strict=True):
            assert_close(tensor.grad, reference.grad.to(dtype))


def test_shift_becomes_that_of_the_logits(monkeypatch):
    x, weight, bias = torch.randn(5, 16), torch.randn(6, 16), torch.randn(6)
    shift = torch.randn(2, 16)
    seen = {}
    monkeypatch.setattr(
        m2ae_kernels.moe,
        "topk_gating",
        lambda logits, k, **more: seen.update(logits=logits, **more),
    )
    gate_topk(x, weight, bias, top_k=2, shift=shift, norm_topk_prob=True)
    assert seen["norm_topk_prob"]
    both = seen["logits"] + seen["logit_shift"][:, None]
    assert_close(both, torch.nn.functional.linear(x + shift[:, None], weight, bias))


@pytest.mark.parametrize(
    "changes,error,match",
    [
        (
            {"gate_weight": torch.zeros(6, 15)},
            ValueError,
            r"\[E, D = 16\], got \[6, 15\]",
        ),
        ({"gate_weight": torch.zeros(16)}, ValueError, r"gate_weight \[E, D = 16\], got \[16\]"),
        ({"gate_bias": torch.zeros(5)}, ValueError, r"gate_bias \[E = 6\], got \[5\]"),
        ({"shift": torch.zeros(16)}, ValueError, r"shift \[S, D = 16\], got \[16\]"),
        ({"x": torch.zeros(5, 16).int()}, TypeError, r"x in float32, .*, got torch.int32"),
        ({"shift": torch.zeros(1, 16).double()}, TypeError, r"shift in float32, .* torch.float64"),
        ({"gate_bias": torch.zeros(6, device="meta")}, TypeError, r"gate_bias on the device of x"),
        ({"shift": torch.zeros(1, 16, device="meta")}, TypeError, r"shift on the device of x"),
    ],
)
def test_gate_refuses(changes, error, match):
    given = {"x": torch.zeros(5, 16), "gate_weight": torch.zeros(6, 16)} | changes
    with pytest.raises(error, match=f"gate_topk: expected .*{match}"):
        gate_topk(**given, top_k=2)


def test_balance_loss_is_that_of_switch_transformers():
    logits = torch.randn(64, 8, requires_grad=True)
    output = m2ae_kernels.topk_gating(logits, 2, return_probs_sum=True)
    probs = logits.double().softmax(-1)
    chosen = torch.zeros(64, 8, dtype=torch.float64).scatter(1, output.topk_ids.long(), 1)
    expected = 8 * (chosen.mean(0) / 2 * probs.mean(0)).sum()
    given = (output.probs_sum, output.tokens_per_expert)
    for count in (64, torch.tensor(64)):
        assert_close(load_balancing_loss(*given, count, 2), expected.float())
    (grad,) = torch.autograd.grad(load_balancing_loss(*given, 64, 2), logits)
    (wanted,) = torch.autograd.grad(expected, logits)
    assert_close(grad, wanted)


def test_balance_loss_at_its_ends():
    uniform = load_balancing_loss(torch.full((4,), 2.5), torch.full((4,), 5), 10, 2)
    assert_close(uniform, torch.tensor(1.0))
    one = load_balancing_loss(torch.tensor([10.0, 0, 0, 0]), torch.tensor([10, 0, 0, 0]), 10, 1)
    assert_close(one, torch.tensor(4.0))
    for nobody in (0, torch.tensor(0)):
        assert load_balancing_loss(torch.zeros(4), torch.zeros(4).int(), nobody, 2) == 0


@pytest.mark.parametrize(
    "arguments,match",
    [
        ((torch.zeros(4), torch.zeros(3), 1, 1), r"\[E\], got \[4\] and \[3\]"),
        ((torch.zeros(2, 4), torch.zeros(2, 4), 1, 1), r"\[E\], got \[2, 4\]"),
        ((torch.zeros(4), torch.zeros(4), -1, 1), "num_tokens >= 0, got -1"),
        ((torch.zeros(4), torch.zeros(4), torch.ones(1), 1), r"number, got a tensor \[1\]"),
        ((torch.zeros(4), torch.zeros(4), 1, 0), "top_k >= 1, got 0"),
    ],
)
def test_balance_loss_refuses(arguments, match):
    with pytest.raises(ValueError, match=f"load_balancing_loss: expected .*{match}"):
        load_balancing_loss(*arguments)


@pytest.mark.parametrize("loss,power", [(router_z_loss, 2), (router_entropy_loss, 1)])
def test_means(loss, power):
    rows = torch.randn(12, requires_grad=True)
    assert_close(loss(rows), (rows**power).mean())
    mask = torch.rand(12) < 0.5
    mask[0], mask[1] = True, False
    (grad,) = torch.autograd.grad(loss(rows, mask), rows)
    (wanted,) = torch.autograd.grad((rows[mask] ** power).mean(), rows)
    assert_close(grad, wanted)
    # Two streams of the tokens of one mask; NaN where nothing counts
    streams = torch.randn(24)
    streams[~mask.repeat(2)] = math.nan
    assert_close(loss(streams, mask), (streams[mask.repeat(2)] ** power).mean())
    assert loss(rows, torch.zeros(12, dtype=torch.bool)) == 0
    assert loss(rows[:0]) == loss(rows[:0], mask[:0]) == 0


@pytest.mark.parametrize("loss", [router_z_loss, router_entropy_loss])
def test_means_refuse(loss):
    name = loss.__name__
    with pytest.raises(ValueError, match=rf"{name}: expected .* \[R\], got \[2, 3\]"):
        loss(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=rf"{name}: expected token_mask \[T\], T a divisor of R"):
        loss(torch.zeros(6), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=rf"{name}: expected token_mask \[T\], T a divisor of R"):
        loss(torch.zeros(6), torch.ones(0, dtype=torch.bool))
    with pytest.raises(TypeError, match=rf"{name}: expected token_mask in bool, got torch.int64"):
        loss(torch.zeros(6), torch.ones(6, dtype=torch.int64))
