"""A connector's recipe that trains in a second, for the tests of its trainer and command."""

from m2ae.training.recipe import load_recipe

CONNECTOR_OVERRIDES = (
    "connector.hidden_size=16",
    "connector.num_experts=4",
    "connector.top_k=2",
    "train.batch_size=32",
    "train.warmup_steps=1",
)


def small_connector_recipe(*overrides, **train):
    """emoji_connector with a tiny connector; `train` replaces fields of TrainConfig."""
    options = {"steps": 6, "log_every": 1, "eval_every": 3} | train
    options = [f"train.{name}={value}" for name, value in options.items()]
    return load_recipe("emoji_connector", [*CONNECTOR_OVERRIDES, *options, *overrides])
