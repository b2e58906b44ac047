"""AdamW with weight decay where it belongs: on matrices."""

import torch
from torch import nn

from m2ae.training.recipe import TrainConfig

TABLES = ("positions", "table", "token", "absent", "task_embedding")


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what the model trains.

    Norms, biases, position tables, absent vectors, embeddings and the temperature (everything with
    fewer than two axes, or named as a bias of several experts, an embedding, or a table of
    positions or tokens) are not decayed; frozen parameters, such as the target encoder's, are left
    out.

    Args:
        model: parameters with requires_grad are trained.
        config: `lr`, `weight_decay`, `betas`.

    Returns:
        The optimizer, with two groups named "decayed" and "not decayed".
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_table = any(part in name for part in TABLES)
        is_bias = parameter.ndim < 2 or name.endswith((".b1", ".b2"))  # of experts: [E, ...]
        (kept if is_bias or is_table else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "name": "decayed"},
        {"params": kept, "weight_decay": 0.0, "name": "not decayed"},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
