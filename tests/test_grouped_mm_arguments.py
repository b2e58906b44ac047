"""What grouped_mm refuses, and how it says so."""

import pytest
import torch

from m2ae_kernels import grouped_mm

A, B = torch.zeros(6, 4), torch.zeros(3, 4, 8)
OFFS = torch.tensor([2, 4, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    "given,match",
    [
        ({"mat_a": A[0]}, r"expected mat_a and mat_b 2-D or 3-D, got \[4\] and \[3, 4, 8\]"),
        ({"mat_b": B[0, 0]}, r"expected mat_a and mat_b 2-D or 3-D"),
        ({"mat_b": B[:, :3]}, r"expected mat_b \[..., K = 4, C\], got \[3, 3, 8\]"),
        ({"offs": None}, r"expected offs with a 2-D mat_a or mat_b, got none"),
        ({"offs": OFFS[:2]}, r"expected offs \[E = 3\], E >= 1, got \[2\]"),
        ({"offs": OFFS[None]}, r"expected offs \[E = 3\], E >= 1, got \[1, 3\]"),
        ({"mat_b": B[0], "offs": OFFS[:0]}, r"K = 4, C\]|expected offs \[E\], E >= 1, got \[0\]"),
        ({"mat_a": A[None].expand(3, 6, 4)}, r"expected no offs with 3-D mat_a and mat_b"),
        (
            {"mat_a": A[None], "offs": None},
            r"expected mat_b \[E = 1, K, C\], got \[3, 4, 8\]",
        ),
        ({"bias": torch.zeros(3, 4)}, r"expected bias \[E = 3, C = 8\], got \[3, 4\]"),
        ({"mat_a": A.mT, "mat_b": A, "bias": torch.zeros(3, 4)}, r"expected bias and activation"),
        ({"mat_a": A.mT, "mat_b": A, "activation": "gelu"}, r"expected bias and activation with"),
        ({"activation": "elu"}, r"expected activation in identity, .*, got 'elu'"),
        ({"mat_b": B[..., :7], "activation": "swiglu"}, r"expected an even C for a gated"),
        ({"a_ids": torch.zeros(6, 1, dtype=torch.int32)}, r"expected a_ids \[M\], got \[6, 1\]"),
        (
            {"mat_a": A.mT, "mat_b": A, "a_ids": torch.zeros(6, dtype=torch.int32)},
            r"expected a_ids with mat_a \[M, K\] and mat_b \[E, K, C\] only",
        ),
    ],
)
def test_values(given, match):
    with pytest.raises(ValueError, match=f"grouped_mm: {match}"):
        grouped_mm(**({"mat_a": A, "mat_b": B, "offs": OFFS} | given))


@pytest.mark.parametrize(
    "given,match",
    [
        ({"mat_a": A.double()}, r"got torch.float64; m2ae_kernels.reference.grouped_mm takes"),
        ({"mat_b": B.int()}, r"expected mat_b in float32, .*, got torch.int32"),
        ({"mat_b": B.half()}, r"expected mat_b in the dtype of mat_a, torch.float32, got"),
        ({"bias": torch.zeros(3, 8).half()}, r"expected bias in the dtype of mat_a"),
        ({"offs": OFFS.float()}, r"expected offs in int32, int64, got torch.float32"),
        ({"a_ids": torch.zeros(6)}, r"expected a_ids in int32, int64, got torch.float32"),
        ({"out_dtype": torch.int32}, r"expected a floating out_dtype, got torch.int32"),
        ({"mat_b": B.to("meta")}, r"expected mat_b on the device of mat_a, cpu, got meta"),
        ({"offs": OFFS.to("meta")}, r"expected offs on the device of mat_a, cpu, got meta"),
        (
            {"a_ids": torch.zeros(6, dtype=torch.int32, device="meta")},
            r"expected a_ids on the device of mat_a, cpu, got meta",
        ),
    ],
)
def test_types(given, match):
    with pytest.raises(TypeError, match=f"grouped_mm: .*{match}"):
        grouped_mm(**({"mat_a": A, "mat_b": B, "offs": OFFS} | given))


@pytest.mark.parametrize(
    "given,match",
    [
        ({"offs": torch.tensor([2, 1, 6])}, "offs that do not decrease, up to 6, got 1 after 2"),
        ({"offs": torch.tensor([2, 4, 7])}, "offs that do not decrease, up to 6, got 7 after 4"),
        ({"offs": torch.tensor([-1, 4, 6])}, "offs that do not decrease, up to 6, got -1 after 0"),
        ({"a_ids": torch.tensor([0, 1, 2, 3, 4, 6])}, r"a_ids in \[-1, 6\), got 6"),
        ({"a_ids": torch.tensor([0, 1, 2, 3, 4, -2])}, r"a_ids in \[-1, 6\), got -2"),
    ],
)
def test_values_that_point_outside(given, match):
    with pytest.raises(ValueError, match=f"grouped_mm: expected {match}"):
        grouped_mm(**({"mat_a": A, "mat_b": B, "offs": OFFS} | given))
