"""topk_gating: score functions, renormalization, expert_bias, logit_shift; values and gradients."""

import pytest
import torch
from topk_gating_cases import (
    ALL,
    DTYPES,
    INF,
    NAN,
    SCORES,
    assert_outputs,
    differentiable,
    exact,
    gradients,
    ids_of,
    separated,
)
from torch.testing import assert_close


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_score_functions(dtype, score, norm, impl):
    op, device = impl
    given = {"score_function": score, "norm_topk_prob": norm, "routed_scaling_factor": 2.5}
    for T, E, k in ((1, 1, 1), (33, 12, 4), (127, 65, 6), (5, 300, 17)):
        logits = torch.randn(T, E, device=device).mul(3).to(dtype)
        actual = op(logits, k, **given, **ALL)
        assert_outputs(actual, exact(logits, k, score=score, norm=norm, factor=2.5))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_gradients_of_score_functions(score, norm, impl):
    op, device = impl
    given = {"score_function": score, "norm_topk_prob": norm, "routed_scaling_factor": 2.5}
    for T, E, k in ((5, 1, 1), (33, 12, 4), (9, 260, 8), (3, 40, 40)):
        logits = torch.randn(T, E, device=device).mul(2).requires_grad_()
        actual = op(logits, k, **given, **ALL)
        expected = exact(logits, k, score=score, norm=norm, factor=2.5)
        upstream = [torch.randn_like(x) for x in differentiable(actual)]
        assert_close(
            gradients(actual, upstream, logits)[0], gradients(expected, upstream, logits)[0]
        )
        for i in (0, 2, 3):  # each output alone: the others have no gradient at all
            pairs = [(out, differentiable(out)[i]) for out in (actual, expected)]
            mine, wanted = (
                torch.autograd.grad(x, logits, upstream[i].to(x.dtype), retain_graph=True)[0]
                for _, x in pairs
            )
            assert_close(mine, wanted)


@pytest.mark.parametrize("score", SCORES)
def test_tiny_scores_renormalize_exactly(score, impl):
    op, device = impl
    # Scores of about 1e-30 (sqrtsoftplus: 1e-15) and their sum; then some below any float32.
    near, far = [-69.0, -70.0, -69.5, -71.0], [-300.0, -301.0, -302.0, -303.0]
    logits = torch.tensor([near, far], device=device, requires_grad=True)
    output = op(logits, 3, score_function=score, norm_topk_prob=True, **ALL)
    # Of such logits sigmoid is exp, and sqrtsoftplus exp(z / 2), to the last digit of float64.
    z = logits.double() / (2 if score == "sqrtsoftplus" else 1)
    p = z.softmax(-1)
    assert output.topk_ids.tolist() == [[0, 2, 1], [0, 1, 2]]
    weights = p.gather(1, output.topk_ids.long())
    weights = weights / weights.sum(1, keepdim=True)
    assert_close(output.topk_weights, weights.float())
    assert_close(output.entropy, torch.special.entr(p).sum(1).float())
    assert_close(output.probs_sum, p.sum(0).float())
    g = torch.tensor([[1.0, -2.0, 3.0]] * 2, device=device)
    assert_close(
        torch.autograd.grad(output.topk_weights, logits, g)[0],
        torch.autograd.grad(weights, logits, g.double())[0],
    )


def test_renormalizes_what_the_bias_chose(impl):
    op, device = impl
    # The chosen weigh 1e-44 and less in the softmax over all: less than a float32 can say.
    logits = torch.tensor([[0.0, -101.0, -102.0]], device=device)
    bias = torch.tensor([-9.0, 0.0, 0.0], device=device)
    output = op(logits, 2, expert_bias=bias, norm_topk_prob=True)
    assert output.topk_ids.tolist() in ([[1, 2]], [[2, 1]])  # both scores are 0
    by_expert = torch.zeros(3, device=device).scatter(
        0, output.topk_ids[0].long(), output.topk_weights[0]
    )
    assert_close(by_expert[1:], torch.tensor([-101.0, -102.0], device=device).softmax(0))


def test_one_expert_of_one(impl):
    op, device = impl
    logits = torch.randn(6, 9, device=device, requires_grad=True)
    for score in SCORES:
        output = op(logits, 1, score_function=score, norm_topk_prob=True)
        assert torch.equal(output.topk_weights, torch.ones(6, 1, device=device))
        output.topk_weights.sum().backward()
        assert not logits.grad.any()
    (grad,) = torch.autograd.grad(op(logits, 1).topk_weights.sum(), logits)
    assert (grad != 0).all()
    (grad,) = torch.autograd.grad(
        op(logits, 1, score_function="sigmoid").topk_weights.sum(), logits
    )
    assert ((grad != 0).sum(1) == 1).all()  # each expert is scored alone


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_expert_bias(score, norm, impl):
    op, device = impl
    logits = torch.randn(40, 24, device=device, requires_grad=True)
    bias = torch.randn(24, device=device)
    given = {"score_function": score, "norm_topk_prob": norm, **ALL}
    actual = op(logits, 5, expert_bias=bias, **given)
    expected = exact(logits, 5, score=score, norm=norm, bias=bias)
    assert_outputs(actual, expected)
    assert not torch.equal(actual.topk_ids, op(logits, 5, **given).topk_ids)
    upstream = [torch.randn_like(x) for x in differentiable(actual)]
    assert_close(gradients(actual, upstream, logits)[0], gradients(expected, upstream, logits)[0])
    bias.requires_grad_()
    assert (
        torch.autograd.grad(
            op(logits, 5, expert_bias=bias, **given).topk_weights.sum(),
            [logits, bias],
            allow_unused=True,
        )[1]
        is None
    )


def test_expert_bias_that_ties(impl):
    op, device = impl
    logits = torch.zeros(3, 8, device=device)
    bias = torch.tensor([0.0, 1.0, 0.0, 1.0, -0.0, 1.0, 0.0, 0.0], device=device)
    output = op(logits, 6, score_function="sigmoid", expert_bias=bias)
    assert output.topk_ids.tolist() == [[1, 3, 5, 0, 2, 4]] * 3


@pytest.mark.parametrize("score", SCORES)
def test_expert_bias_of_nan_and_infinity(score, impl):
    op, device = impl
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [2.0, 1.0, -INF, NAN]], device=device)
    given = {"score_function": score, "nan_policy": "zero"}
    for bias, ids in (
        ([NAN, 0.0, 0.0, 0.0], [[1, 2, 3, 0], [1, 2, 0, 3]]),
        ([-INF, 0.0, 0.0, INF], [[3, 1, 2, 0], [1, 0, 2, 3]]),
        ([0.0, 0.0, 9.0, 9.0], [[2, 3, 0, 1], [0, 1, 2, 3]]),  # -inf stays behind all finite
        ([NAN] * 4, [[0, 1, 2, 3]] * 2),
    ):
        output = op(logits, 4, expert_bias=torch.tensor(bias, device=device), **given)
        assert_close(output.topk_ids, ids_of(device, *ids))
        plain = op(logits, 4, **given)
        # Only the order is the bias' business, never the weights.
        for row in range(2):
            assert_close(
                torch.zeros(4, device=device).scatter(
                    0, output.topk_ids[row].long(), output.topk_weights[row]
                ),
                torch.zeros(4, device=device).scatter(
                    0, plain.topk_ids[row].long(), plain.topk_weights[row]
                ),
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_logit_shift(score, dtype, impl):
    op, device = impl
    logits = separated(37, 12, device).to(dtype).requires_grad_()
    shift = torch.randint(-30, 30, (3, 12), device=device).div(16).requires_grad_()
    given = {"score_function": score, "logit_shift": shift, **ALL}
    actual = op(logits, 4, norm_topk_prob=True, **given)
    expected = exact(logits, 4, score=score, norm=True, shift=shift)
    assert actual.topk_ids.shape == (111, 4)
    assert_outputs(actual, expected)
    upstream = [torch.randn_like(x) for x in differentiable(actual)]
    both = [logits, shift]
    for mine, wanted in zip(
        gradients(actual, upstream, both), gradients(expected, upstream, both), strict=True
    ):
        assert mine.dtype == wanted.dtype
        assert_close(mine, wanted)
    alone = op(logits.detach(), 4, norm_topk_prob=True, **given)
    assert_close(gradients(alone, upstream, shift)[0], gradients(expected, upstream, shift)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_a_half_shift_is_rounded_once(dtype, impl):
    op, device = impl
    logits = separated(300, 7, device)
    shift = torch.randint(-8, 8, (2, 7), device=device).to(dtype).requires_grad_()
    upstream = torch.randn(600, 2, device=device)
    (mine,) = torch.autograd.grad(op(logits, 2, logit_shift=shift).topk_weights, shift, upstream)
    wide = shift.detach().double().requires_grad_()
    weights = exact(logits, 2, shift=wide).topk_weights
    (wanted,) = torch.autograd.grad(weights, wide, upstream.double())
    assert mine.dtype == dtype
    # One last place of the 16 bits, because the float32 sum may lie on the other side of a tie.
    assert_close(mine, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_shift_by_nothing_is_no_shift(impl):
    op, device = impl
    logits = torch.randn(33, 9, device=device)
    plain = op(logits, 3, **ALL)
    shifted = op(logits, 3, logit_shift=torch.zeros(1, 9, device=device), **ALL)
    assert all(map(torch.equal, plain, shifted))
    none = op(logits, 3, logit_shift=torch.zeros(0, 9, device=device), **ALL)
    assert none.topk_ids.shape == (0, 3)
    assert not none.tokens_per_expert.any()


def test_mask_of_tokens_holds_for_each_stream(impl):
    op, device = impl
    logits = separated(10, 6, device)
    mask = torch.arange(10, device=device) % 3 != 1
    shift = torch.randint(-9, 9, (2, 6), device=device) / 16
    inputs = torch.where(mask[:, None], logits, NAN).requires_grad_()
    shift.requires_grad_()
    output = op(inputs, 2, logit_shift=shift, token_mask=mask, **ALL)
    present = mask.repeat(2)
    assert (output.topk_ids[~present] == -1).all()
    expected = exact(logits[mask], 2, shift=shift)
    assert_close(output.topk_ids[present], expected.topk_ids.int())
    assert_close(output.probs_sum, expected.probs_sum.float())
    assert_close(output.tokens_per_expert, expected.tokens_per_expert.int())
    loss = output.topk_weights.square().sum() + output.entropy.sum()
    of_logits, of_shift = torch.autograd.grad(loss, [inputs, shift])
    wanted = expected.topk_weights.square().sum() + expected.entropy.sum()
    assert not of_logits[~mask].any()
    assert_close(of_shift, torch.autograd.grad(wanted, shift)[0])


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
def test_no_logsumexp_of_scores_alone(score, impl):
    op, device = impl
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    output = op(logits, 2, score_function=score)
    assert not output.logsumexp.any()
    assert not output.logsumexp.requires_grad
    assert output.topk_weights.requires_grad


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("norm", [False, True])
def test_infinite_and_nan_scores(norm, score, impl):
    op, device = impl
    rows = [[INF, 1.0, INF, -INF], [-INF] * 4, [2.0, -INF, -INF, -INF], [NAN, 1.0, -INF, 2.0]]
    logits = torch.tensor([*rows, [1e30, -1e30, 1e-42, 0.0]], device=device, requires_grad=True)
    given = {"score_function": score, "norm_topk_prob": norm, **ALL}
    output = op(logits, 3, nan_policy="zero", **given)
    assert output.topk_ids.tolist() == [[0, 2, 1], [0, 1, 2], [0, 1, 2], [3, 1, 2], [0, 2, 3]]
    assert output.topk_weights[1].tolist() == [0, 0, 0]
    assert not output.topk_weights[2, 1:].any()
    assert output.topk_weights[3, 2] == 0
    one, two = (exact(torch.tensor([[x]]), 1, score=score).topk_weights.item() for x in (1.0, 2.0))
    if norm:
        first = [0.5, 0.5, 0.0] if score == "sqrtsoftplus" else [1 / (2 + one)] * 2
        third = [two / (one + two), one / (one + two)]
    else:
        first, third = [INF if score == "sqrtsoftplus" else 1.0] * 2 + [one], [two, one]
    assert_close(output.topk_weights[0, : len(first)], torch.tensor(first, device=device))
    assert_close(output.topk_weights[3, :2], torch.tensor(third, device=device))
    assert output.entropy.isfinite().all()
    assert output.probs_sum.isfinite().all()
    loss = output.topk_weights[1:].square().sum() + output.entropy.sum()
    (grad,) = torch.autograd.grad(loss + output.probs_sum.square().sum(), logits)
    assert grad.isfinite().all()
    assert not grad[1].any()
    output = op(logits, 3, **given)
    for x in (output.topk_weights, output.entropy[:, None]):
        assert x.isnan().all(1).tolist() == [False, False, False, True, False]
        assert not x[[0, 1, 2, 4]].isnan().any()
    assert output.probs_sum.isnan().all()
    (grad,) = torch.autograd.grad(output.topk_weights.sum(), logits)
    assert grad[3].isnan().all()
    assert grad[[0, 1, 2, 4]].isfinite().all()
