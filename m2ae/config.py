"""Every choice that makes one model differ from another, one line each.

`M2AEConfig` is what a saved M2AE's config.json holds, `ConnectorConfig` that of a MoEConnector. The
defaults of M2AEConfig are the preset `m2ae_base`; `m2ae_spec` is the architecture to the letter (no
transformer blocks), `m2ae_tiny` trains on a CPU. Those of ConnectorConfig are M3-JEPA's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal, Self

from m2ae import dataclass_io

TokenHeadKind = Literal["positional", "linear"]
TokenActivation = Literal["none", "gelu"]
Masking = Literal["bernoulli", "fixed_ratio", "multiblock"]
PredictionLoss = Literal["smooth_l1", "squared_norm"]
SameItem = Literal["positive", "ignore", "negative"]


def _check(config: object, name: str, is_right: bool, expected: str) -> None:
    if not is_right:
        got = getattr(config, name)
        raise ValueError(f"{type(config).__name__}.{name}: expected {expected}, got {got!r}")


def _check_transformer(config: "ImageConfig | TextConfig", width: int) -> None:
    for name in ("depth", "decoder_depth"):
        _check(config, name, getattr(config, name) >= 0, "0 blocks or more")
    is_divisor = config.heads >= 1 and width % config.heads == 0
    _check(config, "heads", is_divisor, f"a divisor of the width {width}")
    _check(config, "mlp_ratio", config.mlp_ratio > 0, "a number above 0")


@dataclass(frozen=True)
class ModelConfig:
    """What the config of every model can do."""

    def to_dict(self) -> dict[str, Any]:
        """The config as nested dictionaries and lists; `from_dict` gives an equal one back."""
        return dataclass_io.to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build and check a config from nested dictionaries; see `m2ae.dataclass_io.from_dict`.

        Args:
            data: one key per field; what is left out has its default, if the field has one.

        Returns:
            The config.

        Raises:
            ValueError: a key is missing or unknown (the nearest one is named), or a value is out of
                range.
            TypeError: a value has another type than its field.
        """
        return dataclass_io.from_dict(cls, data)


@dataclass(frozen=True)
class ImageConfig:
    """The image encoder and decoder."""

    img_size: int = 224  # height and width in pixels
    patch_size: int = 16  # height and width of a patch in pixels; divides img_size
    embed_dim: int = 768  # channels of a patch token, in the encoder and in the decoder
    depth: int = 4  # encoder blocks; 0 = mean of the patch embeddings, without positions
    decoder_depth: int = 2  # decoder blocks
    heads: int = 12  # attention heads; divide embed_dim
    mlp_ratio: float = 4.0  # hidden width of a block's MLP / embed_dim
    token_head: TokenHeadKind = "positional"  # how the decoder makes tokens from the latent
    token_activation: TokenActivation = "none"  # on the decoder's tokens, before its blocks
    output: Literal["sigmoid", "identity"] = "sigmoid"  # pixels in training; inference clamps
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # per channel, of pixels in [0, 1]
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # per channel, above 0

    def __post_init__(self) -> None:
        _check(self, "img_size", self.img_size >= 1, "1 pixel or more")
        is_divisor = self.patch_size >= 1 and self.img_size % self.patch_size == 0
        _check(self, "patch_size", is_divisor, f"a divisor of img_size = {self.img_size}")
        _check(self, "embed_dim", self.embed_dim >= 1, "1 channel or more")
        _check_transformer(self, self.embed_dim)
        _check(self, "std", min(self.std) > 0, "numbers above 0")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.img_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        """Patches of an image, N."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class TextConfig:
    """The text encoder and decoder."""

    context_length: int = 77  # tokens of a text at most; what the decoder writes
    vocab_size: int = 49408  # rows of the embedding table
    width_in: int = 512  # channels of a token embedding: what comes in and is reconstructed
    width: int = 256  # channels of a token inside the encoder and the decoder
    depth: int = 4  # encoder blocks; 0 = mean of the projected tokens, without positions
    decoder_depth: int = 2  # decoder blocks
    heads: int = 4  # attention heads; divide width
    mlp_ratio: float = 4.0  # hidden width of a block's MLP / width
    token_head: TokenHeadKind = "positional"  # how the decoder makes tokens from the latent
    token_activation: TokenActivation = "none"  # on the decoder's tokens, before its blocks
    train_table: bool = True  # whether the embedding table learns; as a target it never does

    def __post_init__(self) -> None:
        for name in ("context_length", "vocab_size", "width_in", "width"):
            _check(self, name, getattr(self, name) >= 1, "1 or more")
        _check_transformer(self, self.width)


@dataclass(frozen=True)
class BottleneckConfig:
    """The three stages between fusion and decoders, in their order; False = pass through."""

    semantic_compression: bool = True  # an MLP through half the latent's width
    cross_modal_alignment: bool = True  # one scale for joint, image-only and text-only latents
    information_preservation: bool = True  # a gated skip around both


@dataclass(frozen=True)
class JEPAConfig:
    """The joint-embedding predictive branch: masks, predictor, moving average."""

    masking: Masking = "fixed_ratio"  # which patches the context encoder does not see
    mask_ratio: float = 0.5  # masked share of the patches, in (0, 1); multiblock has its own
    predictor_dim: int = 384  # channels of a token inside the predictor
    predictor_depth: int = 2  # predictor blocks, at least 1: mask tokens must see the context
    predictor_heads: int = 6  # attention heads; divide predictor_dim
    pred_loss: Literal["mse", "smooth_l1"] = "mse"  # between prediction and target features
    ema: tuple[float, float] = (0.996, 1.0)  # decay of the target encoder at the start and end

    def __post_init__(self) -> None:
        _check(self, "mask_ratio", 0 < self.mask_ratio < 1, "a share in (0, 1)")
        _check(self, "predictor_dim", self.predictor_dim >= 1, "1 channel or more")
        _check(self, "predictor_depth", self.predictor_depth >= 1, "1 block or more")
        is_divisor = self.predictor_heads >= 1 and self.predictor_dim % self.predictor_heads == 0
        expected = f"a divisor of predictor_dim = {self.predictor_dim}"
        _check(self, "predictor_heads", is_divisor, expected)
        _check(self, "ema", all(0 <= decay <= 1 for decay in self.ema), "decays in [0, 1]")


@dataclass(frozen=True)
class AlignConfig:
    """The contrastive alignment of image and text latents."""

    dim: int = 0  # channels of a linear projection of the latent; 0 = the latent itself
    temperature: float = 0.07  # of the softmax over cosine similarities; where learning starts
    learn_temperature: bool = True  # whether the temperature is a parameter
    max_scale: float = 100.0  # upper limit of 1 / temperature

    def __post_init__(self) -> None:
        _check(self, "dim", self.dim >= 0, "0 channels or more")
        _check(self, "max_scale", self.max_scale > 0, "a number above 0")
        lowest = 1 / self.max_scale
        _check(
            self, "temperature", self.temperature >= lowest, f"1 / max_scale = {lowest:g} or more"
        )


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of the objective, 0 or more; a term of weight 0 is not computed."""

    recon: float = 1.0  # image and text from the joint latent
    cross: float = 0.0  # image from the text-only latent and text from the image-only latent
    jepa: float = 1.0  # features of masked patches from visible patches
    align: float = 1.0  # image-only and text-only latents of a pair

    def __post_init__(self) -> None:
        for name in ("recon", "cross", "jepa", "align"):
            _check(self, name, getattr(self, name) >= 0, "0 or more")


@dataclass(frozen=True)
class M2AEConfig(ModelConfig):
    """A whole model."""

    latent_dim: int = 512  # channels of the latent
    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)
    jepa: JEPAConfig = field(default_factory=JEPAConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    loss: LossWeights = field(default_factory=LossWeights)

    def __post_init__(self) -> None:
        _check(self, "latent_dim", self.latent_dim >= 2, "2 channels or more")

    @classmethod
    def preset(cls, name: str) -> "M2AEConfig":
        """One of the configs that ship with the package, m2ae/configs/model/<name>.json.

        Args:
            name: "m2ae_spec", "m2ae_base" or "m2ae_tiny".

        Returns:
            The config.

        Raises:
            ValueError: there is no such preset; the nearest one is named.
        """
        folder = resources.files("m2ae") / "configs" / "model"
        files = {path.name.removesuffix(".json"): path for path in folder.iterdir()}
        if name not in files:
            known = dataclass_io.hint(name, files)
            raise ValueError(f"M2AEConfig.preset: expected a preset's name, got {name!r}; {known}")
        return cls.from_dict(json.loads(files[name].read_text(encoding="utf-8")))


@dataclass(frozen=True)
class ConnectorConfig(ModelConfig):
    """A mixture-of-experts connector between the latents of modalities."""

    dims: dict[str, int]  # channels of each modality's latents; two modalities or more
    hidden_size: int = 2048  # channels of the common space, of the experts and of the queries
    num_experts: int = 12  # experts, of two layers of hidden_size each
    top_k: int = 4  # experts per token and task
    dropout: float = 0.1  # behind both layers of an expert, in [0, 1)
    norm_topk_prob: bool = False  # whether the k weights of a token are made to sum to 1

    def __post_init__(self) -> None:
        _check(self, "dims", len(self.dims) >= 2, "two modalities or more")
        _check(self, "dims", min(self.dims.values()) >= 1, "1 channel or more each")
        # Names become parts of parameter names, and "a_to_b" is the name of a direction.
        is_name = all(name.isidentifier() and "_to_" not in name for name in self.dims)
        _check(self, "dims", is_name, "names of letters, digits and _, without '_to_'")
        _check(self, "hidden_size", self.hidden_size >= 1, "1 channel or more")
        _check(self, "num_experts", self.num_experts >= 1, "1 expert or more")
        is_share = 1 <= self.top_k <= self.num_experts
        _check(self, "top_k", is_share, f"1 to num_experts = {self.num_experts}")
        _check(self, "dropout", 0 <= self.dropout < 1, "a share in [0, 1)")


@dataclass(frozen=True)
class ConnectorLossConfig:
    """What a connector is trained for: alpha * prediction + (1 - alpha) * contrast."""

    alpha: float = 0.5  # share of the prediction term, in [0, 1]; a term of share 0 is not computed
    pred_loss: PredictionLoss = "smooth_l1"  # mean smooth-L1, or mean squared norm of the error
    temperature: float = 0.03  # of the softmax over cosine similarities, fixed
    same_item: SameItem = "positive"  # what another row of a batch with the same latent is

    def __post_init__(self) -> None:
        _check(self, "alpha", 0 <= self.alpha <= 1, "a share in [0, 1]")
        _check(self, "temperature", self.temperature >= 1e-6, "1e-6 or more")
