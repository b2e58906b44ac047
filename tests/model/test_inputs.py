"""Wrong inputs are refused with a message that names them."""

import pytest
import torch

IMAGE = torch.zeros(2, 3, 32, 32)
IDS = torch.zeros(2, 4, dtype=torch.int64)
MASK = torch.ones(2, 4, dtype=torch.bool)

WRONG = {
    "unknown key": (
        {"pixels": IMAGE},
        None,
        ValueError,
        "got 'pixels'; did you mean 'pixel_values'",
    ),
    "nothing": (
        {},
        None,
        ValueError,
        "expected pixel_values, input_ids or text_embeds, got no inputs",
    ),
    "not a tensor": (
        {"pixel_values": [0.0]},
        None,
        TypeError,
        "'pixel_values'.* as a tensor, got list",
    ),
    "size": (
        {"pixel_values": torch.zeros(2, 3, 32, 40)},
        None,
        ValueError,
        r"expected pixel_values of shape \[B, 3, 32, 32\], got \[2, 3, 32, 40\]",
    ),
    "no batch": (
        {"pixel_values": torch.zeros(3, 32, 32)},
        None,
        ValueError,
        r"\[B, 3, 32, 32\], got \[3, 32, 32\]",
    ),
    "scalar": ({"pixel_values": torch.zeros(())}, None, ValueError, r"\[B, 3, 32, 32\], got \[\]"),
    "integers": (
        {"pixel_values": IMAGE.long()},
        None,
        TypeError,
        "pixel_values as uint8, or floating",
    ),
    "both texts": (
        {"input_ids": IDS, "text_embeds": torch.zeros(2, 4, 12)},
        None,
        ValueError,
        "got both",
    ),
    "mask alone": ({"pixel_values": IMAGE, "text_mask": MASK}, None, ValueError, "got neither"),
    "11 of 10 tokens": (
        {"input_ids": torch.zeros(2, 11, dtype=torch.int64)},
        None,
        ValueError,
        "expected 1 to 10 tokens in input_ids, got 11; cut longer texts",
    ),
    "0 tokens": (
        {"text_embeds": torch.zeros(2, 0, 12)},
        None,
        ValueError,
        "1 to 10 tokens in text_embeds, got 0",
    ),
    "float ids": (
        {"input_ids": IDS.float()},
        None,
        TypeError,
        "input_ids as int64, got torch.float32",
    ),
    "ids 1-D": ({"input_ids": IDS[0]}, None, ValueError, r"input_ids of shape \[B, T\], got \[4\]"),
    "ids 3-D": (
        {"input_ids": IDS[..., None]},
        None,
        ValueError,
        r"input_ids of shape \[B, T\], got",
    ),
    "integer embeds": (
        {"text_embeds": IDS},
        None,
        TypeError,
        "text_embeds as floating, got torch.int64",
    ),
    "embeds of another width": (
        {"text_embeds": torch.zeros(2, 4, 13)},
        None,
        ValueError,
        r"\[B, T, 12\], got \[2, 4, 13\]",
    ),
    "mask dtype": (
        {"input_ids": IDS, "text_mask": IDS},
        None,
        TypeError,
        "text_mask as bool, got torch.int64",
    ),
    "mask length": (
        {"input_ids": IDS, "text_mask": MASK[:, :3]},
        None,
        ValueError,
        r"\[2, 4\], got \[2, 3\]",
    ),
    "batch sizes": (
        {"input_ids": IDS, "pixel_values": IMAGE[:1]},
        None,
        ValueError,
        "expected as many items in every input, got {'pixel_values': 1, 'input_ids': 2}",
    ),
    "unknown modality": (
        {"input_ids": IDS},
        {"texts": MASK[:, 0]},
        ValueError,
        r"got present\['texts'\]; did you mean 'text'",
    ),
    "present dtype": (
        {"input_ids": IDS},
        {"text": IDS[:, 0]},
        TypeError,
        r"present\['text'\] as bool, got torch.int64",
    ),
    "present length": (
        {"input_ids": IDS},
        {"text": MASK[0]},
        ValueError,
        r"present\['text'\] of shape \[2\], got \[4\]",
    ),
}


@pytest.mark.parametrize("inputs, present, error, message", WRONG.values(), ids=WRONG)
def test_wrong_inputs_are_named(small, inputs, present, error, message):
    with pytest.raises(error, match=message):
        small(inputs, present)
    with pytest.raises(error, match=message):
        small.encode(inputs, present)


@pytest.mark.parametrize("T", [0, 78])
def test_the_described_model_takes_1_to_77_tokens(T):
    from m2ae.config import M2AEConfig
    from m2ae.models.inputs import CheckedInputs

    ids = torch.zeros(1, T, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"expected 1 to 77 tokens in input_ids, got {T}"):
        CheckedInputs.check({"input_ids": ids}, None, M2AEConfig.preset("m2ae_spec"))
    CheckedInputs.check({"input_ids": ids.new_zeros(1, 77)}, None, M2AEConfig.preset("m2ae_spec"))


def test_other_dtypes_that_are_allowed(small):
    expected = small.encode({"input_ids": IDS}).joint
    assert torch.equal(small.encode({"input_ids": IDS.int()}).joint, expected)
    half = small.encode({"pixel_values": torch.rand(2, 3, 32, 32).half()}).joint
    assert half.dtype == torch.float32
    double = small.encode({"pixel_values": torch.rand(2, 3, 32, 32).double()}).joint
    assert double.dtype == torch.float32
