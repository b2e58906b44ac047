"""topk_gating: values, order, gradients and refusals of every kernel, against float64."""

import math

import pytest
import torch
from torch.library import opcheck
from torch.testing import assert_close

from m2ae_kernels import TopkGatingOutput, topk_gating

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = {"return_entropy": True, "return_probs_sum": True}
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


def exact(logits, k, *, norm=False, factor=1.0):
    """Textbook softmax and sort in float64, for finite logits."""
    z = logits.double()
    p = z.softmax(-1)
    order = z.detach().sort(dim=-1, stable=True, descending=True).indices[:, :k]
    weights = p.gather(1, order)
    if norm:
        weights = weights / weights.sum(-1, keepdim=True)
    entropy = torch.special.entr(p).sum(-1)
    count = torch.bincount(order.flatten(), minlength=z.shape[1])
    return TopkGatingOutput(weights * factor, order, z.logsumexp(-1), entropy, p.sum(0), count)


def differentiable(output):
    return [output.topk_weights, output.logsumexp, output.entropy, output.probs_sum]


def assert_outputs(actual, expected):
    assert_close(actual.topk_ids, expected.topk_ids.int())
    assert_close(actual.tokens_per_expert, expected.tokens_per_expert.int())
    for x, y in zip(differentiable(actual), differentiable(expected), strict=True):
        assert x.dtype == torch.float32
        assert_close(x, y.float())


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


def test_one_expert_of_one(impl):
    op, device = impl
    logits = torch.randn(6, 9, device=device, requires_grad=True)
    output = op(logits, 1, norm_topk_prob=True)
    assert torch.equal(output.topk_weights, torch.ones(6, 1, device=device))
    output.topk_weights.sum().backward()
    assert not logits.grad.any()
    (grad,) = torch.autograd.grad(op(logits, 1).topk_weights.sum(), logits)
    assert (grad != 0).all()


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


@pytest.mark.parametrize("policy", ["propagate", "zero"])
def test_infinite_logits(policy, impl):
    op, device = impl
    inf = math.inf
    logits = torch.tensor(
        [
            [1.0, -inf, 2.0, -inf, 0.0],  # fewer finite than k
            [-inf, -inf, 3.0, -inf, -inf],
            [-inf, -inf, -inf, -inf, -inf],
            [0.0, inf, 1.0, inf, -inf],
            [1e30, -1e30, 1e30, 1e30, 1e-42],
        ],
        device=device,
        requires_grad=True,
    )
    output = op(logits, 4, nan_policy=policy, **ALL)
    assert output.topk_ids.tolist() == [
        [2, 0, 4, 1],
        [2, 0, 1, 3],
        [0, 1, 2, 3],
        [1, 3, 2, 0],
        [0, 2, 3, 4],
    ]
    e = [math.exp(-i) for i in range(3)]
    weights = [
        [e[0] / sum(e), e[1] / sum(e), e[2] / sum(e), 0.0],
        [1.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [0.5, 0.5, 0.0, 0.0],
        [1 / 3, 1 / 3, 1 / 3, 0.0],
    ]
    assert_close(output.topk_weights, torch.tensor(weights, device=device))
    lse = torch.tensor([2 + math.log(sum(e)), 3.0, -inf, inf, 1e30], device=device)
    assert_close(output.logsumexp, lse)
    entropy = [
        sum(-x / sum(e) * math.log(x / sum(e)) for x in e),
        0.0,
        0.0,
        math.log(2),
        math.log(3),
    ]
    assert_close(output.entropy, torch.tensor(entropy, device=device))
    assert_close(output.probs_sum.sum(), torch.tensor(4.0, device=device))
    normed = op(logits, 4, norm_topk_prob=True, nan_policy=policy)
    assert_close(normed.topk_weights, torch.tensor(weights, device=device))
    # A loss that is infinite or NaN in rows 2 and 3 has no gradient there, and hurts no other.
    loss = output.topk_weights.square().sum() + output.logsumexp.square().sum()
    (loss + output.entropy.sum() + output.probs_sum.square().sum()).backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[2:4].any()
    assert not logits.grad[0, [1, 3]].any()


def test_nan_ranks_last_and_follows_its_policy(impl):
    op, device = impl
    inf, nan = math.inf, math.nan
    rows = [[1.0, nan, 2.0, -inf, 3.0], [nan] * 5, [nan, 0.0, nan, nan, -inf], [4, 3, 2, 1, 0]]
    logits = torch.tensor(rows, device=device, requires_grad=True)
    ids = [[4, 2, 0, 3], [0, 1, 2, 3], [1, 4, 0, 2], [0, 1, 2, 3]]
    for norm in (False, True):
        output = op(logits, 4, norm_topk_prob=norm, **ALL)
        assert output.topk_ids.tolist() == ids
        assert output.topk_weights[:3].isnan().all()
        assert output.logsumexp[:3].isnan().all()
        assert output.entropy[:3].isnan().all()
        assert output.probs_sum.isnan().all()
        clean = op(logits[3:], 4, norm_topk_prob=norm, **ALL)
        assert torch.equal(output.topk_weights[3:], clean.topk_weights)
        (grad,) = torch.autograd.grad(output.topk_weights.square().sum(), logits)
        assert grad[:3].isnan().all()
        assert grad[3].isfinite().all()

        output = op(logits, 4, norm_topk_prob=norm, nan_policy="zero", **ALL)
        without = logits.detach().masked_fill(logits.isnan(), -inf).requires_grad_()
        expected = op(without, 4, norm_topk_prob=norm, **ALL)
        assert output.topk_ids.tolist() == ids
        for x, y in zip(differentiable(output), differentiable(expected), strict=True):
            assert torch.equal(x, y)
        assert not output.topk_weights[1].any()
        (grad,) = torch.autograd.grad(output.topk_weights.square().sum(), logits)
        (wanted,) = torch.autograd.grad(expected.topk_weights.square().sum(), without)
        assert torch.equal(grad, wanted)
        assert grad.isfinite().all()


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


def test_masked_tokens(impl):
    op, device = impl
    logits = torch.randn(12, 6, device=device)
    mask = torch.rand(12, device=device) < 0.5
    mask[0], mask[1] = True, False
    logits[~mask] = math.nan
    logits.requires_grad_()
    for policy in ("propagate", "zero"):
        output = op(logits, 3, token_mask=mask, nan_policy=policy, **ALL)
        expected = exact(logits[mask], 3)
        assert (output.topk_ids[~mask] == -1).all()
        assert not output.topk_weights[~mask].any()
        assert not output.logsumexp[~mask].any()
        assert not output.entropy[~mask].any()
        rows = (output.topk_weights[mask], output.topk_ids[mask], output.logsumexp[mask])
        rest = (output.entropy[mask], output.probs_sum, output.tokens_per_expert)
        assert_outputs(TopkGatingOutput(*rows, *rest), expected)
        upstream = [torch.randn_like(x) for x in differentiable(output)]
        (grad,) = torch.autograd.grad(differentiable(output), logits, upstream)
        upstream = [g.double() if i == 3 else g[mask].double() for i, g in enumerate(upstream)]
        (wanted,) = torch.autograd.grad(differentiable(expected), logits, upstream)
        assert not grad[~mask].any()
        assert_close(grad[mask], wanted[mask])
    nobody = op(logits, 3, token_mask=torch.zeros_like(mask), **ALL)
    assert not nobody.tokens_per_expert.any()
    assert not nobody.probs_sum.any()


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


def test_strides_and_modes(impl):
    op, device = impl
    logits = torch.randn(7, 9, device=device).mT
    expected = op(logits.contiguous(), 3, **ALL)
    assert all(map(torch.equal, op(logits, 3, **ALL), expected))
    wide = torch.randn(9, 20, device=device)
    assert all(map(torch.equal, op(wide[:, 3:12], 3, **ALL), op(wide[:, 3:12].clone(), 3, **ALL)))
    with torch.inference_mode():
        assert all(map(torch.equal, op(logits, 3, **ALL), expected))
    with torch.autocast(device, torch.bfloat16):  # has no say
        assert all(map(torch.equal, op(logits, 3, **ALL), expected))


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


def test_second_derivative_is_refused(impl):
    op, device = impl
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    weights = op(logits, 2).topk_weights
    (grad,) = torch.autograd.grad(weights.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"topk_gating: expected one backward, got a second"):
        grad.sum().backward()


def test_registration(impl):
    _, device = impl
    op = torch.ops.m2ae_kernels.topk_gating.default
    logits = torch.randn(6, 5, device=device, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True, True], device=device)
    opcheck(op, (logits, 2, mask, True, 2.5, True, True, False))
    opcheck(op, (logits.mT, 2, None, False, 1.0, False, False, True))
    backward = torch.ops.m2ae_kernels.topk_gating_backward.default
    logits = logits.detach()
    ids = topk_gating(logits, 2).topk_ids
    grads = (torch.randn(6, 2), torch.randn(6), torch.randn(6), torch.randn(5))
    grads = tuple(grad.to(device) for grad in grads)
    opcheck(backward, (*grads, logits, ids, mask, True, 2.5, False))
    nothing = (None, None, None, None)
    opcheck(backward, (*nothing, logits.mT.contiguous().mT, ids, None, False, 1.0, True))


def test_compiles_to_one_graph(impl):
    op, device = impl
    logits = torch.randn(6, 5, device=device, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True, True], device=device)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for given in ({}, {"norm_topk_prob": True, "token_mask": mask, **ALL}):
        expected, actual = op(logits, 2, **given), compiled(logits, 2, **given)
        for x, y in zip(expected, actual, strict=True):
            assert x is y is None or torch.equal(x, y)
        loss = [o.topk_weights.square().sum() + o.logsumexp.sum() for o in (expected, actual)]
        grads = [torch.autograd.grad(x, logits)[0] for x in loss]
        assert torch.equal(*grads)
    more = torch.randn(11, 5, device=device)
    assert torch.equal(compiled(more, 2).topk_ids, op(more, 2).topk_ids)
