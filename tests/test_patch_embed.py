"""patch_embed: values, gradients, dtypes and refusals, against conv2d in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.testing import assert_close

from m2ae_kernels import reference

FLOATING = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MEAN, STD = (0.48, 0.46, 0.41, 0.5), (0.27, 0.26, 0.28, 0.25)
# (B, C, H, W, kh, kw, D): the usual kind, an audio spectrogram, one patch of an odd size, a patch
# that is no square and divides nothing else, no image at all
SHAPES = [
    (2, 3, 32, 48, 16, 16, 24),
    (3, 1, 16, 40, 4, 8, 5),
    (1, 4, 14, 14, 14, 14, 8),
    (2, 3, 9, 10, 3, 2, 7),
    (0, 3, 32, 32, 16, 16, 8),
]


def images(B, C, H, W, dtype=torch.float32, device="cpu"):
    if dtype == torch.uint8:
        return torch.randint(0, 256, (B, C, H, W), dtype=dtype, device=device)
    return torch.rand(B, C, H, W, device=device).to(dtype)


def parameters(B, C, H, W, kh, kw, D, P=0, device="cpu"):
    """Weight, bias, pos_embed and prefix_tokens, so that tokens are of order 1."""
    N = (H // kh) * (W // kw)
    weight = torch.randn(D, C, kh, kw, device=device) / (C * kh * kw) ** 0.5
    return (
        weight.requires_grad_(),
        torch.randn(D, device=device, requires_grad=True),
        torch.randn(P + N, D, device=device, requires_grad=True),
        torch.randn(P, D, device=device, requires_grad=True),
    )


def subsets(rows, N, K, device="cpu"):
    return torch.stack([torch.randperm(N)[:K] for _ in range(rows)]).to(device)


def exact(x, weight, bias=None, pos=None, keep=None, prefix=None, mean=None, std=None, scale=None):
    """conv2d of the normalized image, in float64; then positions, kept patches, prefix tokens."""
    if scale is None:
        scale = 1 / 255 if x.dtype == torch.uint8 else 1.0
    x = x.double() * scale
    C, D = x.shape[1], weight.shape[0]
    if mean is not None:
        x = x - torch.tensor(mean[:C], dtype=x.dtype, device=x.device)[:, None, None]
    if std is not None:
        x = x / torch.tensor(std[:C], dtype=x.dtype, device=x.device)[:, None, None]
    bias = None if bias is None else bias.double()
    y = F.conv2d(x, weight.double(), bias, stride=weight.shape[2:]).flatten(2).mT  # [B, N, D]
    P = 0 if prefix is None else prefix.shape[-2]
    if pos is not None:
        pos = pos.double().view(-1, D)
        slots, pos = pos.split([pos.shape[0] - y.shape[1], y.shape[1]])
        y = y + pos
    if keep is not None:
        masks = keep if isinstance(keep, list) else [keep]
        y = torch.cat([y.gather(1, mask.long()[..., None].expand(-1, -1, D)) for mask in masks])
    if P:
        prefix = prefix.double().view(P, D)
        prefix = prefix + slots if pos is not None and len(slots) else prefix
        y = torch.cat([prefix.expand(y.shape[0], P, D), y], dim=1)
    return y


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("B,C,H,W,kh,kw,D", SHAPES)
def test_matches_conv2d(B, C, H, W, kh, kw, D, dtype, impl):
    op, device = impl
    x = images(B, C, H, W, dtype, device)
    weight, bias, pos, prefix = parameters(B, C, H, W, kh, kw, D, P=2, device=device)
    given = {"mean": MEAN[:C], "std": STD[:C]}
    y = op(x, weight, bias, pos, None, prefix, **given)
    expected = exact(x, weight, bias, pos, None, prefix, MEAN, STD)
    assert y.is_contiguous()
    assert_close(y, expected.float())
    grad = torch.randn_like(y)
    inputs = (weight, bias, pos, prefix)
    for actual, wanted in zip(
        torch.autograd.grad(y, inputs, grad),
        torch.autograd.grad(expected, inputs, grad.double()),
        strict=True,
    ):
        assert_close(actual, wanted)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("K", [1, 5, 12])
def test_kept_patches(K, index, impl):
    op, device = impl
    shape = (2, 3, 24, 32, 8, 8)
    x = images(*shape[:4], device=device).requires_grad_()
    inputs = (x, *parameters(*shape, D=6, P=1, device=device))
    x, weight, bias, pos, prefix = inputs
    keep = [subsets(2, 12, K, device).to(index) for _ in range(3)]
    keep[1][:, 0] = keep[1][:, -1]  # a patch may be kept twice
    given = {"mean": MEAN[:3], "std": STD[:3], "scale": 0.5}
    y = op(x, weight, bias, pos, keep, prefix, **given)
    expected = exact(x, weight, bias, pos, keep, prefix, MEAN, STD, 0.5)  # mask-major, as I-JEPA's
    assert_close(y, expected.float())
    assert torch.equal(y, op(x, weight, bias, pos, torch.cat(keep), prefix, **given))
    grad = torch.randn_like(y)
    for actual, wanted in zip(
        torch.autograd.grad(y, inputs, grad),
        torch.autograd.grad(expected, inputs, grad.double()),
        strict=True,
    ):
        assert_close(actual, wanted)


def test_all_patches_kept_is_unmasked_bitwise(impl):
    op, device = impl
    x = images(2, 3, 24, 32, torch.uint8, device)
    weight, bias, pos, prefix = parameters(2, 3, 24, 32, 8, 8, 6, P=1, device=device)
    keep = torch.arange(12, device=device).expand(2, 12)
    unmasked = op(x, weight, bias, pos, None, prefix, mean=MEAN[:3])
    assert torch.equal(op(x, weight, bias, pos, keep, prefix, mean=MEAN[:3]), unmasked)


def test_no_patch_kept(impl):
    op, device = impl
    x = images(2, 3, 16, 16, device=device).requires_grad_()
    weight, bias, pos, prefix = parameters(2, 3, 16, 16, 8, 8, 6, P=1, device=device)
    keep = torch.empty(4, 0, dtype=torch.int64, device=device)
    y = op(x, weight, bias, pos, keep, prefix)
    assert_close(y, (prefix + pos[:1]).expand(4, 1, 6))
    y.sum().backward()
    assert not weight.grad.any()
    assert not bias.grad.any()
    assert not x.grad.any()
    assert pos.grad.tolist() == [[4.0] * 6] + [[0.0] * 6] * 4
    assert op(x, weight, keep_idx=keep).shape == (4, 0, 6)


def test_patch_that_is_not_kept_is_never_read(impl):
    op, device = impl
    x = images(2, 3, 16, 32, device=device)
    clean = x.clone().requires_grad_()
    x[:, :, 8:, 8:16] = torch.nan  # patch 5
    x[0, 1, :8, 16:24] = -torch.inf  # patch 2
    x.requires_grad_()
    keep = torch.tensor([[0, 7, 3], [6, 1, 4]], device=device)
    weight, bias, pos, _ = parameters(2, 3, 16, 32, 8, 8, 6, device=device)
    for function in (op, reference.patch_embed):  # whose backward is PyTorch's
        results = []
        for image in (x, clean):
            y = function(image, weight, bias, pos, keep)
            grads = torch.autograd.grad(y.square().sum(), (image, weight, bias, pos))
            results.append((y, *grads))
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)
        dx = results[0][1]
        assert not dx[:, :, 8:, 8:16].any()
        assert not dx[0, 1, :8, 16:24].any()


def test_bool_masks_are_indices(impl):
    op, device = impl
    x = images(2, 3, 16, 32, device=device)
    weight, bias, pos, _ = parameters(2, 3, 16, 32, 8, 8, 6, device=device)
    keep = torch.tensor([[0, 3, 7], [1, 4, 6]], device=device)
    mask = torch.zeros(2, 8, dtype=torch.bool, device=device).scatter(1, keep, True)
    expected = op(x, weight, bias, pos, keep)
    assert torch.equal(op(x, weight, bias, pos, mask), expected)
    two = op(x, weight, bias, pos, [mask, keep])
    assert torch.equal(two, op(x, weight, bias, pos, [keep, keep]))


def test_forms_of_positions(impl):
    op, device = impl
    x = images(2, 3, 16, 32, device=device)
    weight, bias, pos, prefix = parameters(2, 3, 16, 32, 8, 8, 6, P=2, device=device)
    of_patches = pos[2:]
    expected = exact(x, weight, bias, of_patches, None, prefix).float()
    assert_close(op(x, weight, bias, of_patches, None, prefix), expected)
    assert_close(op(x, weight, bias, of_patches[None], None, prefix[None]), expected)
    expected = exact(x, weight, bias, pos, None, prefix).float()
    assert_close(op(x, weight, bias, pos[None], None, prefix), expected)
    assert_close(op(x, weight, None, None, None, prefix), exact(x, weight, prefix=prefix).float())


def test_uint8_is_scaled_by_255(impl):
    op, device = impl
    x = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 16, 16)
    one = torch.ones(1, 1, 1, 1, device=device)
    pixels = torch.arange(256, dtype=torch.float64, device=device).view(1, 256, 1)
    assert_close(op(x, one), (pixels / 255).float())
    assert_close(op(x, one, scale=2.0), (pixels * 2).float())
    assert_close(op(x.float(), one), pixels.float())


def test_mean_and_std_as_numbers_or_tensors(impl):
    op, device = impl
    x = images(2, 3, 8, 8, torch.uint8, device)
    weight = parameters(2, 3, 8, 8, 4, 4, 6, device=device)[0]
    mean = torch.tensor(MEAN[:3], device=device, requires_grad=True)
    std = torch.tensor(STD[:3], device=device)
    y = op(x, weight, mean=mean, std=std)
    assert torch.equal(y, op(x, weight, mean=MEAN[:3], std=STD[:3]))
    y.sum().backward()
    assert mean.grad is None  # a constant
    assert_close(op(x, weight, std=STD[:3]), exact(x, weight, std=STD).float())
    # a channel that hardly varies: (x - mean) / std of order 1e3, as are the tokens
    tiny = (1e-3, 1e-4, 1e-3)
    assert_close(op(x, weight, std=tiny), exact(x, weight, std=tiny).float())


@pytest.mark.parametrize("of_image", [torch.uint8, *FLOATING], ids=str)
@pytest.mark.parametrize("of_weight", FLOATING, ids=str)
def test_dtypes(of_weight, of_image, impl):
    op, device = impl
    # Integers that all of the dtypes hold, whose products float32 adds exactly.
    x = torch.randint(0, 200, (2, 3, 8, 8), device=device).to(of_image)
    weight = torch.randint(-8, 8, (5, 3, 4, 4), device=device).to(of_weight) / 1024
    y = op(x, weight, scale=1.0)
    assert y.dtype == of_weight
    assert torch.equal(y, exact(x, weight, scale=1.0).to(of_weight))
    grad = torch.randint(-8, 8, y.shape, device=device).to(of_weight)
    weight.requires_grad_()
    x.requires_grad_(x.is_floating_point())
    inputs = (weight, x) if x.requires_grad else (weight,)
    for actual, wanted in zip(
        torch.autograd.grad(op(x, weight, scale=1.0), inputs, grad),
        torch.autograd.grad(exact(x, weight, scale=1.0), inputs, grad.double()),
        strict=True,
    ):
        assert_close(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_precision_of_halves(dtype, impl):
    op, device = impl
    shape = (2, 3, 32, 32, 16, 16, 24)
    x = images(*shape[:4], torch.uint8, device)
    weight, bias, pos, _ = (t.detach() for t in parameters(*shape, device=device))
    y = op(x, weight, bias, pos, mean=MEAN[:3], std=STD[:3], out_dtype=dtype)
    expected = exact(x, weight, bias, pos, None, None, MEAN, STD)
    # u is one rounding: of x and of w in each product, of the product's sum with the bias, of the
    # bias, and of the token; and float32's own errors are far below 1e-5.
    u = torch.finfo(dtype).eps / 2
    pixels = (x.double() / 255 - torch.tensor(MEAN[:3], device=device).view(3, 1, 1)).abs()
    size = exact(pixels, weight.abs(), std=STD)
    bound = 2 * u * size + u * (bias.abs() + (expected - pos).abs() + expected.abs()) + 1e-5
    assert y.dtype == dtype
    assert ((y.double() - expected).abs() <= bound).all()


def test_dtype_of_the_result(impl):
    op, device = impl
    x = images(2, 3, 8, 8, torch.uint8, device)
    weight, bias, pos, prefix = parameters(2, 3, 8, 8, 4, 4, 6, P=1, device=device)
    half = (weight.bfloat16(), bias.bfloat16())
    assert op(x, *half, pos, None, prefix).dtype == torch.bfloat16  # float32 positions stay out
    assert op(x, *half, pos, None, prefix, out_dtype=torch.float32).dtype == torch.float32
    assert op(x, weight, bias, pos.double()[1:]).dtype == torch.float32
    expected = op(x, weight, bias, pos, None, prefix, out_dtype=torch.bfloat16)
    assert torch.equal(op(x, *half, pos, None, prefix), expected)  # the product is rounded alike
    with torch.autocast(device, torch.bfloat16):
        y = op(x, weight, bias, pos, None, prefix)
        assert torch.equal(y, expected)
        exactly = op(x, weight, bias, pos, None, prefix, out_dtype=torch.float32)
        assert op(x, weight.double(), bias.double()).dtype == torch.float64
        y.float().sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == pos.grad.dtype == torch.float32
    assert torch.equal(exactly, op(x, weight, bias, pos, None, prefix))


def test_strides(impl):
    op, device = impl
    weight, bias, pos, _ = parameters(4, 3, 16, 32, 8, 8, 6, device=device)
    keep = subsets(4, 8, 3, device)
    large = images(5, 3, 19, 37, torch.uint8, device)
    views = {
        "channels last": images(4, 3, 16, 32, device=device).to(memory_format=torch.channels_last),
        "HWC": images(4, 16, 32, 3, torch.uint8, device).permute(0, 3, 1, 2),
        "one image": images(1, 3, 16, 32, torch.uint8, device).expand(4, -1, -1, -1),
        "crop": large[1:, :, 2:18, 5:37],
    }
    for name, x in views.items():
        expected = op(x.contiguous(), weight, bias, pos, keep)
        assert torch.equal(op(x, weight, bias, pos, keep), expected), name
    x = views["crop"]
    expected = op(x, weight, bias, pos, keep)
    assert torch.equal(op(x, weight, bias, pos, keep.mT.contiguous().mT), expected)
    turned = weight.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    assert torch.equal(op(x, turned, bias, pos.mT.contiguous().mT, keep), expected)


@pytest.mark.parametrize("wanted", range(5))
def test_gradient_of_one_input_alone(wanted, impl):
    op, device = impl
    inputs = [images(2, 3, 16, 16, device=device), *parameters(2, 3, 16, 16, 8, 8, 6, P=1)]
    inputs = [t.detach().to(device).requires_grad_() for t in inputs]
    keep = subsets(4, 4, 3, device)

    def tokens():
        x, weight, bias, pos, prefix = inputs
        return op(x, weight, bias, pos, keep, prefix, mean=MEAN[:3], std=STD[:3])

    expected = torch.autograd.grad(tokens().square().sum(), inputs)[wanted]
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(i == wanted)
    tokens().square().sum().backward()
    assert torch.equal(inputs[wanted].grad, expected)
    assert all(tensor.grad is None for i, tensor in enumerate(inputs) if i != wanted)


def test_gradients_repeat_bitwise(impl):
    op, device = impl
    x = images(16, 3, 32, 32, device=device).requires_grad_()
    weight, bias, pos, _ = parameters(16, 3, 32, 32, 4, 4, 16, device=device)
    keep = torch.randint(0, 64, (32, 48), device=device)  # each patch many times
    grad = torch.randn(32, 48, 16, device=device)
    runs = [
        torch.autograd.grad(op(x, weight, bias, pos, keep), (x, weight, bias, pos), grad)
        for _ in range(5)
    ]
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


def test_reference_gradients():
    x = torch.rand(1, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    pos = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    prefix = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[3, 1, 3]])

    def tokens(x, weight, bias, pos, prefix):
        return reference.patch_embed(
            x, weight, bias, pos, keep, prefix, mean=(0.3, 0.4), std=(0.2, 0.5)
        )

    assert gradcheck(tokens, (x, weight, bias, pos, prefix))
    assert gradgradcheck(tokens, (x, weight, bias, pos, prefix))


def test_second_derivative_is_refused(impl):
    op, device = impl
    weight = parameters(2, 3, 8, 8, 4, 4, 6, device=device)[0]
    y = op(images(2, 3, 8, 8, device=device), weight)
    (grad,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"patch_embed: expected one backward, got a second"):
        grad.sum().backward()


def test_registration(impl):
    _, device = impl
    x = images(2, 3, 8, 16, device=device).requires_grad_()
    weight, bias, pos, prefix = parameters(2, 3, 8, 16, 4, 4, 6, P=1, device=device)
    keep = subsets(4, 8, 3, device)
    mean, std = torch.tensor(MEAN[:3], device=device), torch.tensor(STD[:3], device=device)
    op = torch.ops.m2ae_kernels.patch_embed.default
    dtype = torch.float32
    opcheck(op, (x, weight, bias, pos, keep, prefix, mean, std, 1.0, dtype))
    permuted = x.detach().to(memory_format=torch.channels_last)
    turned = keep.mT.contiguous().mT
    opcheck(op, (permuted, weight, None, None, turned, None, None, None, 1.0, torch.bfloat16))
    x, weight, pos, prefix = (t.detach() for t in (x, weight, pos, prefix))
    backward = torch.ops.m2ae_kernels.patch_embed_backward.default
    grad = torch.randn(4, 4, 6, device=device)
    opcheck(backward, (grad, x, weight, pos, keep, prefix, mean, std, 1.0, [True] * 5))
    grad = grad.mT.contiguous().mT[:2].expand(2, 4, 6)
    few = [False, True, False, False, False]
    opcheck(backward, (grad, permuted, weight, None, keep[:2], prefix, None, None, 1.0, few))


def test_compiles_to_one_graph(impl):
    op, device = impl
    x = images(2, 3, 8, 16, torch.uint8, device)
    inputs = parameters(2, 3, 8, 16, 4, 4, 6, P=1, device=device)
    weight, bias, pos, prefix = inputs
    keep = [subsets(2, 8, 3, device) for _ in range(2)]

    def tokens(x, keep):
        return op(x, weight, bias, pos, keep, prefix, mean=MEAN[:3], std=STD[:3])

    # Inductor would compile what is around the op; the graph is what the op decides.
    compiled = torch.compile(tokens, fullgraph=True, backend="aot_eager")
    expected = tokens(x, keep)
    assert torch.equal(compiled(x, keep), expected)
    grads = torch.autograd.grad(compiled(x, keep).square().sum(), inputs)
    assert all(map(torch.equal, grads, torch.autograd.grad(expected.square().sum(), inputs)))
    fewer = [mask[:, :2] for mask in keep]  # and dynamic shapes
    assert torch.equal(compiled(x, fewer), tokens(x, fewer))
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(compiled(x, keep), tokens(x, keep))
