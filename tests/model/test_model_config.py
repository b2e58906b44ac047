"""Configs: what they accept, what they refuse, and that a mistake is named."""

import dataclasses
import json
import subprocess
import sys
from importlib import resources

import pytest

from m2ae.config import (
    AlignConfig,
    BottleneckConfig,
    ImageConfig,
    JEPAConfig,
    LossWeights,
    M2AEConfig,
    TextConfig,
)

PRESETS = ["m2ae_spec", "m2ae_base", "m2ae_tiny"]

WRONG = [
    (
        ImageConfig,
        {"patch_size": 15},
        "ImageConfig.patch_size: expected a divisor of img_size = 224, got 15",
    ),
    (ImageConfig, {"patch_size": 0}, "ImageConfig.patch_size: expected a divisor"),
    (ImageConfig, {"img_size": 0}, "ImageConfig.img_size: expected 1 pixel or more, got 0"),
    (ImageConfig, {"heads": 7}, "ImageConfig.heads: expected a divisor of the width 768, got 7"),
    (ImageConfig, {"heads": 0}, "ImageConfig.heads: expected a divisor of the width 768, got 0"),
    (ImageConfig, {"embed_dim": 0}, "ImageConfig.embed_dim: expected 1 channel or more, got 0"),
    (ImageConfig, {"depth": -1}, "ImageConfig.depth: expected 0 blocks or more, got -1"),
    (ImageConfig, {"std": (0.5, 0.0, 0.5)}, "ImageConfig.std: expected numbers above 0"),
    (TextConfig, {"heads": 3}, "TextConfig.heads: expected a divisor of the width 256, got 3"),
    (
        TextConfig,
        {"decoder_depth": -2},
        "TextConfig.decoder_depth: expected 0 blocks or more, got -2",
    ),
    (TextConfig, {"mlp_ratio": 0.0}, "TextConfig.mlp_ratio: expected a number above 0, got 0.0"),
    (TextConfig, {"vocab_size": 0}, "TextConfig.vocab_size: expected 1 or more, got 0"),
    (
        JEPAConfig,
        {"mask_ratio": 1.0},
        r"JEPAConfig.mask_ratio: expected a share in \(0, 1\), got 1.0",
    ),
    (
        JEPAConfig,
        {"predictor_dim": 0},
        "JEPAConfig.predictor_dim: expected 1 channel or more, got 0",
    ),
    (
        JEPAConfig,
        {"predictor_depth": 0},
        "JEPAConfig.predictor_depth: expected 1 block or more, got 0",
    ),
    (JEPAConfig, {"predictor_heads": 5}, "expected a divisor of predictor_dim = 384, got 5"),
    (
        JEPAConfig,
        {"ema": (0.9, 1.1)},
        r"JEPAConfig.ema: expected decays in \[0, 1\], got \(0.9, 1.1\)",
    ),
    (AlignConfig, {"dim": -1}, "AlignConfig.dim: expected 0 channels or more, got -1"),
    (AlignConfig, {"max_scale": 0.0}, "AlignConfig.max_scale: expected a number above 0, got 0.0"),
    (
        AlignConfig,
        {"temperature": 0.001},
        "AlignConfig.temperature: expected 1 / max_scale = 0.01 or more",
    ),
    (LossWeights, {"align": -1.0}, "LossWeights.align: expected 0 or more, got -1.0"),
    (M2AEConfig, {"latent_dim": 1}, "M2AEConfig.latent_dim: expected 2 channels or more, got 1"),
]


@pytest.mark.parametrize("cls, fields, message", WRONG)
def test_values_out_of_range_are_named(cls, fields, message):
    with pytest.raises(ValueError, match=message):
        cls(**fields)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_states_every_field_and_survives_json(preset):
    path = resources.files("m2ae") / "configs" / "model" / f"{preset}.json"
    data = json.loads(path.read_text())
    config = M2AEConfig.preset(preset)
    assert config.to_dict() == data
    assert M2AEConfig.from_dict(data) == config
    assert type(config.image.mean) is tuple


def test_defaults_are_the_base_preset():
    assert M2AEConfig() == M2AEConfig.preset("m2ae_base")


def test_the_spec_has_no_blocks_and_no_stages():
    spec = M2AEConfig.preset("m2ae_spec")
    depths = (spec.image.depth, spec.image.decoder_depth, spec.text.depth, spec.text.decoder_depth)
    assert depths == (0, 0, 0, 0)
    assert spec.bottleneck == BottleneckConfig(False, False, False)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="got 'm2ae_tny'; did you mean 'm2ae_tiny'"):
        M2AEConfig.preset("m2ae_tny")


def test_patches_of_an_image():
    assert ImageConfig().grid == (14, 14)
    assert ImageConfig().num_patches == 196


def test_configs_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        M2AEConfig().latent_dim = 3


def test_importing_the_package_is_light():
    code = (
        "import sys, m2ae; assert 'torch' not in sys.modules; "
        "m2ae.M2AEConfig.preset('m2ae_tiny'); assert 'torch' not in sys.modules; "
        "assert m2ae.M2AE.__name__ == 'M2AE'; assert 'M2AE' in dir(m2ae); "
        "assert not hasattr(m2ae, 'm2ae'); assert m2ae.__version__"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
