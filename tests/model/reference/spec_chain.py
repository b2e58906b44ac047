"""The literal M2AE chain, written again from its description: slow, obvious, one function a step.

It reads a model's state_dict and shares no code with the package. Every stage is returned by name,
so that a test can say which one is wrong.
"""

import math

import torch
import torch.nn.functional as F


def image_tokens(state, pixels, encoder="image_encoder"):
    """Pixels (B,3,224,224) to patch features (B,196,768): Conv2d, kernel = stride = 16."""
    weight, bias = state[f"{encoder}.proj.weight"], state[f"{encoder}.proj.bias"]
    grid = F.conv2d(pixels, weight, bias, stride=weight.shape[-1])  # (B, 768, 14, 14)
    return grid.flatten(2).transpose(1, 2)


def encode(state, pixels, embeds):
    """Both streams to the joint latent, with every stage on the way."""
    patches = image_tokens(state, pixels)
    visual = F.adaptive_avg_pool1d(patches.transpose(1, 2), 1).squeeze(-1)
    words = F.linear(embeds, state["text_encoder.proj.weight"], state["text_encoder.proj.bias"])
    textual = F.adaptive_avg_pool1d(words.transpose(1, 2), 1).squeeze(-1)
    concatenated = torch.cat([visual, textual], dim=1)
    latent = F.linear(concatenated, state["fusion.weight"], state["fusion.bias"])
    return {
        "patches": patches,
        "visual": visual,
        "words": words,
        "textual": textual,
        "concatenated": concatenated,
        "latent": latent,
    }


def unimodal_latent(state, features, modality):
    """The concatenation form with the other modality's learned absent vector in its place."""
    parts = {
        name: state[f"fusion.absent.{name}"].expand(len(features), -1) for name in ("image", "text")
    }
    parts[modality] = features
    concatenated = torch.cat([parts["image"], parts["text"]], dim=1)
    return F.linear(concatenated, state["fusion.weight"], state["fusion.bias"])


def spread(state, decoder, latent):
    """Linear to the token width, copied to every position, plus learned positions, GELU."""
    head = f"{decoder}.token_head"
    one = F.linear(latent, state[f"{head}.proj.weight"], state[f"{head}.proj.bias"])
    positions = state[f"{head}.spread.positions"]
    copies = torch.stack([one] * len(positions), dim=1)
    return F.gelu(copies + positions)


def decode_image(state, latent):
    """Latent to tokens (B,196,768) to pixels: ConvTranspose2d, kernel = stride = 16."""
    tokens = spread(state, "image_decoder", latent)
    side = math.isqrt(tokens.shape[1])
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))
    weight = state["image_decoder.weight"]
    pixels = F.conv_transpose2d(grid, weight, state["image_decoder.bias"], stride=weight.shape[-1])
    return {"tokens": tokens, "pixels": pixels}


def decode_text(state, latent):
    """Latent to tokens (B,77,256) to embeddings (B,77,512)."""
    tokens = spread(state, "text_decoder", latent)
    embeds = F.linear(tokens, state["text_decoder.proj.weight"], state["text_decoder.proj.bias"])
    return {"tokens": tokens, "embeds": embeds}


def attention(state, name, x, heads, visible=None):
    """Attention of one sequence (N, D) to itself, head by head; `visible` lists its keys."""
    D = x.shape[-1]
    qkv = F.linear(x, state[f"{name}.qkv.weight"], state[f"{name}.qkv.bias"])
    q, k, v = qkv[:, :D], qkv[:, D : 2 * D], qkv[:, 2 * D :]
    keys = range(len(x)) if visible is None else visible
    heads_out = []
    for h in range(heads):
        columns = slice(h * D // heads, (h + 1) * D // heads)
        scores = q[:, columns] @ k[keys][:, columns].T / math.sqrt(D // heads)
        heads_out.append(scores.softmax(dim=-1) @ v[keys][:, columns])
    mixed = torch.cat(heads_out, dim=1)
    return F.linear(mixed, state[f"{name}.out.weight"], state[f"{name}.out.bias"])


def norm(state, name, x):
    """LayerNorm with its weights."""
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def transformer(state, name, x, depth, heads, visible=None):
    """Pre-norm blocks on one sequence (N, D), then the final norm."""
    for i in range(depth):
        block = f"{name}.blocks.{i}"
        x = x + attention(
            state, f"{block}.attention", norm(state, f"{block}.attention_norm", x), heads, visible
        )
        hidden = F.linear(
            norm(state, f"{block}.mlp_norm", x),
            state[f"{block}.mlp.0.weight"],
            state[f"{block}.mlp.0.bias"],
        )
        x = x + F.linear(
            F.gelu(hidden), state[f"{block}.mlp.2.weight"], state[f"{block}.mlp.2.bias"]
        )
    return norm(state, f"{name}.norm", x) if depth else x


def predict(state, context, keep, masked, depth, heads):
    """One image: features (K, D) of patches `keep` to predictions (M, D) at patches `masked`."""
    positions = state["predictor.positions"]
    rows = F.linear(context, state["predictor.embed.weight"], state["predictor.embed.bias"])
    rows = [row + positions[n] for row, n in zip(rows, keep, strict=True)]
    rows += [state["predictor.mask_token"] + positions[n] for n in masked]
    mixed = transformer(state, "predictor.transformer", torch.stack(rows), depth, heads)
    return F.linear(
        mixed[len(keep) :], state["predictor.head.weight"], state["predictor.head.bias"]
    )


def jepa(state, pixels, visible, depth, heads):
    """Mean square between predictions and normalized target features, over masked patches."""
    targets = image_tokens(state, pixels, encoder="target_encoder.encoder")
    errors = []
    for row, image in enumerate(pixels):
        keep = visible[row].nonzero().flatten().tolist()
        masked = (~visible[row]).nonzero().flatten().tolist()
        context = image_tokens(state, image[None])[0][keep]
        predictions = predict(state, context, keep, masked, depth, heads)
        for prediction, n in zip(predictions, masked, strict=True):
            target = targets[row, n]
            target = (target - target.mean()) / (target.var(correction=0) + 1e-5).sqrt()
            errors += [(a - b) ** 2 for a, b in zip(prediction, target, strict=True)]
    return sum(errors) / len(errors)


def align(images, texts, temperature):
    """Symmetric InfoNCE on cosines: half of image to text, half of text to image."""
    N = len(images)
    cosine = [[F.cosine_similarity(i, t, dim=0) / temperature for t in texts] for i in images]
    total = 0.0
    for n in range(N):
        row = torch.stack([cosine[n][m] for m in range(N)])
        column = torch.stack([cosine[m][n] for m in range(N)])
        total = total - row.log_softmax(0)[n] - column.log_softmax(0)[n]
    return total / (2 * N)
