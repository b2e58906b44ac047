"""topk_gating: values, order and gradients of every kernel, against float64.

The cases a gate gets wrong, and the tests that hold them, in the files of these tests:

    exact ties, -0 and +0           test_ties_go_to_the_lowest_index, .._group, .._bias_that_ties
    order of a stable sort          test_matches_softmax_and_sort, topk_gating_cases.stable_order
    NaN, +-inf, huge, denormal      test_nan_ranks_last.., test_infinite_.., .._of_nan_and_infinity
    every E and k                   test_every_number_of_experts, test_matches_softmax_and_sort
    T = 0, 1, around a block        test_matches_softmax_and_sort, test_no_tokens
    top-1                           test_one_expert_of_one
    gradients, tiny scores          test_gradients.., test_tiny_scores_.., test_expert_bias,
                                    test_unselected_logits_have_gradient_through_the_sum
    entropy, z and balance loss     test_entropy_at_its_ends, test_switch_balance_loss,
                                    test_masked_tokens, test_gradients (each output alone)
    groups                          test_topk_gating_groups.py
    rows and logits beyond limits   test_topk_gating_large.py; of a GPU, test_topk_gating_gpu.py
    strides, axes, dtypes, modes    test_strides_and_modes, test_leading_axes_are_tokens
"""

import math

import emulator
import pytest
import torch
from topk_gating_cases import ALL, DTYPES, assert_outputs, differentiable, exact
from torch.testing import assert_close

# (T, E, k): no token, one expert, one token, k = E, around 32 and 64, the largest E, more than one
# block of tokens
SHAPES = [
    (0, 4, 2),
    (5, 1, 1),
    (1, 8, 1),
    (31, 7, 7),
    (33, 12, 4),
    (127, 31, 2),
    (64, 33, 33),
    (127, 65, 6),
    (9, 160, 8),
    (3, 1024, 16),
    (4097, 8, 2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T,E,k", SHAPES)
def test_matches_softmax_and_sort(T, E, k, dtype, impl):
    op, device = impl
    logits = torch.randn(T, E, device=device).mul(4).to(dtype)
    assert_outputs(op(logits, k, **ALL), exact(logits, k))
    actual = op(logits, k, norm_topk_prob=True, routed_scaling_factor=2.5, **ALL)
    assert_outputs(actual, exact(logits, k, norm=True, factor=2.5))
    if k == E:  # all experts once
        assert_close(actual.topk_weights.sum(1), torch.full((T,), 2.5, device=device))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("T,E,k", [(0, 4, 2), (5, 1, 1), (33, 12, 4), (9, 160, 8), (31, 7, 7)])
def test_gradients(T, E, k, norm, impl):
    op, device = impl
    logits = torch.randn(T, E, device=device).mul(2).requires_grad_()
    actual = op(logits, k, norm_topk_prob=norm, routed_scaling_factor=2.5, **ALL)
    expected = exact(logits, k, norm=norm, factor=2.5)
    upstream = [torch.randn_like(x) for x in differentiable(actual)]
    (grad,) = torch.autograd.grad(differentiable(actual), logits, upstream, retain_graph=True)
    upstream_64 = [g.double() for g in upstream]
    (wanted,) = torch.autograd.grad(
        differentiable(expected), logits, upstream_64, retain_graph=True
    )
    assert_close(grad, wanted)
    for i in range(4):  # each output alone: the others have no gradient at all
        (grad,) = torch.autograd.grad(
            differentiable(actual)[i], logits, upstream[i], retain_graph=True
        )
        (wanted,) = torch.autograd.grad(
            differentiable(expected)[i], logits, upstream_64[i], retain_graph=True
        )
        assert_close(grad, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_halves_are_rounded_once(dtype, impl):
    op, device = impl
    logits = torch.randn(33, 12, device=device).to(dtype).requires_grad_()
    op(logits, 4).topk_weights.square().sum().backward()
    expected = logits.detach().double().requires_grad_()
    exact(expected, 4).topk_weights.square().sum().backward()
    assert logits.grad.dtype == dtype
    assert_close(logits.grad, expected.grad.to(dtype))


def test_unselected_logits_have_gradient_through_the_sum(impl):
    op, device = impl
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]], device=device, requires_grad=True)
    op(logits, 2).topk_weights[0, 0].backward()
    assert (logits.grad[0, 2:] < 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_index(dtype, impl):
    op, device = impl
    assert (
        op(torch.zeros(2, 70, dtype=dtype, device=device), 40).topk_ids.tolist()
        == [list(range(40))] * 2
    )
    zeros = torch.tensor([[-0.0, 0.0, -1.0, -0.0, 0.0]], dtype=dtype, device=device)
    assert op(zeros, 4).topk_ids.tolist() == [[0, 1, 3, 4]]
    # Few different values, so that ties are on both sides of the k-th place.
    logits = torch.randint(-2, 2, (200, 33), device=device).to(dtype)
    for k in (1, 5, 16, 33):
        assert_close(op(logits, k).topk_ids, exact(logits, k).topk_ids.int())


def test_weights_of_large_logits(impl):
    op, device = impl
    # exp(z - logsumexp) would lose these: float32 has no 1e6 + log 2 to the digits of log 2
    logits = torch.tensor([[1e6, 1e6, 1e6 - 1, 0.0]], device=device)
    assert_outputs(op(logits, 3, **ALL), exact(logits, 3))


def test_entropy_at_its_ends(impl):
    op, device = impl
    logits = torch.tensor([[300.0, 0, 0, 0], [7, 7, 7, 7]], device=device, requires_grad=True)
    entropy = op(logits, 2, return_entropy=True).entropy
    assert_close(entropy, torch.tensor([0.0, math.log(4)], device=device))
    entropy.sum().backward()
    assert not logits.grad[0].any()
    assert_close(logits.grad[1], torch.zeros(4, device=device))


def test_switch_balance_loss(impl):
    op, device = impl
    logits = torch.randn(64, 8, device=device)
    output = op(logits, 2, return_probs_sum=True)
    f = torch.nn.functional.one_hot(logits.topk(2).indices, 8).sum(1).double().mean(0) / 2
    loss = 8 * (f * logits.double().softmax(-1).mean(0)).sum()
    actual = 8 * (output.tokens_per_expert / 128 * output.probs_sum / 64).sum()
    assert_close(actual, loss.float())


def test_leading_axes_are_tokens(impl):
    op, device = impl
    logits = torch.randn(2, 3, 5, 7, device=device)
    mask = torch.rand(2, 3, 5, device=device) < 0.7
    output = op(logits, 2, token_mask=mask, **ALL)
    flat = op(logits.view(30, 7), 2, token_mask=mask.flatten(), **ALL)
    assert output.topk_weights.shape == (30, 2)
    assert all(map(torch.equal, output, flat))
    one = op(logits[0, 0, 0], 2)
    assert torch.equal(one.topk_ids, op(logits[0, 0, :1], 2).topk_ids)


def test_outputs_not_asked_for_are_none(impl):
    op, device = impl
    logits = torch.randn(4, 5, device=device)
    plain = op(logits, 2)
    assert plain.entropy is None
    assert plain.probs_sum is None
    assert op(logits, 2, return_entropy=True).probs_sum is None
    assert op(logits, 2, return_probs_sum=True).entropy is None


def test_tokens_do_not_see_each_other(impl):
    op, device = impl
    logits = torch.randn(40, 12, device=device)
    order = torch.randperm(40, device=device)
    output = op(logits, 4, return_entropy=True)
    permuted = op(logits[order], 4, return_entropy=True)
    few = op(logits[:3], 4, return_entropy=True)
    for x, y, z in zip(output[:4], permuted[:4], few[:4], strict=True):
        assert torch.equal(x[order], y)
        assert torch.equal(x[:3], z)


EXPERTS = [1, 2, 3, 7, 8, 12, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 160]
EXPERTS += [255, 256, 257, 288, 384, 512, 1024]


@pytest.mark.parametrize("E", EXPERTS)
def test_every_number_of_experts(E, impl):
    op, device = impl
    # Quarters: the stable sort has ties to break all along. 17 rows are a full block and one more.
    logits = torch.randint(-20, 20, (17, E), device=device) / 4
    # Shuffled threads take ten times as long, which matters where a warp takes 1024 turns.
    most = (2, 40) if emulator.shuffled() and E > 128 else (1, 2, 3, 4, 6, 8, 16, E)
    for k in sorted({k for k in most if k <= E}):
        assert_outputs(op(logits, k, **ALL), exact(logits, k))


def test_no_tokens(impl):
    op, device = impl
    logits = torch.empty(0, 12, device=device, requires_grad=True)
    output = op(logits, 4, **ALL)
    assert [x.shape for x in output[:4]] == [(0, 4), (0, 4), (0,), (0,)]
    assert not output.tokens_per_expert.any()
    assert not output.probs_sum.any()
    (output.topk_weights.sum() + output.probs_sum.sum()).backward()
    assert logits.grad.shape == (0, 12)


def test_sums_over_many_tokens(impl):
    op, device = impl
    # More than one task of rows, the last of them odd. The float32 sums add p <= 1 in at most 7000
    # terms, of which the largest share carries the rounding: far from 1e-6 if it were all in one.
    logits = torch.randn(7001, 12, device=device)
    assert_outputs(op(logits, 4, **ALL), exact(logits, 4))
    upstream = torch.randn(12, device=device)
    x = logits.clone().requires_grad_()
    (mine,) = torch.autograd.grad(op(x, 4, **ALL).probs_sum, x, upstream)
    (wanted,) = torch.autograd.grad(exact(x, 4).probs_sum, x, upstream.double())
    assert_close(mine, wanted)
