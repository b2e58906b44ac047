"""The preset m2ae_spec is the described architecture: its shapes, its counts, its values.

Every stage is compared with tests/model/reference/spec_chain.py. Then two facts about that
architecture which are easily missed, and which the default does not share.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from reference import spec_chain
from torch.testing import assert_close

from m2ae.config import ImageConfig, M2AEConfig, TextConfig
from m2ae.masking import DenseMasks
from m2ae.modalities.image import ImageDecoder, ImageEncoder
from m2ae.modalities.text import TextDecoder
from m2ae.models.m2ae import M2AE

SPEC = M2AEConfig.preset("m2ae_spec")


@pytest.fixture(scope="module")
def spec():
    torch.manual_seed(0)
    return M2AE(SPEC)


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    return {"pixel_values": torch.rand(2, 3, 224, 224), "text_embeds": torch.randn(2, 77, 512)}


def numel(module):
    return sum(parameter.numel() for parameter in module.parameters())


def stages(spec, batch):
    """Every stage of the model's own chain, by the oracle's names."""
    with torch.no_grad():
        image = spec.image_encoder(batch["pixel_values"])
        text = spec.text_encoder(batch["text_embeds"])
        latent = spec.encode(batch).joint
        image_tokens = spec.image_decoder.token_head(latent)
        text_tokens = spec.text_decoder.token_head(latent)
        decoded = spec.decode(latent)
    return {
        "patches": image.tokens,
        "visual": image.pooled,
        "words": text.tokens,
        "textual": text.pooled,
        "latent": latent,
        "image_decoder tokens": image_tokens,
        "pixels": decoded["image"],
        "text_decoder tokens": text_tokens,
        "embeds": decoded["text"],
    }


def test_every_stage_has_its_shape(spec, batch):
    assert {name: tuple(x.shape) for name, x in stages(spec, batch).items()} == {
        "patches": (2, 196, 768),
        "visual": (2, 768),
        "words": (2, 77, 256),
        "textual": (2, 256),
        "latent": (2, 512),
        "image_decoder tokens": (2, 196, 768),
        "pixels": (2, 3, 224, 224),
        "text_decoder tokens": (2, 77, 256),
        "embeds": (2, 77, 512),
    }
    assert spec.fusion.weight.shape == (512, 1024)


def test_every_stage_has_its_value(spec, batch):
    state = spec.state_dict()
    expected = spec_chain.encode(state, batch["pixel_values"], batch["text_embeds"])
    image = spec_chain.decode_image(state, expected["latent"])
    text = spec_chain.decode_text(state, expected["latent"])
    expected |= {"image_decoder tokens": image["tokens"], "pixels": image["pixels"]}
    expected |= {"text_decoder tokens": text["tokens"], "embeds": text["embeds"]}
    actual = stages(spec.train(), batch)  # in training, pixels are not clamped
    for name, value in actual.items():
        assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_objective_has_its_value(spec, batch):
    # six masked patches, not half of all: the oracle's loops are slow
    visible = torch.ones(2, 196, dtype=torch.bool)
    visible[0, [0, 17, 30, 195]] = False
    visible[1, [5, 6]] = False
    masks = DenseMasks(visible)
    with torch.no_grad():
        spec.target_encoder.encoder.proj.bias.add_(0.1)  # so that it differs from its source
        output = spec.train()(batch, masks=masks)
    state = spec.state_dict()
    stage = spec_chain.encode(state, batch["pixel_values"], batch["text_embeds"])
    pixels = spec_chain.decode_image(state, stage["latent"])["pixels"]
    embeds = spec_chain.decode_text(state, stage["latent"])["embeds"]
    jepa = SPEC.jepa
    expected = {
        "recon_image": F.mse_loss(pixels, batch["pixel_values"]),
        "recon_text": F.mse_loss(embeds, batch["text_embeds"]),
        "jepa": spec_chain.jepa(
            state, batch["pixel_values"], visible, jepa.predictor_depth, jepa.predictor_heads
        ),
        "align": spec_chain.align(
            spec_chain.unimodal_latent(state, stage["visual"], "image"),
            spec_chain.unimodal_latent(state, stage["textual"], "text"),
            temperature=0.07,
        ),
    }
    assert_close(output.losses, expected)
    assert_close(output.loss, sum(expected.values()))


def test_parameter_counts(spec):
    counts = spec.parameter_counts()
    assert counts["patch_embedding"] == 590_592
    assert counts["text_projection"] == 131_328
    assert counts["fusion"] == 524_800
    assert counts["image_decoder"] == 1_134_339
    assert counts["text_decoder"] == 282_624
    assert counts["text_table"] == 49_408 * 512
    assert counts["absent_vectors"] == 768 + 256
    assert counts["target_encoder"] == 590_592
    # nothing else at depth 0: no positions, no norms
    assert counts["image_encoder"] == counts["text_encoder"] == counts["bottleneck"] == 0
    assert sum(counts.values()) == numel(spec)


def test_parameter_counts_of_linear_token_heads():
    with torch.device("meta"):
        image = ImageDecoder(dataclasses.replace(SPEC.image, token_head="linear"), 512)
        text = TextDecoder(dataclasses.replace(SPEC.text, token_head="linear"), 512)
        tokens = text(torch.empty(2, 512))
    assert numel(image) == 116_739_843
    assert numel(text) == 5_328_896
    assert tokens.shape == (2, 77, 512)


def test_compression_ratios(spec):
    assert spec.compression_ratios() == {"image": 294.0, "text": 77.0}


def test_embedding_table_is_frozen(spec):
    assert not spec.text_encoder.table.weight.requires_grad


def shuffle_patches(image, p, order):
    """The image [1, 3, H, W] with its patches in another order."""
    columns = F.unfold(image, p, stride=p)  # [1, 3 p p, N]
    return F.fold(columns[:, :, order], image.shape[-2:], p, stride=p)


@pytest.mark.parametrize("depth, is_blind", [(0, True), (2, False)])
def test_only_an_encoder_without_blocks_is_blind_to_the_order_of_patches(depth, is_blind):
    encoder = ImageEncoder(ImageConfig(32, 8, embed_dim=24, heads=2, depth=depth))
    image = torch.rand(1, 3, 32, 32)
    shuffled = shuffle_patches(image, 8, torch.randperm(16))
    with torch.no_grad():
        difference = (encoder(image).pooled - encoder(shuffled).pooled).abs().max()
    assert (difference < 1e-6) == is_blind
    assert is_blind or difference > 1e-4


@pytest.mark.parametrize(
    "decoder_depth, activation, is_one_shift",
    [(0, "none", True), (0, "gelu", False), (2, "none", False)],
)
def test_only_a_decoder_without_nonlinearity_shifts_every_patch_alike(
    decoder_depth, activation, is_one_shift
):
    config = ImageConfig(
        32,
        8,
        embed_dim=24,
        heads=2,
        decoder_depth=decoder_depth,
        token_activation=activation,
        output="identity",
    )
    decoder = ImageDecoder(config, latent_dim=20)
    with torch.no_grad():
        decoder.token_head.spread.positions.normal_()
        a, b = decoder(torch.randn(2, 20))
        patches = F.unfold((a - b)[None], 8, stride=8)[0]  # [3 * 8 * 8, 16]
        spread = (patches - patches[:, :1]).abs().max()
    assert (spread < 1e-5) == is_one_shift
    assert is_one_shift or spread > 1e-2


def test_text_config_of_the_spec_is_the_described_one():
    assert (SPEC.text.context_length, SPEC.text.vocab_size) == (77, 49_408)
    assert SPEC.jepa.masking == "bernoulli"
    assert SPEC.jepa.mask_ratio == 0.5
    assert TextConfig(depth=0).width_in == 512
