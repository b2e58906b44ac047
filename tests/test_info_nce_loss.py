"""info_nce_loss: values, gradients, masks and refusals of every kernel, against float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.testing import assert_close

from m2ae_kernels import reference

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
