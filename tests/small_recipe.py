"""A recipe that trains in seconds, for the tests of the trainer and the command line."""

from m2ae.training.recipe import load_recipe

OVERRIDES = (
    "model.image.img_size=16",
    "model.image.embed_dim=32",
    "model.image.depth=1",
    "model.image.decoder_depth=1",
    "model.text.width=32",
    "model.text.width_in=16",
    "model.text.depth=1",
    "model.text.decoder_depth=1",
    "model.latent_dim=32",
    "model.jepa.predictor_dim=16",
    "model.jepa.predictor_depth=1",
    "train.batch_size=16",
    "train.warmup_steps=1",
)


def small_recipe(**train):
    """emoji_tiny with a tiny model; `train` replaces fields of TrainConfig."""
    options = {"steps": 6, "log_every": 1, "eval_every": 3} | train
    return load_recipe("emoji_tiny", [*OVERRIDES, *(f"train.{k}={v}" for k, v in options.items())])
