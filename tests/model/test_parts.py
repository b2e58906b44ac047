"""Blocks, fusion, encoders and decoders, each against its plain definition."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from reference import spec_chain
from torch.testing import assert_close

from m2ae.config import ImageConfig, TextConfig
from m2ae.masking import DenseMasks, fixed_ratio
from m2ae.modalities.image import ImageDecoder, ImageEncoder, to_unit_range
from m2ae.modalities.text import TextDecoder, TextEncoder
from m2ae.models.blocks import TokenHead, Transformer, masked_mean
from m2ae.models.fusion import EarlyFusion
from m2ae.models.predictor import PatchPredictor

IMAGE = ImageConfig(32, 8, embed_dim=24, depth=2, decoder_depth=1, heads=3)
TEXT = TextConfig(
    context_length=10, vocab_size=50, width_in=12, width=16, depth=2, decoder_depth=1, heads=2
)


def prefixed(name, module):
    return {f"{name}.{key}": x for key, x in module.state_dict().items()}


def test_transformer_equals_its_definition_token_by_token():
    module = Transformer(24, depth=2, heads=3, mlp_ratio=2.0).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1]]).bool()
    actual = module(x, mask)
    for b in range(2):
        keys = mask[b].nonzero().flatten().tolist()
        expected = spec_chain.transformer(prefixed("t", module), "t", x[b], 2, 3, keys)
        assert_close(actual[b, keys], expected[keys])
    assert_close(module(x), module(x, torch.ones(2, 7, dtype=torch.bool)))


def test_a_transformer_of_no_depth_has_no_parameters_and_no_norm():
    module = Transformer(24, depth=0, heads=3, mlp_ratio=2.0)
    x = torch.randn(2, 7, 24)
    assert module(x) is x
    assert not list(module.parameters())


def test_masked_mean_ignores_what_is_masked():
    tokens = torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    tokens[0, 2:] = torch.nan
    tokens.requires_grad_()
    pooled = masked_mean(tokens, mask)
    assert_close(pooled[0], tokens[0, :2].mean(0))
    assert_close(pooled[1], torch.zeros(4))
    assert_close(pooled[2], tokens[2].mean(0))
    pooled.sum().backward()
    assert tokens.grad.isfinite().all()
    assert not tokens.grad[~mask].any()
    assert_close(masked_mean(tokens[2:], None), pooled[2:])


def test_block_form_equals_concatenation_form():
    fusion = EarlyFusion({"image": 6, "text": 4}, latent_dim=5)
    v, t = torch.randn(3, 6), torch.randn(3, 4)
    here = torch.ones(3, dtype=torch.bool)
    joint = fusion({"image": v, "text": t}, {"image": here, "text": here})
    assert_close(joint, F.linear(torch.cat([v, t], dim=1), fusion.weight, fusion.bias))
    missing = torch.tensor([True, False, True])
    t_absent = torch.where(missing[:, None], t, fusion.absent["text"])
    joint = fusion({"image": v, "text": t}, {"image": here, "text": missing})
    assert_close(joint, F.linear(torch.cat([v, t_absent], dim=1), fusion.weight, fusion.bias))
    assert fusion.weight.shape == (5, 10)


def test_absent_features_may_be_nan():
    fusion = EarlyFusion({"image": 6, "text": 4}, latent_dim=5)
    present = {"image": torch.tensor([True, False])}
    features = torch.randn(2, 6)
    features[1] = torch.nan
    features.requires_grad_()
    z = fusion({"image": features}, present)
    z.sum().backward()
    assert z.isfinite().all()
    assert features.grad[0].all()
    assert not features.grad[1].any()
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters())


def test_absent_vectors_learn_from_rows_that_lack_the_modality_only():
    fusion = EarlyFusion({"image": 6, "text": 4}, latent_dim=5)
    here = torch.ones(2, dtype=torch.bool)
    pooled = {"image": torch.randn(2, 6), "text": torch.randn(2, 4)}
    fusion(pooled, {"image": here, "text": ~here}).sum().backward()
    assert not fusion.absent["image"].grad.any()
    assert fusion.absent["text"].grad.any()


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_permuting_positions_permutes_tokens(activation):
    head = TokenHead(20, 7, 12, "positional", activation)
    z, order = torch.randn(2, 20), torch.randperm(7)
    before = head(z)
    with torch.no_grad():
        head.spread.positions.copy_(head.spread.positions[order])
    assert_close(head(z), before[:, order])


def test_a_linear_token_head_has_a_weight_for_every_token():
    head = TokenHead(20, 7, 12, "linear", "none")
    z = torch.randn(2, 20)
    expand = head.spread[0]
    rows = [
        F.linear(
            head.proj(z), expand.weight[12 * n : 12 * (n + 1)], expand.bias[12 * n : 12 * (n + 1)]
        )
        for n in range(7)
    ]
    assert_close(head(z), torch.stack(rows, dim=1))


def test_image_encoder_equals_convolution_positions_and_blocks():
    config = dataclasses.replace(IMAGE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    encoder = ImageEncoder(config)
    image = torch.rand(2, 3, 32, 32)
    normalized = (image - encoder.mean[:, None, None]) / encoder.std[:, None, None]
    tokens = encoder.proj(normalized).flatten(2).transpose(1, 2) + encoder.positions
    tokens = encoder.transformer(tokens)
    output = encoder(image)
    assert_close(output.tokens, tokens)
    assert_close(output.pooled, tokens.mean(dim=1))
    assert output.mask is None


def test_kept_patches_are_encoded_as_if_the_others_were_masked_out():
    encoder = ImageEncoder(IMAGE)
    image = torch.rand(3, 3, 32, 32)
    keep_idx = fixed_ratio(range(3), 16, 0.5, seed=0, epoch=0).keep_idx
    visible = torch.zeros(3, 16, dtype=torch.bool).scatter(1, keep_idx.long(), True)
    some = encoder(image, keep_idx=keep_idx)
    dense = encoder(image, visible=visible)
    assert_close(some.tokens, dense.tokens[visible].view(3, 8, 24))
    assert_close(some.pooled, dense.pooled)


def test_predictor_of_dense_masks_equals_that_of_indices():
    predictor = PatchPredictor(24, num_patches=16, width=16, depth=2, heads=2)
    tokens = torch.randn(3, 16, 24)
    masks = fixed_ratio(range(3), 16, 0.5, seed=0, epoch=0)
    keep, predict = masks.keep_idx.long()[..., None], masks.predict_idx.long()[..., None]
    visible = torch.zeros(3, 16, dtype=torch.bool).scatter(1, keep[..., 0], True)
    context = tokens.gather(1, keep.expand(-1, -1, 24))
    dense = predictor(tokens, DenseMasks(visible))
    expected = dense.gather(1, predict.expand(-1, -1, 24))
    assert_close(predictor(context, masks), expected)
    tokens[~visible] = torch.nan
    assert_close(predictor(tokens, DenseMasks(visible)), dense)


def test_predictor_equals_its_definition_token_by_token():
    predictor = PatchPredictor(24, num_patches=16, width=16, depth=2, heads=2).double()
    masks = fixed_ratio([0], 16, 0.5, seed=0, epoch=0)
    context = torch.randn(1, 8, 24, dtype=torch.float64)
    expected = spec_chain.predict(
        prefixed("predictor", predictor),
        context[0],
        masks.keep_idx[0].tolist(),
        masks.predict_idx[0].tolist(),
        depth=2,
        heads=2,
    )
    assert_close(predictor(context, masks)[0], expected)


def test_pixels_are_a_transposed_convolution():
    decoder = ImageDecoder(IMAGE, latent_dim=20)
    torch.nn.init.normal_(decoder.bias)
    tokens = torch.randn(2, 16, 24)
    grid = tokens.transpose(1, 2).unflatten(2, (4, 4))
    expected = F.conv_transpose2d(grid, decoder.weight, decoder.bias, stride=8)
    assert_close(decoder.to_pixels(tokens), expected)
    assert decoder.to_pixels(tokens[:0]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("output", ["sigmoid", "identity"])
def test_image_decoder_runs_its_stages(output):
    decoder = ImageDecoder(dataclasses.replace(IMAGE, output=output), latent_dim=20)
    z = torch.randn(2, 20)
    pixels = decoder.to_pixels(decoder.transformer(decoder.token_head(z)))
    assert_close(decoder(z), pixels.sigmoid() if output == "sigmoid" else pixels)


def test_text_encoder_equals_projection_positions_and_blocks():
    encoder = TextEncoder(TEXT)
    ids = torch.randint(0, 50, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]).bool()
    embeds = encoder.table.weight[ids]
    assert_close(encoder.embed(ids), embeds)
    tokens = encoder.transformer(encoder.proj(embeds) + encoder.positions[:6], mask)
    output = encoder(embeds, mask)
    assert_close(output.tokens, tokens)
    assert_close(output.pooled[0], tokens[0].mean(dim=0))
    assert_close(output.pooled[1], tokens[1, :2].mean(dim=0))


def test_text_decoder_runs_its_stages():
    decoder = TextDecoder(TEXT, latent_dim=20)
    z = torch.randn(2, 20)
    embeds = decoder(z)
    assert embeds.shape == (2, 10, 12)
    assert_close(embeds, decoder.proj(decoder.transformer(decoder.token_head(z))))


def test_unit_range():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert_close(to_unit_range(pixels), torch.tensor([0, 0.2, 1]))
    assert to_unit_range(pixels / 255) is not None
    floats = torch.rand(3)
    assert to_unit_range(floats) is floats
