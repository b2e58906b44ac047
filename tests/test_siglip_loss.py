"""siglip_loss: values, gradients, reductions and registration of every kernel, against float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from interpreter import interpret_only, interpreted
from open_clip_loss import open_clip_loss
from torch.testing import assert_close

EPS = torch.finfo(torch.float32).eps
# (N, M, D): one pair, two, more texts than images, odd ones, more than one block of 64 and of 256
SHAPES = [(1, 1, 1), (2, 2, 8), (3, 7, 5), (17, 17, 17), (64, 65, 96), (129, 255, 40)]
SHAPES += [(15, 300, 200), (257, 257, 8)]


def features(*sizes, D, device="cpu", dtype=torch.float32):
    """Rows of norm about 1."""
    return [
        (torch.randn(N, D, device=device) / max(D, 1) ** 0.5).to(dtype).requires_grad_()
        for N in sizes
    ]


def numbers(*values, device="cpu", dtype=torch.float32):
    return [torch.tensor(v, device=device, dtype=dtype, requires_grad=True) for v in values]


def exact(
    image_features,
    text_features,
    scale,
    bias,
    *,
    target=None,
    target_offset=0,
    ignore_index=-100,
    normalize=False,
    eps=1e-12,
    query_mask=None,
    key_mask=None,
    query_ids=None,
    key_ids=None,
    same_id="negative",
    weight=None,
    reduction="mean",
):
    """Binary cross entropy, by torch in float64, of the entries of the present rows."""
    (N, M), device = (len(image_features), len(text_features)), image_features.device
    everybody = torch.ones(max(N, M), dtype=torch.bool, device=device)
    query_mask = everybody[:N] if query_mask is None else query_mask
    key_mask = everybody[:M] if key_mask is None else key_mask
    x, y = image_features.double()[query_mask], text_features.double()[key_mask]
    if normalize:
        x, y = F.normalize(x, eps=eps), F.normalize(y, eps=eps)
    scale, bias = (torch.as_tensor(number).double() for number in (scale, bias))
    logits = scale * x @ y.mT + bias
    if target is None:
        target = torch.arange(N, device=device) + target_offset
    is_pair = torch.zeros(N, M, dtype=torch.bool, device=device)
    for i, j in enumerate(target.tolist()):
        if j != ignore_index:
            is_pair[i, j] = True
    counts = torch.ones_like(is_pair)
    if same_id != "negative":
        same = query_ids[:, None] == key_ids
        counts = ~same | is_pair if same_id == "ignore" else counts
        is_pair = same | is_pair if same_id == "positive" else is_pair
    is_pair, counts = (z[query_mask][:, key_mask] for z in (is_pair, counts))
    entries = torch.where(
        is_pair, F.softplus(-logits, threshold=40), F.softplus(logits, threshold=40)
    )
    entries = torch.where(counts, entries, 0)
    weight = torch.ones(N, device=device) if weight is None else weight
    present = weight.double()[query_mask]
    losses = present * entries.sum(1)
    if reduction == "none":
        return torch.zeros(N, dtype=torch.float64, device=device).masked_scatter(query_mask, losses)
    total = present.sum()
    return losses.sum() / (total if reduction == "mean" and total != 0 else 1)


def assert_matches(op, *inputs, **given):
    """Loss and gradients; those of 16-bit features are the rounded ones of the same features."""
    loss, expected = op(*inputs, **given), exact(*inputs, **given)
    assert loss.dtype == torch.float32
    assert_close(loss, expected.float())
    differentiable = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    upstream = torch.randn_like(loss)
    grads = torch.autograd.grad(loss, differentiable, upstream)
    wanted = torch.autograd.grad(expected, differentiable, upstream.double())
    for grad, right in zip(grads, wanted, strict=True):
        # An element may be what is left of terms that add up to the largest. A sum of n terms,
        # one after the other, is off by some sqrt(n) roundings; of 16-bit features each term is,
        # too, as the derivative by its logit is rounded for the product.
        last_bit = torch.finfo(grad.dtype).eps
        near = max(2 * max(max(map(len, inputs[:2])), 64) ** 0.5 * EPS, last_bit)
        largest = right.abs().max().item() if right.numel() else 0.0
        rtol = max(1.3e-6, last_bit)
        at_least = 1e-6 if grad.dim() else 1e-5  # numbers: sums of all entries
        assert_close(grad, right, rtol=rtol, atol=max(at_least, near * largest))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("N,M,D", SHAPES)
def test_matches_binary_cross_entropy(N, M, D, normalize, reduction, impl):
    interpret_only(
        "1-1-1-True-mean", "3-7-5-False-none", "17-17-17-True-sum", "64-65-96-False-mean",
        "129-255-40-True-none",
    )  # fmt: skip
    op, device = impl
    inputs = *features(N, M, D=D, device=device), *numbers(10.0, -3.0, device=device)
    given = {"normalize": normalize, "reduction": reduction}
    assert_matches(op, *inputs, **given)
    weight = torch.rand(N, device=device) + 0.1
    assert_matches(op, *inputs[:2], 5.0, -1.0, target_offset=M - N, weight=weight, **given)


# N, M and D around 16, 64, 128 and 256, and larger than one tile in one direction alone
RAGGED = [(16, 63, 384), (1, 1000, 768), (127, 128, 1000), (2, 4097, 3), (1025, 15, 31)]
RAGGED += [(65, 66, 1152), (255, 256, 33), (513, 520, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N,M,D", RAGGED)
def test_ragged(N, M, D, dtype, impl):
    interpret_only(
        "16-63-384-torch.float16", "255-256-33-torch.bfloat16", "1025-15-31-torch.float32"
    )
    op, device = impl
    inputs = *features(N, M, D=D, device=device, dtype=dtype), *numbers(10.0, -6.0, device=device)
    target = torch.randint(-1, M, (N,), device=device)
    given = {"target": target, "ignore_index": -1}
    assert_matches(op, *inputs, normalize=True, **given)
    assert_matches(op, *inputs, reduction="none", query_mask=target % 7 != 3, **given)


@pytest.mark.parametrize("N,D", [(1, 3), (33, 16)])
def test_equals_open_clip(N, D, impl):
    op, device = impl
    inputs = *features(N, N, D=D, device=device), *numbers(10.0, -10.0, device=device)
    theirs = open_clip_loss().SigLipLoss()
    loss, expected = op(*inputs), theirs(*inputs)
    assert_close(loss, expected)
    grads = (torch.autograd.grad(z, inputs) for z in (loss, expected))
    for grad, wanted in zip(*grads, strict=True):
        assert_close(grad, wanted)
    # The texts of another rank: none is a pair of the images here.
    target = torch.full((N,), -100, device=device)
    assert_close(op(*inputs, target=target), theirs._loss(*inputs, negative_only=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("normalize", [True, False])
def test_halves(normalize, reduction, dtype, impl):
    op, device = impl
    inputs = (
        *features(33, 40, D=24, device=device, dtype=dtype),
        *numbers(10.0, -4.0, device=device),
    )
    assert_matches(op, *inputs, normalize=normalize, reduction=reduction)
    numbers_too = *inputs[:2], *numbers(10.0, -4.0, device=device, dtype=dtype)
    assert_matches(op, *numbers_too, normalize=normalize, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_gradients_survive_until_the_upstream_one_comes(dtype, reduction, impl):
    op, device = impl
    images, texts = features(65, 70, D=8, device=device, dtype=dtype)
    given = {"target": torch.full((65,), -100, device=device), "reduction": reduction}
    loss = op(images, texts, 2.0, -12.0, **given)  # sigma of about 1e-5, of a mean 1e-7
    factor = 2.0**16  # as a GradScaler has it
    grads = torch.autograd.grad(loss.sum() * factor, (images, texts))
    exactly = [t.detach().double().requires_grad_() for t in (images, texts)]
    wanted = torch.autograd.grad(exact(*exactly, 2.0, -12.0, **given).sum() * factor, exactly)
    for grad, right in zip(grads, wanted, strict=True):
        near = torch.finfo(dtype).eps * right.abs().max()
        assert_close(grad.double(), right, rtol=torch.finfo(dtype).eps, atol=near.item())


def test_one_pair(impl):
    op, device = impl
    inputs = *features(1, 1, D=8, device=device), *numbers(10.0, -10.0, device=device)
    assert_matches(op, *inputs, normalize=True)
    assert_matches(op, *inputs, target=torch.full((1,), -100, device=device))


def test_nothing_to_learn_from(impl):
    op, device = impl
    inputs = *features(3, 4, D=8, device=device), *numbers(10.0, -10.0, device=device)
    x, y, *rest = inputs
    nobody = torch.zeros(4, dtype=torch.bool, device=device)
    ignored = torch.full((3,), -100, device=device)
    nothing = [
        (x[:0], y, {}),
        (x[:0], y[:0], {"normalize": True}),
        (x, y[:0], {"target": ignored}),
        (x, y, {"query_mask": nobody[:3]}),
        (x, y, {"key_mask": nobody, "normalize": True}),
        (x, y, {"query_mask": nobody[:3], "key_mask": nobody}),
        (x, y, {"weight": torch.zeros(3, device=device)}),
        (
            x,
            y,
            {
                "same_id": "ignore",
                "target": ignored,
                "query_ids": ignored,
                "key_ids": nobody.long() - 100,
            },
        ),
    ]
    for (images, texts, given), reduction in itertools.product(nothing, ("mean", "sum", "none")):
        loss = op(images, texts, *rest, reduction=reduction, **given)
        assert loss.shape == (() if reduction != "none" else (len(images),))
        assert not loss.any()
        assert not any(g.any() for g in torch.autograd.grad(loss.sum(), inputs))


def test_equal_rows(impl):
    op, device = impl
    N = 100 if interpreted() else 1000
    same = torch.full((N, 8), 0.3, device=device)
    softplus = math.log1p(math.exp(0.72 * 3 - 5))
    expected = N * softplus - (0.72 * 3 - 5)
    assert_close(op(same, same, 3.0, -5.0), torch.tensor(expected, device=device))
    no_width = torch.empty(5, 0, device=device)
    expected = 4 * math.log1p(math.exp(-5)) + math.log1p(math.exp(5))
    assert_close(op(no_width, no_width, 3.0, -5.0), torch.tensor(expected, device=device))
    bias = torch.tensor(-5.0, device=device, requires_grad=True)
    assert_matches(
        op, no_width, no_width[:4], 3.0, bias, target=torch.tensor([0, 1, 2, 3, 3], device=device)
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_of_any_norm(reduction, impl):
    op, device = impl
    images, texts = features(6, 6, D=5, device=device)
    with torch.no_grad():
        images[0] = 0
        images[1] *= 1e-20
        images[2] *= 1e20
        texts[3] *= 1e-6
        texts[4] = 0
    given = {"normalize": True, "reduction": reduction}
    loss, expected = op(images, texts, 9.0, -2.0, **given), exact(images, texts, 9.0, -2.0, **given)
    assert_close(loss, expected.float())
    grads = torch.autograd.grad(loss.sum(), (images, texts))
    wanted = torch.autograd.grad(expected.sum(), (images, texts))
    for rows, grad, right in zip((images, texts), grads, wanted, strict=True):
        # A gradient is the larger the smaller its row: compare as if the rows were of norm 1, or
        # of 1e-12, the eps; and atol for what cancels to 0 on the way.
        norm = rows.detach().double().norm(dim=1, keepdim=True).clamp(min=1e-12)
        assert_close(grad.double() * norm, right.double() * norm, rtol=1.3e-6, atol=5e-6)
    assert_matches(op, *features(6, 6, D=5, device=device), 9.0, -2.0, normalize=True, eps=0.9)
    small = (images.detach().bfloat16() * 2.0**-130, texts.detach().bfloat16())  # subnormal
    given = {"normalize": True, "eps": 1e-38}
    assert_close(op(*small, 9.0, -2.0, **given), exact(*small, 9.0, -2.0, **given).float())


def test_reductions(impl):
    op, device = impl
    inputs = *features(5, 7, D=4, device=device), *numbers(8.0, -3.0, device=device)
    target = torch.tensor([6, 2, -100, 2, 0], device=device)
    mask = torch.tensor([True, True, True, False, True], device=device)
    weight = torch.tensor([1.0, -0.5, 2.0, math.nan, 0.0], device=device)
    for given in (
        {},
        {"weight": weight},
        {"weight": weight.double()},
        {"weight": weight.bfloat16()},
    ):
        given |= {"target": target, "query_mask": mask}
        for reduction in ("mean", "sum", "none"):
            assert_matches(op, *inputs, reduction=reduction, **given)
        rows = op(*inputs, reduction="none", **given)
        assert_close(op(*inputs, reduction="sum", **given), rows.sum())
        total = 2.5 if "weight" in given else 4
        assert_close(op(*inputs, **given), rows.sum() / total)


def test_numbers_keep_their_dtype(impl):
    op, device = impl
    rows = features(5, 5, D=4, device=device)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        given = numbers(8.0, -2.5, device=device, dtype=dtype)
        for reduction in ("mean", "none"):
            loss = op(*rows, *given, reduction=reduction)
            assert torch.equal(loss, op(*rows, 8.0, -2.5, reduction=reduction))
            grads = torch.autograd.grad(loss.sum(), given)
            wanted = torch.autograd.grad(exact(*rows, *given, reduction=reduction).sum(), given)
            for grad, right in zip(grads, wanted, strict=True):
                assert grad.dtype == dtype
                assert_close(grad, right)
    one = torch.tensor([[8.0]], device=device, requires_grad=True)
    assert torch.autograd.grad(op(*rows, one, 0.0), one)[0].shape == (1, 1)


def test_strides(impl):
    op, device = impl
    images, texts = (t.detach() for t in features(9, 9, D=6, device=device))
    expected = op(images, texts, 10.0, -3.0)
    wide = torch.cat([torch.zeros(9, 1, device=device), texts], dim=1)[:, 1:]
    transposed = images.mT.contiguous().mT
    for x, y in [(transposed, texts), (images, wide), (transposed, wide)]:
        assert_close(op(x, y, 10.0, -3.0), expected)  # another layout, another order in the product
        leaf = x.requires_grad_()
        (grad,) = torch.autograd.grad(op(leaf, y, 10.0, -3.0), leaf)
        assert_close(grad, torch.autograd.grad(exact(leaf, y, 10.0, -3.0), leaf)[0])
    same = images.detach()[:1].expand(9, -1)
    assert_close(op(same, texts, 10.0, -3.0), op(same.contiguous(), texts, 10.0, -3.0))
    rows = torch.arange(18, device=device) % 9
    expected = op(images, texts, 10.0, -3.0, target=rows[::2].contiguous())
    assert torch.equal(op(images, texts, 10.0, -3.0, target=rows[::2]), expected)
