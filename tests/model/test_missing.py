"""Items of a batch: absent modalities, padding, empty and single batches."""

import pytest
import torch
import torch.nn.functional as F
from small_model import gradients, masks_for, with_config
from torch.testing import assert_close

from m2ae.config import (
    LossWeights,
)


def test_a_batch_gives_what_its_items_give_alone(small, make_inputs):
    inputs = make_inputs(3)
    inputs["pixel_values"][2] = 0.5
    present = {"image": torch.tensor([True, False, True])}
    whole = small.eval().encode(inputs, present)
    for b in range(3):
        item = {name: x[b : b + 1] for name, x in inputs.items()}
        alone = small.encode(item, {"image": present["image"][b : b + 1]})
        assert_close(whole.joint[b : b + 1], alone.joint)
        for name in ("image", "text"):
            assert_close(whole.aligned[name][b : b + 1], alone.aligned[name])
            assert_close(
                small.decode(whole.by_modality[name])["image"][b : b + 1],
                small.decode(alone.by_modality[name])["image"],
            )


@pytest.mark.parametrize("masking", ["bernoulli", "fixed_ratio", "multiblock"])
def test_an_empty_batch_gives_zero(small, make_inputs, masking):
    output = small(make_inputs(0), masks=masks_for(small, 0, masking))
    assert output.loss == 0
    assert output.latents.joint.shape == (0, 20)
    assert not any(grad.any() for grad in gradients(small, output).values())


def test_a_single_pair_has_nothing_to_align_with(small, make_inputs):
    output = small(make_inputs(1), masks=masks_for(small, 1))
    assert output.losses["align"] == 0
    assert output.loss > 0


@pytest.mark.parametrize("masking", ["bernoulli", "fixed_ratio"])
def test_absent_items_reach_neither_losses_nor_gradients(small, make_inputs, masking):
    inputs, masks = make_inputs(4), masks_for(small, 4, masking)
    present = {
        "image": torch.tensor([True, False, True, False]),
        "text": torch.tensor([True, True, False, False]),
    }
    small.text_encoder.table.weight.data[49] = torch.nan
    inputs["input_ids"] %= 49

    expected = small(inputs, present, masks=masks)
    expected_gradients = gradients(small, expected)
    inputs["pixel_values"][~present["image"]] = torch.nan
    inputs["input_ids"][~present["text"]] = 49
    inputs["text_mask"][~present["text"]] = True
    output = small(inputs, present, masks=masks)

    assert output.loss.isfinite()
    assert_close(output.losses, expected.losses, rtol=0, atol=0)
    assert_close(output.latents.joint, expected.latents.joint, rtol=0, atol=0)
    assert_close(gradients(small, output), expected_gradients, rtol=0, atol=0)
    assert all(grad.isfinite().all() for grad in expected_gradients.values())


@pytest.mark.parametrize("masking", ["bernoulli", "fixed_ratio"])
def test_losses_are_means_over_the_items_that_have_what_they_need(small, make_inputs, masking):
    inputs = make_inputs(4)
    present = {
        "image": torch.tensor([True, True, True, False]),
        "text": torch.tensor([True, False, True, True]),
    }
    losses = small(inputs, present, masks=masks_for(small, 4, masking)).losses
    images = {"pixel_values": inputs["pixel_values"][:3]}
    pairs = {name: x[[0, 2]] for name, x in inputs.items()}
    expected_jepa = small(images, masks=masks_for(small, 3, masking)).losses["jepa"]
    assert_close(losses["jepa"], expected_jepa)
    assert_close(losses["align"], small(pairs).losses["align"])
    alone = [
        small(
            {name: x[b : b + 1] for name, x in inputs.items()},
            {name: x[b : b + 1] for name, x in present.items()},
        ).losses["recon_image"]
        for b in range(3)
    ]
    assert_close(losses["recon_image"], torch.stack(alone).mean())


def test_absent_embeddings_and_padding_may_be_nan(small):
    embeds = torch.randn(3, 5, 12)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    present = {"text": torch.tensor([True, True, False])}
    clean = small({"text_embeds": embeds, "text_mask": mask}, present)
    embeds = embeds.clone()
    embeds[1, 2:] = torch.nan
    embeds[2] = torch.nan
    output = small({"text_embeds": embeds, "text_mask": mask}, present)
    assert_close(output.losses, clean.losses, rtol=0, atol=0)
    assert all(grad.isfinite().all() for grad in gradients(small, output).values())


def test_a_batch_without_any_item_of_a_modality_is_a_batch_without_it(small, make_inputs):
    inputs = make_inputs(3)
    nowhere = {"image": torch.zeros(3, dtype=torch.bool)}
    output = small(inputs, nowhere, masks=masks_for(small, 3))
    assert output.losses["recon_image"] == output.losses["jepa"] == output.losses["align"] == 0
    del inputs["pixel_values"]
    without = small(inputs)
    assert set(without.losses) == {"recon_text"}
    assert_close(output.latents.joint, without.latents.joint)
    assert_close(output.losses["recon_text"], without.losses["recon_text"])


def test_a_text_of_no_tokens_is_an_absent_text(small, make_inputs):
    inputs = make_inputs(2)
    inputs["text_mask"][1] = False
    latents = small.encode(inputs)
    assert latents.present["text"].tolist() == [True, False]
    image_only = small.encode({"pixel_values": inputs["pixel_values"]})
    assert_close(latents.joint[1], image_only.joint[1])


def test_unimodal_latents_are_the_joint_path_with_the_other_absent(small, make_inputs):
    inputs = make_inputs(4)
    latents = small.encode(inputs)
    for name, other in (("image", "text"), ("text", "image")):
        alone = small.encode(inputs, {other: torch.zeros(4, dtype=torch.bool)})
        assert_close(latents.by_modality[name], alone.joint)
    assert_close(small.encode_image(inputs["pixel_values"]), latents.aligned["image"])
    text = small.encode_text(inputs["input_ids"], inputs["text_mask"])
    assert_close(text, latents.aligned["text"])
    assert_close(text.norm(dim=1), torch.ones(4))
    without_mask = small.encode_text(inputs["input_ids"])
    inputs["text_mask"].fill_(True)
    assert_close(without_mask, small.encode(inputs).aligned["text"])


def test_padding_content_does_not_change_the_text(small, make_inputs):
    inputs = make_inputs(4)
    before = small.encode_text(inputs["input_ids"], inputs["text_mask"])
    inputs["input_ids"][~inputs["text_mask"]] = -100  # no token at all
    after = small.encode_text(inputs["input_ids"], inputs["text_mask"])
    assert_close(after, before, rtol=0, atol=0)
    longer = F.pad(inputs["input_ids"], (0, 3), value=9)
    padded = small.encode_text(longer, F.pad(inputs["text_mask"], (0, 3)))
    assert_close(padded, before)


def test_cross_reconstruction_counts_pairs_only(small, make_inputs):
    model = with_config(small, loss=LossWeights(cross=1))
    inputs = make_inputs(4)
    pairs = torch.tensor([True, True, False, False])
    both = model(inputs, {"image": pairs}).losses
    first = model({name: x[:2] for name, x in inputs.items()}).losses
    assert_close(both["cross_image"], first["cross_image"])
    assert_close(both["cross_text"], first["cross_text"])
    assert_close(both["align"], first["align"])
