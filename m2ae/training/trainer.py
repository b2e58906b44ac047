"""The training loop, plain."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from m2ae.data.collate import Batch, Collator
from m2ae.data.dataset import Item
from m2ae.masking import draw_masks
from m2ae.models.m2ae import M2AE
from m2ae.training.log import RunLog
from m2ae.training.optim import make_optimizer
from m2ae.training.recipe import TrainConfig
from m2ae.training.schedule import cosine_with_warmup, linear


class Trainer:
    """Trains an M2AE on samples that are in memory.

    Order, captions, crops and masks come from (seed, epoch, sample id), so that a run is repeated
    by its seed.

    Args:
        model: to train, on its device.
        config: how.
        items: the training samples.
        collator: makes batches of them, with `train=True`.
        validation: samples for `eval_every`, batched with `validation_collator`.
        validation_collator: with `train=False`.

    Raises:
        ValueError: there are fewer samples than one batch takes.
    """

    def __init__(
        self,
        model: M2AE,
        config: TrainConfig,
        items: Sequence[Item],
        collator: Collator,
        validation: Sequence[Item] = (),
        validation_collator: Collator | None = None,
    ) -> None:
        if len(items) < config.batch_size:
            raise ValueError(
                f"Trainer: expected at least batch_size = {config.batch_size} samples,"
                f" got {len(items)}"
            )
        self.model = model
        self.config = config
        self.items = items
        self.collator = collator
        self.validation = validation
        self.validation_collator = validation_collator or collator
        self.device = next(model.parameters()).device
        self.optimizer = make_optimizer(model, config)
        self.shortened = 0  # captions that lost tokens to the context length, so far

    def fit(self, log: RunLog) -> float:
        """Run all steps.

        Args:
            log: gets a row every `log_every` steps and after every evaluation.

        Returns:
            Samples per second, evaluation left out.

        Raises:
            FloatingPointError: the loss is not finite; the step is named.
        """
        config, seconds = self.config, 0.0
        self.model.train()
        start = time.monotonic()
        for step, (epoch, batch) in enumerate(self._batches()):
            row = self._step(step, epoch, batch)
            log.advance(step, {"loss": row["loss"], "align": row.get("align", float("nan"))})
            is_last = step + 1 == config.steps
            if step % config.log_every == 0 or is_last:
                log.write(row)
            if config.eval_every and ((step + 1) % config.eval_every == 0 or is_last):
                seconds += time.monotonic() - start
                log.write({"step": step, **self.evaluate()})
                start = time.monotonic()
        seconds += time.monotonic() - start
        return config.steps * config.batch_size / seconds

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        """`steps` batches with their epochs; every epoch has a new order."""
        size, step, epoch = self.config.batch_size, 0, 0
        while True:
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.items), generator=generator).tolist()
            self.collator.set_epoch(epoch)
            for first in range(0, len(order) - size + 1, size):
                yield epoch, self.collator([self.items[i] for i in order[first : first + size]])
                step += 1
                if step == self.config.steps:
                    return
            epoch += 1

    def _step(self, step: int, epoch: int, batch: Batch) -> dict[str, Any]:
        config, jepa = self.config, self.model.config.jepa
        factor = cosine_with_warmup(step, config.steps, config.warmup_steps, config.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * factor
        decay = linear(step, config.steps, *jepa.ema)

        masks = draw_masks(
            jepa, self.model.config.image.grid, batch.ids, seed=config.seed, epoch=epoch
        )
        self.shortened += batch.shortened
        batch = batch.to(self.device)
        output = self.model(batch.inputs, batch.present, masks=masks.to(self.device))
        self.optimizer.zero_grad()
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), config.clip_norm or float("inf")
        )
        self.optimizer.step()
        self.model.target_encoder.update(decay)

        loss = output.loss.item()
        if not loss - loss == 0:  # NaN or infinite
            raise FloatingPointError(f"step {step}: expected a finite loss, got {loss}")
        return {
            "step": step,
            "epoch": epoch,
            "loss": loss,
            **{name: value.item() for name, value in output.losses.items()},
            "lr": config.lr * factor,
            "ema_decay": decay,
            "grad_norm": norm.item(),
            "shortened": self.shortened,
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The terms of the objective on the validation samples.

        Returns:
            "val_loss" and "val_<term>", averaged over batches; empty without validation samples.
        """
        size = min(self.config.batch_size, len(self.validation))
        sums: dict[str, float] = {}
        batches = 0
        self.model.eval()
        for first in range(0, len(self.validation) - size + 1, max(size, 1)):
            batch = self.validation_collator(self.validation[first : first + size])
            masks = draw_masks(
                self.model.config.jepa, self.model.config.image.grid, batch.ids, seed=0, epoch=0
            )
            batch = batch.to(self.device)
            output = self.model(batch.inputs, batch.present, masks=masks.to(self.device))
            for name, value in {"loss": output.loss, **output.losses}.items():
                sums[f"val_{name}"] = sums.get(f"val_{name}", 0.0) + value.item()
            batches += 1
        self.model.train()
        return {name: total / batches for name, total in sums.items()}
