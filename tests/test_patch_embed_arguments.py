"""patch_embed refuses what it cannot mean, by name."""

import re

import pytest
import torch
from test_patch_embed import images

from m2ae_kernels import patch_embed, reference


@pytest.mark.parametrize("index", [-1, 8])
def test_index_out_of_range_on_the_cpu(index):
    x, weight = images(2, 3, 8, 16), torch.randn(6, 3, 4, 4)
    keep = torch.tensor([[0, 1], [index, 3]])
    for op in (patch_embed, reference.patch_embed):
        with pytest.raises(ValueError, match=rf"patch_embed: .* in \[0, N = 8\), got {index}"):
            op(x, weight, keep_idx=keep)


@pytest.mark.parametrize(
    "given,error",
    [
        ({"x": (2, 3, 8)}, "expected x [B, C, H, W], got [2, 3, 8]"),
        ({"weight": (6, 4, 4, 4)}, "expected weight [D, C = 3, kh, kw], got [6, 4, 4, 4]"),
        ({"weight": (6, 48)}, "expected weight [D, C = 3, kh, kw], got [6, 48]"),
        ({"x": (2, 3, 9, 14)}, "multiples of the patch, kh x kw = 4 x 4, got 9 x 14; resize"),
        ({"x": (2, 3, 2, 2)}, "multiples of the patch, kh x kw = 4 x 4, got 2 x 2; resize"),
        ({"bias": (5,)}, "expected bias [D = 6], got [5]"),
        ({"pos_embed": (7, 6)}, "of N = 8 patches, or of P + N = 8 with the prefix tokens, got 7"),
        ({"pos_embed": (2, 8, 6)}, "expected pos_embed [N, D] or [1, N, D] with D = 6, got [2, 8"),
        ({"prefix_tokens": (6,)}, "prefix_tokens [P, D] or [1, P, D] with D = 6, got [6]"),
        ({"mean": (4,)}, "expected mean of C = 3 channels, got shape [4]"),
        ({"std": [0.5]}, "expected std of C = 3 channels, got 1 numbers"),
        ({"keep_idx": torch.zeros(3, 2).long()}, "[R, K], R a multiple of B = 2, got [3, 2]"),
        ({"keep_idx": torch.zeros(2).long()}, "[R, K], R a multiple of B = 2, got [2]"),
        ({"keep_idx": []}, "as a list of [B, K], B = 2, one K for all, got []"),
        (
            {"keep_idx": [torch.zeros(2, 3).long(), torch.zeros(2, 4).long()]},
            "as a list of [B, K], B = 2, one K for all, got [[2, 3], [2, 4]]",
        ),
        (
            {"keep_idx": torch.ones(2, 7).bool()},
            "expected a bool keep_idx [B, N] = [2, 8], got [2, 7]",
        ),
        (
            {"keep_idx": torch.ones(2, 8).triu().bool()},
            "with K times True in each row, got 7 to 8; drop patches until",
        ),
    ],
)
def test_rejects_shapes(given, error):
    given = {"x": (2, 3, 8, 16), "weight": (6, 3, 4, 4)} | given
    given = {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in given.items()}
    for op in (patch_embed, reference.patch_embed):
        with pytest.raises(ValueError, match=rf"^patch_embed: .*{re.escape(error)}"):
            op(**given)


@pytest.mark.parametrize(
    "given,error",
    [
        ({"x": torch.zeros(2, 3, 8, 8).int()}, "expected x in uint8, float32, bfloat16, float16, "),
        ({"weight": torch.zeros(6, 3, 4, 4).int()}, "expected weight in float32, bfloat16, float"),
        ({"bias": torch.zeros(6).double()}, "expected bias in float32, got torch.float64"),
        ({"pos_embed": torch.zeros(4, 6).int()}, "expected pos_embed in float32, bfloat16, float"),
        ({"keep_idx": torch.zeros(2, 3)}, "expected keep_idx in int32, int64, bool, got torch.fl"),
        ({"prefix_tokens": torch.zeros(1, 6).int()}, "expected prefix_tokens in float32, bfloat1"),
        ({"out_dtype": torch.int32}, "expected a floating out_dtype, got torch.int32"),
        (
            {"weight": torch.zeros(6, 3, 4, 4, device="meta")},
            "expected weight on the device of x, cpu, got meta",
        ),
        (
            {"keep_idx": torch.zeros(2, 3, device="meta").long()},
            "expected keep_idx on the device of x, cpu, got meta",
        ),
    ],
)
def test_rejects_types(given, error):
    given = {"x": torch.zeros(2, 3, 8, 8), "weight": torch.zeros(6, 3, 4, 4)} | given
    for op in (patch_embed, reference.patch_embed):
        with pytest.raises(TypeError, match=re.escape(f"patch_embed: {error}")):
            op(**given)


@pytest.mark.parametrize(
    "given,error",
    [
        ({"x": torch.zeros(2, 3, 4, 8, 8)}, "x=[2, 3, 4, 8, 8], which is video,"),
        ({"patch_size": (4, 4)}, "patch_size=(4, 4)"),
        ({"data_format": "channels_last"}, "data_format='channels_last'"),
        ({"pad": True}, "pad=True"),
        ({"image_idx": torch.zeros(5).long()}, "image_idx=Tensor[5]"),
    ],
)
def test_not_supported_yet(given, error):
    given = {"x": torch.zeros(2, 3, 8, 8), "weight": torch.zeros(6, 3, 4, 4)} | given
    for op in (patch_embed, reference.patch_embed):
        message = re.escape(f"patch_embed: {error} is not supported yet")
        with pytest.raises(NotImplementedError, match=message):
            op(**given)
