"""How an M2AE is trained."""

from collections.abc import Sequence
from typing import Any

import torch

from m2ae.data.collate import Collator
from m2ae.data.dataset import Item
from m2ae.masking import draw_masks
from m2ae.models.m2ae import M2AE
from m2ae.training.log import RunLog
from m2ae.training.loop import check_batch_size, descend, run_steps
from m2ae.training.optim import make_optimizer
from m2ae.training.recipe import TrainConfig
from m2ae.training.schedule import linear


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
        check_batch_size("Trainer", config, len(items))
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
        self.model.train()
        return run_steps(
            self.config, len(self.items), self._step, self.evaluate, log, shown=("loss", "align")
        )

    def _step(self, step: int, epoch: int, rows: list[int]) -> dict[str, Any]:
        config, jepa = self.config, self.model.config.jepa
        decay = linear(step, config.steps, *jepa.ema)

        self.collator.set_epoch(epoch)
        batch = self.collator([self.items[row] for row in rows])
        masks = draw_masks(
            jepa, self.model.config.image.grid, batch.ids, seed=config.seed, epoch=epoch
        )
        self.shortened += batch.shortened
        batch = batch.to(self.device)
        output = self.model(batch.inputs, batch.present, masks=masks.to(self.device))
        facts = descend(self.model, self.optimizer, output.loss, step, config)
        self.model.target_encoder.update(decay)
        return {
            "step": step,
            "epoch": epoch,
            "loss": output.loss.item(),
            **{name: value.item() for name, value in output.losses.items()},
            "lr": facts["lr"],
            "ema_decay": decay,
            "grad_norm": facts["grad_norm"],
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
