"""The training loop, plain: what every trainer does, whatever its model."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from m2ae.training.log import RunLog
from m2ae.training.recipe import TrainConfig
from m2ae.training.schedule import cosine_with_warmup


def check_batch_size(trainer: str, config: TrainConfig, items: int) -> None:
    """Refuse to train on fewer items than one batch takes."""
    if items < config.batch_size:
        raise ValueError(
            f"{trainer}: expected at least batch_size = {config.batch_size} samples, got {items}"
        )


def run_steps(
    config: TrainConfig,
    items: int,
    train_step: Callable[[int, int, list[int]], dict[str, Any]],
    evaluate: Callable[[], dict[str, float]],
    log: RunLog,
    shown: Sequence[str],
) -> float:
    """Run all steps, and evaluations between them.

    Args:
        config: how many, and how often to log and to evaluate.
        items: training samples there are.
        train_step: (step, epoch, rows of its batch) to the row of the log.
        evaluate: makes the row of an evaluation; empty if there is nothing to evaluate on.
        log: gets a row every `log_every` steps and after every evaluation.
        shown: of a row, what the terminal shows; what a row does not have is nan.

    Returns:
        Samples per second, evaluation left out.
    """
    seconds, start = 0.0, time.monotonic()
    for step, (epoch, rows) in enumerate(shuffled_batches(config, items)):
        row = train_step(step, epoch, rows)
        log.advance(step, {name: row.get(name, float("nan")) for name in shown})
        is_last = step + 1 == config.steps
        if step % config.log_every == 0 or is_last:
            log.write(row)
        if config.eval_every and ((step + 1) % config.eval_every == 0 or is_last):
            seconds += time.monotonic() - start
            if found := evaluate():
                log.write({"step": step, **found})
            start = time.monotonic()
    seconds += time.monotonic() - start
    return config.steps * config.batch_size / seconds


def shuffled_batches(config: TrainConfig, items: int) -> Iterator[tuple[int, list[int]]]:
    """`steps` times an epoch and the rows of a batch; every epoch has an order of its own."""
    size, step, epoch = config.batch_size, 0, 0
    while True:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        order = torch.randperm(items, generator=generator).tolist()
        for first in range(0, items - size + 1, size):
            yield epoch, order[first : first + size]
            step += 1
            if step == config.steps:
                return
        epoch += 1


def descend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    step: int,
    config: TrainConfig,
) -> dict[str, float]:
    """One step of the optimizer, at the learning rate of the step.

    Parameters that the loss does not depend on are left as they are, with the optimizer's state of
    them: their gradient is None, not 0.

    Args:
        model: whose gradient is clipped.
        optimizer: of its parameters.
        loss: 0-d.
        step: from 0.
        config: learning rate and its schedule, largest norm of the gradient.

    Returns:
        "lr", and "grad_norm" before it is clipped.

    Raises:
        FloatingPointError: the loss is not finite; the step is named.
    """
    if not loss.isfinite():
        raise FloatingPointError(f"step {step}: expected a finite loss, got {loss.item()}")
    factor = cosine_with_warmup(step, config.steps, config.warmup_steps, config.final_lr)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or float("inf"))
    optimizer.step()
    return {"lr": config.lr * factor, "grad_norm": norm.item()}
