"""How large a model is, part by part, and how much smaller its latent than its inputs."""

from torch import nn

from m2ae.config import M2AEConfig

# The first prefix that fits a parameter's name says to which part it belongs.
PARTS = (
    ("patch_embedding", "image_encoder.proj."),
    ("image_encoder", "image_encoder."),
    ("text_table", "text_encoder.table."),
    ("text_projection", "text_encoder.proj."),
    ("text_encoder", "text_encoder."),
    ("absent_vectors", "fusion.absent."),
    ("fusion", "fusion."),
    ("bottleneck", "bottleneck."),
    ("alignment", "align"),
    ("image_decoder", "image_decoder."),
    ("text_decoder", "text_decoder."),
    ("predictor", "predictor."),
    ("target_encoder", "target_encoder."),
)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """How many parameters each part has, trained or not.

    Args:
        model: an M2AE.

    Returns:
        Name of the part to number of parameters; the numbers add up to all of the model's.
    """
    counts = {part: 0 for part, _ in PARTS}
    for name, parameter in model.named_parameters():
        part = next(part for part, prefix in PARTS if name.startswith(prefix))
        counts[part] += parameter.numel()
    return counts


def compression_ratios(config: M2AEConfig) -> dict[str, float]:
    """Numbers in an input / numbers in the latent.

    Args:
        config: of the model.

    Returns:
        "image" and "text" (the embeddings of a text of full length) to their ratio.
    """
    image, text = config.image, config.text
    numbers = {"image": 3 * image.img_size**2, "text": text.context_length * text.width_in}
    return {name: number / config.latent_dim for name, number in numbers.items()}
