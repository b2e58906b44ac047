"""info_nce_loss: values, gradients, masks and refusals of every kernel, against float64."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.testing import assert_close

from m2ae_kernels import info_nce_loss, reference

EPS = torch.finfo(torch.float32).eps
# (N, M, D): one pair, two, more keys than queries, odd ones, more than one block of 64
SHAPES = [(1, 1, 1), (2, 2, 8), (3, 7, 5), (17, 17, 17), (64, 65, 96), (129, 255, 40)]


def features(*sizes, D, device="cpu", dtype=torch.float32):
    """Rows of norm about 1."""
    return [
        (torch.randn(N, D, device=device) / max(D, 1) ** 0.5).to(dtype).requires_grad_()
        for N in sizes
    ]


def exact(
    query,
    key,
    scale,
    *,
    target=None,
    target_offset=0,
    ignore_index=-100,
    symmetric=True,
    normalize=False,
    eps=1e-12,
    query_mask=None,
    key_mask=None,
    reduction="mean",
):
    """Cross entropy, by torch in float64, of the present rows; of keys against soft targets."""
    (N, M), device = (len(query), len(key)), query.device
    x, y, scale = query.double(), key.double(), torch.as_tensor(scale).double()
    everybody = torch.ones(max(N, M), dtype=torch.bool, device=device)
    query_mask = everybody[:N] if query_mask is None else query_mask
    key_mask = everybody[:M] if key_mask is None else key_mask
    x, y = x[query_mask], y[key_mask]
    if normalize:
        x, y = F.normalize(x, eps=eps), F.normalize(y, eps=eps)
    if target is None:
        target = torch.arange(N, device=device) + target_offset
    positive = torch.zeros(N, M, dtype=torch.float64, device=device)  # 1 at each pair
    for i, j in enumerate(target.tolist()):
        if j != ignore_index:
            positive[i, j] = 1
    positive = positive[query_mask][:, key_mask]
    logits = scale * x @ y.mT
    losses = [torch.zeros(N, dtype=torch.float64, device=device)]
    losses += [torch.zeros(M, dtype=torch.float64, device=device)] if symmetric else []
    for loss, mask, z, pairs in zip(
        losses, (query_mask, key_mask), (logits, logits.mT), (positive, positive.mT), strict=False
    ):
        if z.numel():
            share = pairs / pairs.sum(1, keepdim=True).clamp(min=1)
            loss[mask] = F.cross_entropy(z, share, reduction="none")
    if reduction == "none":
        return tuple(losses)
    if reduction == "mean":
        anchors = (positive.any(1).sum().clamp(min=1), positive.any(0).sum().clamp(min=1))
        losses = [loss / count for loss, count in zip(losses, anchors, strict=False)]
    return sum(loss.sum() for loss in losses) / len(losses)


def assert_matches(op, query, key, scale, **given):
    """Loss and gradients; those of 16-bit features are the rounded ones of the same features."""
    inputs = [t for t in (query, key, scale) if isinstance(t, torch.Tensor) and t.requires_grad]
    loss, expected = op(query, key, scale, **given), exact(query, key, scale, **given)
    assert loss.dtype == torch.float32
    assert_close(loss, expected.float())
    grads = torch.autograd.grad(loss, inputs)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, inputs), strict=True):
        assert_close(grad, wanted)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("N,M,D", SHAPES)
def test_matches_cross_entropy(N, M, D, normalize, symmetric, impl):
    op, device = impl
    query, key = features(N, M, D=D, device=device)
    scale = torch.tensor(1 / 0.07, device=device, requires_grad=True)
    given = {"normalize": normalize, "symmetric": symmetric}
    assert_matches(op, query, key, scale, **given)
    assert_matches(op, query, key, 5.0, target_offset=M - N, reduction="sum", **given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_halves(normalize, dtype, impl):
    op, device = impl
    query, key = features(33, 40, D=24, device=device, dtype=dtype)
    scale = torch.tensor(10.0, device=device, dtype=dtype, requires_grad=True)
    assert_matches(op, query, key, scale, normalize=normalize)
    # GradScaler's factor must not overflow before, nor 1 / N underflow
    loss = op(query, key, scale, normalize=normalize)
    (grad,) = torch.autograd.grad(loss * 2.0**10, query, retain_graph=True)
    (plain,) = torch.autograd.grad(loss, query)
    assert_close(grad.double() / 2**10, plain.double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 14.3, 50.0, 100.0, 200.0, 1e4, -5.0])
def test_scales(scale, impl):
    op, device = impl
    query, key = features(16, 20, D=32, device=device)
    number = torch.tensor([scale], device=device, requires_grad=True)
    loss, expected = op(query, key, number, normalize=True), None
    expected = exact(query, key, number, normalize=True).sum()
    assert_close(loss, expected.float())
    assert_close(op(query, key, scale, normalize=True), loss)
    inputs = (query, key, number)
    for grad, wanted in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        # Float32 rounds logits of |scale| by up to |scale| EPS, and the softmax by as much
        # relatively; a few roundings of the dot product come to it.
        assert_close(grad, wanted, rtol=8 * EPS * max(abs(scale), 1.0), atol=1e-5)


def test_logits_far_from_zero(impl):
    op, device = impl
    query, key = features(8, 8, D=16, device=device)
    opposite = F.normalize(query.detach()) + 1e-3
    assert_close(  # all cosines about -1: exp(-100) is no float32 of full precision
        op(opposite, -opposite[:1].expand(8, -1), 100.0, normalize=True),
        exact(opposite, -opposite[:1].expand(8, -1), 100.0, normalize=True).float(),
    )
    large = [t.detach().mul(1e3).requires_grad_() for t in (query, key)]
    loss = op(*large, 30.0)  # logits of 1e7
    assert_close(loss, exact(*large, 30.0).float())
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, large))


@pytest.mark.parametrize("scale", [7.0, 14.0, 23.0, 46.0])
def test_pairs_that_are_nearly_right(scale, impl):
    op, device = impl
    # Two orthogonal pairs: each row has the logits s and 0, so loss = log(1 + exp(-s)).
    query = torch.eye(2, device=device, requires_grad=True)
    key = torch.eye(2, device=device, requires_grad=True)
    number = torch.tensor(scale, device=device, requires_grad=True)
    loss = op(query, key, number)
    p = math.exp(-scale) / (1 + math.exp(-scale))
    near = {"rtol": 1.3e-6, "atol": 0.0}  # torch's rtol; a loss of 1e-20 needs atol = 0
    assert_close(loss.item(), math.log1p(math.exp(-scale)), **near)
    loss.backward()
    sign = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], device=device)
    assert_close(query.grad, sign * (scale * p / 2), **near)
    assert_close(key.grad, sign * (scale * p / 2), **near)
    assert_close(number.grad.item(), -p, **near)


@pytest.mark.parametrize("scale", [14.3, 30.0, 50.0, 70.0, 100.0])
def test_training_that_converges(scale, impl):
    op, device = impl
    (x,) = features(64, D=128, device=device)
    key = F.normalize(x.detach())
    query = F.normalize(key + 0.02 * torch.randn_like(key)).requires_grad_()
    key.requires_grad_()
    number = torch.tensor(scale, device=device, requires_grad=True)
    x, y, s = query.double(), key.double(), number.double()
    logits = s * x @ y.mT
    rest = [(z - logits.diag()[:, None]).exp().tril(-1) for z in (logits, logits.mT)]
    rest = [
        r + (z - logits.diag()[:, None]).exp().triu(1)
        for r, z in zip(rest, (logits, logits.mT), strict=True)
    ]
    expected = sum(torch.log1p(r.sum(1)).mean() for r in rest) / 2  # without cancellation
    loss = op(query, key, number)
    # A logit is rounded by about EPS of its size, at most the scale, and that is what exp of a
    # difference of two loses relatively; atol = 0, as the loss goes down to 1e-29.
    near = 4 * EPS * scale
    assert_close(loss, expected.float(), rtol=near, atol=0.0)
    inputs = (query, key, number)
    for grad, wanted in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert (grad - wanted).norm() <= near * wanted.norm()


def test_one_pair_has_no_loss(impl):
    op, device = impl
    query, key = features(1, 1, D=8, device=device)
    scale = torch.tensor(10.0, device=device, requires_grad=True)
    loss = op(query, key, scale, normalize=True)
    assert loss.item() == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (query, key, scale)))


def test_nothing_to_learn_from(impl):
    op, device = impl
    query, key = features(3, 4, D=8, device=device)
    scale = torch.tensor(10.0, device=device, requires_grad=True)
    nobody = torch.zeros(4, dtype=torch.bool, device=device)
    ignored = torch.full((3,), -100, device=device)
    nothing = [
        (query[:0], key, {}),
        (query[:0], key[:0], {"normalize": True}),
        (query, key[:0], {"target": ignored}),
        (query, key, {"target": ignored}),
        (query, key, {"query_mask": nobody[:3]}),
        (query, key, {"key_mask": nobody, "normalize": True}),
        (query, key, {"query_mask": nobody[:3], "key_mask": nobody}),
    ]
    for (x, y, given), reduction in itertools.product(nothing, ("mean", "sum")):
        loss = op(x, y, scale, reduction=reduction, **given)
        assert loss.item() == 0
        assert not any(grad.any() for grad in torch.autograd.grad(loss, (query, key, scale)))
    loss_q, loss_k = op(query[:0], key, scale, reduction="none")
    assert loss_q.shape == (0,)
    assert loss_k.tolist() == [0.0] * 4


def test_equal_rows(impl):
    op, device = impl
    query, key = (torch.full((1000, 8), 0.3, device=device) for _ in range(2))
    assert_close(op(query, key, 14.3), torch.tensor(math.log(1000), device=device))
    no_width = torch.empty(5, 0, device=device)
    assert_close(op(no_width, no_width, 14.3), torch.tensor(math.log(5), device=device))


TARGETS = {
    "permutation": [4, 0, 5, 2, 1, 3],
    "shared keys": [4, 0, 4, 2, 4, 0],
    "ignored queries": [4, -100, 4, -100, 1, 0],
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_targets(target, symmetric, impl):
    op, device = impl
    query, key = features(6, 8, D=5, device=device)
    scale = torch.tensor(7.0, device=device, requires_grad=True)
    target = torch.tensor(target, device=device)
    for reduction in ("mean", "sum"):
        given = {"target": target, "symmetric": symmetric, "reduction": reduction}
        assert_matches(op, query, key, scale, normalize=True, **given)
        assert_matches(
            op, query, key, scale, ignore_index=4, **given | {"target": target.abs() % 8}
        )


def test_ignored_query_is_a_negative_and_masked_one_is_not(impl):
    op, device = impl
    query, key = features(4, 4, D=5, device=device)
    target = torch.tensor([0, -100, 2, 3], device=device)
    mask = target != -100
    ignored, masked = op(query, key, target=target), op(query, key, query_mask=mask)
    assert (ignored - masked).abs() > 1e-3
    assert_close(ignored, exact(query, key, 1 / 0.07, target=target).float())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_masks_equal_compaction(symmetric, normalize, impl):
    op, device = impl
    (N, M), scale = (24, 30), torch.tensor(9.0, device=device, requires_grad=True)
    given = {"symmetric": symmetric, "normalize": normalize}
    for probability in (0.3, 0.7):
        query, key = features(N, M, D=7, device=device)
        query_mask = torch.rand(N, device=device) < probability
        key_mask = torch.rand(M, device=device) < probability
        repeated = torch.randint(0, 10, (N,), device=device)
        for target in (None, repeated):
            masks = {"query_mask": query_mask, "key_mask": key_mask, "target": target}
            assert_matches(op, query, key, scale, **masks, **given)
        assert_matches(op, query, key, scale, query_mask=query_mask, **given)
        assert_matches(op, query, key, scale, key_mask=key_mask, **given)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_absent_rows_may_hold_anything(garbage, impl):
    op, device = impl
    query, key = features(6, 6, D=5, device=device)
    scale = torch.tensor(9.0, device=device, requires_grad=True)
    query_mask = torch.tensor([1, 0, 1, 1, 1, 1], dtype=torch.bool, device=device)
    key_mask = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool, device=device)
    for normalize in (True, False):
        given = {"query_mask": query_mask, "key_mask": key_mask, "normalize": normalize}
        expected = op(query, key, scale, **given)
        wanted = torch.autograd.grad(expected, (query, key, scale))
        dirty = [query.detach().clone(), key.detach().clone()]
        dirty[0][1], dirty[1][2] = garbage, garbage
        dirty = [t.requires_grad_() for t in dirty]
        loss = op(*dirty, scale, **given)
        grads = torch.autograd.grad(loss, (*dirty, scale))
        assert torch.equal(loss, expected)
        assert all(map(torch.equal, grads, wanted))
        assert not grads[0][1].any()
        assert not grads[1][2].any()


def test_nan_that_is_present_spreads(impl):
    op, device = impl
    query, key = features(4, 4, D=5, device=device)
    with torch.no_grad():
        query[1, 2] = math.nan
    loss_q, loss_k = op(query, key, reduction="none")
    assert loss_q.isnan().tolist() == [False, True, False, False]
    assert loss_k.isnan().all()
    mask = torch.tensor([True, True, True, False], device=device)
    for normalize in (True, False):
        loss = op(query, key, query_mask=mask, key_mask=mask, normalize=normalize)
        grads = torch.autograd.grad(loss, (query, key))
        assert not any(grad[3].any() for grad in grads)  # but not into a row that is absent


def test_rows_of_any_norm(impl):
    op, device = impl
    query, key = features(6, 6, D=5, device=device)
    with torch.no_grad():
        query[0] = 0
        query[1] *= 1e-20
        query[2] *= 1e20
        key[3] *= 1e-6
        key[4] = 0
    loss = op(query, key, 9.0, normalize=True)
    expected = exact(query, key, 9.0, normalize=True)
    assert_close(loss, expected.float())
    grads = torch.autograd.grad(loss, (query, key))
    for grad, wanted in zip(grads, torch.autograd.grad(expected, (query, key)), strict=True):
        # A gradient is the larger the smaller its row: compare as if the rows were of norm 1, or
        # of 1e-12, the eps; and atol for what cancels to 0 on the way.
        norm = (query if grad is grads[0] else key).detach().double().norm(dim=1, keepdim=True)
        norm = norm.clamp(min=1e-12)
        assert_close(grad.double() * norm, wanted.double() * norm, rtol=1.3e-6, atol=1e-6)
    assert_matches(op, *features(6, 6, D=5, device=device), 9.0, normalize=True, eps=0.9)
    small = query.detach().bfloat16() * 2.0**-130  # subnormal
    assert_close(
        op(small, key.detach().bfloat16(), 9.0, normalize=True, eps=1e-38),
        exact(small, key.detach().bfloat16(), 9.0, normalize=True, eps=1e-38).float(),
    )


def test_reductions(impl):
    op, device = impl
    query, key = features(5, 7, D=4, device=device)
    target = torch.tensor([6, 2, -100, 2, 0], device=device)
    for symmetric in (True, False):
        given = {"target": target, "symmetric": symmetric}
        losses = op(query, key, 8.0, reduction="none", **given)
        expected = exact(query, key, 8.0, reduction="none", **given)
        assert losses[1] is None or symmetric
        for loss, wanted in zip(losses, expected, strict=False):
            assert_close(loss, wanted.float())
        upstream = [torch.randn_like(loss) for loss in losses[: len(expected)]]
        for grad, wanted in zip(
            torch.autograd.grad(losses[: len(expected)], (query, key), upstream),
            torch.autograd.grad(expected, (query, key), [g.double() for g in upstream]),
            strict=True,
        ):
            assert_close(grad, wanted)
        rows = sum(loss.sum() for loss in losses[: len(expected)]) / len(expected)
        assert_close(op(query, key, 8.0, reduction="sum", **given), rows)


def test_bias_cancels(impl):
    op, device = impl
    query, key = features(5, 5, D=4, device=device)
    bias = torch.tensor(-math.inf, device=device, requires_grad=True)
    expected = op(query, key, 8.0)
    assert torch.equal(op(query, key, 8.0, logit_bias=-10.0), expected)
    loss = op(query, key, 8.0, logit_bias=bias)
    assert torch.equal(loss, expected)
    loss.backward()
    assert bias.grad.item() == 0


def test_scale_keeps_its_dtype(impl):
    op, device = impl
    query, key = features(5, 5, D=4, device=device)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        scale = torch.tensor(8.0, dtype=dtype, device=device, requires_grad=True)
        loss = op(query, key, scale)
        assert torch.equal(loss, op(query, key, 8.0))
        (grad,) = torch.autograd.grad(loss, scale)
        assert grad.dtype == dtype
        (wanted,) = torch.autograd.grad(exact(query, key, scale), scale)
        assert_close(grad, wanted)


@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=3)), ids=str)
def test_gradients_that_are_needed(needed, impl):
    op, device = impl
    inputs = [*features(5, 6, D=4, device=device), torch.tensor(8.0, device=device)]
    inputs = [t.detach().requires_grad_() for t in inputs]
    wanted = torch.autograd.grad(op(*inputs, normalize=True), inputs)
    for tensor, needs in zip(inputs, needed, strict=True):
        tensor.requires_grad_(needs)
    loss = op(*inputs, normalize=True)
    assert loss.requires_grad == any(needed)
    for _ in range(2 * any(needed)):
        loss.backward(retain_graph=True)
    for tensor, needs, grad in zip(inputs, needed, wanted, strict=True):
        assert torch.equal(tensor.grad, 2 * grad) if needs else tensor.grad is None


def test_nothing_quadratic_is_saved(impl):
    op, device = impl
    query, key = features(200, 300, D=4, device=device)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, id):
        op(query, key, 8.0, normalize=True)
    assert max(sizes) == 300 * 4


def test_gradients_repeat_bitwise(impl):
    op, device = impl
    query, key = features(300, 200, D=16, device=device)
    target = torch.randint(0, 20, (300,), device=device)
    runs = []
    for _ in range(5):
        loss = op(query, key, 8.0, target=target)
        runs.append((loss, *torch.autograd.grad(loss, (query, key))))
    assert all(all(map(torch.equal, run, runs[0])) for run in runs)


def test_strides(impl):
    op, device = impl
    query, key = (t.detach() for t in features(9, 9, D=6, device=device))
    expected = op(query, key)
    wide = torch.cat([torch.zeros(9, 1, device=device), key], dim=1)[:, 1:]
    views = [(query.mT.contiguous().mT, key), (query, wide), (query.mT.contiguous().mT, wide)]
    for x, y in views:
        assert_close(op(x, y), expected)  # another layout, another order in the product
    same = query[:1].expand(9, -1)
    assert_close(op(same, key), op(same.contiguous(), key))


def test_autocast_rounds_features_but_not_the_scale(impl):
    op, device = impl
    query, key = features(9, 9, D=6, device=device)
    scale = torch.tensor(14.2857, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        loss = op(query, key, scale, normalize=True)
        assert torch.equal(op(query.bfloat16(), key, scale, normalize=True), loss)
        loss.backward()
    assert loss.dtype == query.grad.dtype == torch.float32
    assert torch.equal(loss, op(query.bfloat16(), key.bfloat16(), scale, normalize=True))
    exactly = reference.info_nce_loss(query.double(), key.double(), scale, normalize=True)
    with torch.autocast(device, torch.bfloat16):
        again = reference.info_nce_loss(query.double(), key.double(), scale, normalize=True)
    assert torch.equal(again, exactly)


def test_reference_gradients():
    query, key = (t.detach().double().requires_grad_() for t in features(4, 5, D=3))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, 1, -100, 3])
    key_mask = torch.tensor([True, True, False, True, True])
    for normalize in (False, True):

        def losses(query, key, scale, normalize=normalize):
            return reference.info_nce_loss(
                query,
                key,
                scale,
                target=target,
                key_mask=key_mask,
                normalize=normalize,
                reduction="none",
            )

        assert gradcheck(losses, (query, key, scale))


@pytest.mark.parametrize("normalize", [True, False])
def test_reference_gradients_where_there_is_no_negative(normalize):
    query, key = features(3, 3, D=4)
    scale = torch.tensor(9.0, requires_grad=True)
    alone = torch.tensor([True, False, False])
    for mask in (alone, ~alone, torch.zeros(3, dtype=torch.bool)):
        for masks in ({"query_mask": mask}, {"key_mask": mask, "query_mask": mask}):
            grads = []
            for op in (reference.info_nce_loss, info_nce_loss):
                loss = op(query, key, scale, normalize=normalize, **masks)
                grads.append(torch.autograd.grad(loss, (query, key, scale)))
            for actual, expected in zip(*grads, strict=True):
                assert_close(actual, expected)
    for given in ({"query": query[:0]}, {"query": query[:1], "key": key[:1]}):
        inputs = {"query": query, "key": key, "normalize": normalize} | given
        loss = reference.info_nce_loss(logit_scale=scale, **inputs)
        assert loss.item() == 0
        assert not any(grad.any() for grad in torch.autograd.grad(loss, (query, key, scale)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_reference_in_float64(symmetric):
    query, key = (t.detach().double() for t in features(8, 9, D=5))
    target = torch.tensor([1, 1, -100, 3, 8, 8, 8, 0])
    given = {"target": target, "normalize": True, "symmetric": symmetric}
    loss = reference.info_nce_loss(query, key, 14.3, **given)
    assert_close(loss, exact(query, key, 14.3, **given))


def test_second_derivative_is_refused(impl):
    op, device = impl
    query, key = features(4, 4, D=5, device=device)
    (grad,) = torch.autograd.grad(op(query, key), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"info_nce_loss: expected one backward, got a second"):
        grad.sum().backward()


def test_registration(impl):
    _, device = impl
    query, key = features(6, 7, D=5, device=device)
    scale = torch.tensor(8.0, device=device, requires_grad=True)
    target = torch.tensor([3, 3, -100, 0, 6, 1], device=device)
    mask = torch.tensor([True] * 6 + [False], device=device)
    op = torch.ops.m2ae_kernels.info_nce_loss.default
    pairing = (target, 0, -100, mask[1:], mask)
    opcheck(op, (query, key, scale, *pairing, True, 1e-12, True))
    permuted = [t.detach().mT.contiguous().mT.requires_grad_() for t in (query, key)]
    opcheck(op, (*permuted, scale, None, 1, -100, None, None, False, 1e-12, False))
    opcheck(op, (query[:0], key, scale, None, 1, -100, None, None, True, 1e-12, True))
    backward = torch.ops.m2ae_kernels.info_nce_loss_backward.default
    query, key, scale, *permuted = (t.detach() for t in (query, key, scale, *permuted))
    *losses, _, _, _, _, _ = outputs = op(query, key, scale, *pairing, True, 1e-12, True)
    saved = (query, key, scale, target, mask[1:], mask, *outputs[2:])
    opcheck(backward, (*losses, *saved, 0, -100, 1e-12, True, [True, True, True]))
    outputs = op(*permuted, scale, None, 1, -100, None, None, False, 1e-12, False)
    saved = (*permuted, scale, None, None, None, *outputs[2:])
    opcheck(backward, (*outputs[:2], *saved, 1, -100, 1e-12, False, [False, True, False]))


def test_compiles_to_one_graph(impl):
    op, device = impl
    query, key = features(6, 7, D=5, device=device)
    scale = torch.tensor(8.0, device=device, requires_grad=True)
    target = torch.tensor([3, 3, -100, 0, 6, 1], device=device)
    mask = torch.tensor([True] * 6 + [False], device=device)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for given in ({}, {"target": target, "key_mask": mask, "normalize": True, "logit_bias": 1.0}):
        expected, actual = op(query, key, scale, **given), compiled(query, key, scale, **given)
        assert torch.equal(expected, actual)
        inputs = (query, key, scale)
        grads = torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs)
        assert all(map(torch.equal, *grads))
    more = features(11, 13, D=5, device=device)
    assert torch.equal(compiled(*more, 3.0), op(*more, 3.0))
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(compiled(query, key, scale), op(query, key, scale))


@pytest.mark.parametrize("wrong", [-1, 5])
def test_target_out_of_range_on_the_cpu(wrong):
    query, key = features(3, 5, D=4)
    for op in (info_nce_loss, reference.info_nce_loss):
        with pytest.raises(ValueError, match=rf"in \[0, M = 5\) or ignore_index, got {wrong}"):
            op(query, key, target=torch.tensor([0, wrong, -100]))


@pytest.mark.parametrize(
    "given,error",
    [
        ({"query": (4,)}, "expected query [N, D], got [4]"),
        ({"key": (5, 2)}, "expected key [M, D = 3], got [5, 2]"),
        ({"key": (3, 3)}, "expected target_offset + N <= M = 3 without a target, got 0 + 4"),
        ({"target_offset": 2}, "expected target_offset + N <= M = 5 without a target, got 2 + 4"),
        ({"target_offset": -1}, "target_offset + N <= M = 5 without a target, got -1 + 4"),
        ({"target": torch.zeros(5).long()}, "expected target [N = 4], got [5]"),
        ({"query_mask": torch.ones(5).bool()}, "expected query_mask [N = 4], got [5]"),
        ({"key_mask": torch.ones(4).bool()}, "expected key_mask [M = 5], got [4]"),
        ({"eps": 0.0}, "expected eps > 0, got 0.0"),
        ({"reduction": "max"}, 'expected reduction "mean", "sum" or "none", got \'max\''),
        ({"logit_scale": (2,)}, "expected one number as logit_scale, got shape [2]"),
        ({"logit_bias": (2,)}, "expected one number as logit_bias, got shape [2]"),
    ],
)
def test_rejects_values(given, error):
    given = {"query": (4, 3), "key": (5, 3)} | given
    given = {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in given.items()}
    for op in (info_nce_loss, reference.info_nce_loss):
        with pytest.raises(ValueError, match=rf"^info_nce_loss: .*{re.escape(error)}"):
            op(**given)


@pytest.mark.parametrize(
    "given,error",
    [
        ({"query": torch.zeros(4, 3).int()}, "expected query in float32, bfloat16, float16"),
        ({"key": torch.zeros(5, 3).int()}, "expected key in float32, bfloat16, float16"),
        ({"key": torch.zeros(5, 3).half()}, "key in the dtype of query, torch.float32, got torch."),
        ({"target": torch.zeros(4).int()}, "expected target in int64, got torch.int32"),
        ({"query_mask": torch.ones(4)}, "expected query_mask in bool, got torch.float32"),
        ({"key_mask": torch.ones(5)}, "expected key_mask in bool, got torch.float32"),
        ({"logit_scale": torch.tensor(1)}, "expected logit_scale in float32, bfloat16, float16, f"),
        (
            {"key": torch.zeros(5, 3, device="meta")},
            "expected key on the device of query, cpu, got meta",
        ),
        (
            {"logit_scale": torch.ones((), device="meta")},
            "expected logit_scale on the device of query, cpu, got meta",
        ),
        (
            {"key_mask": torch.ones(5, device="meta").bool()},
            "expected key_mask on the device of query, cpu, got meta",
        ),
    ],
)
def test_rejects_types(given, error):
    given = {"query": torch.zeros(4, 3), "key": torch.zeros(5, 3)} | given
    for op in (info_nce_loss, reference.info_nce_loss):
        with pytest.raises(TypeError, match=rf"^info_nce_loss: .*{re.escape(error)}"):
            op(**given)


def test_float64_is_for_the_reference():
    x = torch.zeros(2, 3, dtype=torch.float64)
    cure = r"got torch.float64; m2ae_kernels.reference.info_nce_loss takes float64"
    for query, key in ((x, x.float()), (x.float(), x)):
        with pytest.raises(TypeError, match=cure):
            info_nce_loss(query, key)


@pytest.mark.parametrize(
    "given,error",
    [
        ({"query_ids": torch.zeros(4).long()}, "query_ids=Tensor[4]"),
        ({"key_ids": torch.zeros(5).long()}, "key_ids=Tensor[5]"),
        ({"same_id": "positive"}, "same_id='positive'"),
        ({"exclude_self": True}, "exclude_self=True"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1"),
        ({"weight": torch.ones(4)}, "weight=Tensor[4]"),
        ({"return_metrics": True}, "return_metrics=True"),
        ({"allow_tf32": False}, "allow_tf32=False"),
        ({"max_workspace_bytes": 1024}, "max_workspace_bytes=1024"),
    ],
)
def test_not_supported_yet(given, error):
    for op in (info_nce_loss, reference.info_nce_loss):
        message = re.escape(f"info_nce_loss: {error} is not supported yet")
        with pytest.raises(NotImplementedError, match=message):
            op(torch.zeros(4, 3), torch.zeros(5, 3), **given)
