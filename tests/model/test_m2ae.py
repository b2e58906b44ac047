"""The objective and its gradients, and what the model decodes."""

import dataclasses

import pytest
import torch
from small_model import SMALL, gradients, masks_for, with_config
from torch.testing import assert_close

from m2ae.config import (
    AlignConfig,
    BottleneckConfig,
    ImageConfig,
    JEPAConfig,
    LossWeights,
    M2AEConfig,
)
from m2ae.masking import draw_masks
from m2ae.models.m2ae import M2AE


@pytest.mark.parametrize("masking", ["bernoulli", "fixed_ratio", "multiblock"])
def test_a_step_lowers_every_term(small, make_inputs, masking):
    inputs, masks = make_inputs(8), masks_for(small, 8, masking)
    optimizer = torch.optim.Adam([p for p in small.parameters() if p.requires_grad], lr=3e-3)
    first = small(inputs, masks=masks).losses
    assert set(first) == {"recon_image", "recon_text", "jepa", "align"}
    for _ in range(20):
        optimizer.zero_grad()
        small(inputs, masks=masks).loss.backward()
        optimizer.step()
    last = small(inputs, masks=masks).losses
    assert all(last[name] < first[name] for name in first)


def test_two_runs_of_one_seed_are_bit_identical(make_inputs):
    def run():
        torch.manual_seed(0)
        model = M2AE(SMALL)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        for epoch in range(3):
            masks = draw_masks(SMALL.jepa, SMALL.image.grid, range(4), seed=0, epoch=epoch)
            optimizer.zero_grad()
            model(make_inputs(4), masks=masks).loss.backward()
            optimizer.step()
            model.target_encoder.update(0.99)
        return model.state_dict()

    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_trained_parameter_has_a_gradient(small, make_inputs):
    output = small(
        make_inputs(4), {"text": torch.tensor([True, True, False, True])}, masks=masks_for(small, 4)
    )
    missing = {n for n, p in small.named_parameters() if p.requires_grad}
    missing -= {n for n, g in gradients(small, output).items() if g.any()}
    assert missing == set()


def test_loss_is_the_weighted_sum_of_its_terms(small, make_inputs):
    weights = LossWeights(recon=0.5, cross=2.0, jepa=3.0, align=0.25)
    model = with_config(small, loss=weights)
    output = model(make_inputs(), masks=masks_for(model, 4))
    terms = output.losses
    assert set(terms) == {
        "recon_image",
        "recon_text",
        "cross_image",
        "cross_text",
        "jepa",
        "align",
    }
    expected = sum(getattr(weights, name.split("_")[0]) * value for name, value in terms.items())
    assert_close(output.loss, expected)
    assert output.loss.dtype == torch.float32


@pytest.mark.parametrize(
    "term, part",
    [
        ("recon", "image_decoder"),
        ("recon", "text_decoder"),
        ("jepa", "predictor"),
        ("jepa", "target_encoder"),
        ("align", "alignment"),
    ],
)
def test_a_term_of_weight_zero_is_not_computed(small, make_inputs, monkeypatch, term, part):
    model = with_config(small, loss=LossWeights(**{term: 0.0}))

    def never(*_):
        raise AssertionError(f"{part} ran")

    monkeypatch.setattr(getattr(model, part), "forward", never)
    losses = model(make_inputs(), masks=masks_for(model, 4)).losses
    assert not any(name.startswith(term) for name in losses)


def test_ids_and_their_embeddings_give_the_same(small, make_inputs):
    inputs = make_inputs(4)
    expected = small(inputs)
    ids = inputs.pop("input_ids")
    inputs["text_embeds"] = small.text_encoder.table.weight[ids]
    output = small(inputs)
    assert_close(output.latents.joint, expected.latents.joint)
    assert_close(output.losses, expected.losses)


def test_uint8_and_float_pixels_give_the_same(small, make_inputs):
    inputs = make_inputs(4)
    integers = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    a = small(inputs | {"pixel_values": integers}, masks=masks_for(small, 4))
    b = small(inputs | {"pixel_values": integers / 255}, masks=masks_for(small, 4))
    assert_close(a.losses, b.losses, rtol=1e-6, atol=1e-6)
    assert_close(a.latents.joint, b.latents.joint, rtol=0, atol=1e-6)


def test_the_text_target_is_a_constant(small, make_inputs):
    # Through the encoder the table learns. With that path cut, nothing is left.
    table = small.text_encoder.table.weight
    (grad,) = torch.autograd.grad(small(make_inputs()).losses["recon_text"], table)
    assert grad.any()
    small.text_encoder.register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))
    recon_text = small(make_inputs()).losses["recon_text"]
    assert torch.autograd.grad(recon_text, table, allow_unused=True) == (None,)


def test_cross_reconstruction_trains_one_encoder_and_the_other_decoder(small, make_inputs):
    model = with_config(small, loss=LossWeights(recon=0, cross=1, jepa=0, align=0))
    output = model(make_inputs(4))
    grads = torch.autograd.grad(
        output.losses["cross_image"],
        [p for p in model.parameters() if p.requires_grad],
        allow_unused=True,
    )
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    reached = {n.split(".")[0] for n, g in zip(names, grads, strict=True) if g is not None}
    assert reached == {"text_encoder", "fusion", "bottleneck", "image_decoder"}


def test_pixels_are_clamped_at_inference_only():
    torch.manual_seed(0)
    config = M2AEConfig(
        latent_dim=8,
        image=ImageConfig(
            16, 8, embed_dim=12, heads=2, depth=0, decoder_depth=0, output="identity"
        ),
        jepa=JEPAConfig(predictor_dim=8, predictor_heads=1),
        text=dataclasses.replace(M2AEConfig().text, vocab_size=8, depth=0, decoder_depth=0),
    )
    model = M2AE(config)
    z = 50 * torch.randn(4, 8)
    free = model.decode(z, ["image"])["image"]
    assert free.min() < 0
    assert free.max() > 1
    saturated = free > 1
    (grad,) = torch.autograd.grad(
        free[saturated].sum(), model.image_decoder.weight, retain_graph=True
    )
    assert grad.any()
    clamped = model.eval().decode(z, ["image"])["image"]
    assert_close(clamped, free.clamp(0, 1))


def test_decode_makes_what_is_asked(small):
    z = torch.randn(2, 20)
    assert set(small.decode(z)) == {"image", "text"}
    assert set(small.decode(z, ["text"])) == {"text"}
    with pytest.raises(ValueError, match="got 'txt'; did you mean 'text'"):
        small.decode(z, ["txt"])


@pytest.mark.parametrize("stage", ["semantic_compression", "cross_modal_alignment"])
def test_bottleneck_stages_run_in_order(small, make_inputs, stage):
    order = []
    for name, module in small.bottleneck.named_children():
        module.register_forward_hook(lambda *_, name=name: order.append(name))
    small.encode({"pixel_values": make_inputs()["pixel_values"]})
    stages = ["semantic_compression", "cross_modal_alignment", "information_preservation"]
    assert order == 2 * stages  # joint, and image-only


def test_a_bottleneck_without_stages_passes_through(small):
    none = BottleneckConfig(False, False, False)
    bottleneck = with_config(small, bottleneck=none).bottleneck
    z = torch.randn(3, 20)
    assert bottleneck(z) is z
    assert not list(bottleneck.parameters())
    preserving = with_config(small, bottleneck=BottleneckConfig(False, False, True)).bottleneck
    assert_close(preserving(z), z)  # the gate starts closed
    with torch.no_grad():
        preserving.information_preservation.gate.fill_(0.5)
    assert_close(preserving(z), 1.5 * z)


def test_alignment_can_have_a_projection_of_its_own(small, make_inputs):
    model = with_config(small, align=AlignConfig(dim=6))
    latents = model.encode(make_inputs())
    assert latents.aligned["image"].shape == (4, 6)
    assert latents.by_modality["image"].shape == (4, 20)


@pytest.mark.parametrize("preset", ["m2ae_base", "m2ae_tiny"])
def test_counts_add_up(preset):
    config = M2AEConfig.preset(preset)
    with torch.device("meta"):
        model = M2AE(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(model.parameter_counts().values()) == total
    assert min(model.parameter_counts().values()) > 0


def test_autocast_keeps_losses_in_float32(small, make_inputs):
    inputs, masks = make_inputs(4), masks_for(small, 4)
    expected = small(inputs, masks=masks)
    with torch.autocast("cpu", torch.bfloat16):
        output = small(inputs, masks=masks)
    assert {value.dtype for value in output.losses.values()} == {torch.float32}
    # bfloat16 has 8 bits; errors of a few layers add up
    assert_close(output.loss, expected.loss, rtol=0.05, atol=0)
    assert all(grad.isfinite().all() for grad in gradients(small, output).values())
