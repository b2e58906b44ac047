"""How a connector is trained on features of frozen encoders: one direction per step, in turn."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m2ae.config import ConnectorLossConfig
from m2ae.losses.connector import connector_loss, mutual_information_bound
from m2ae.models.connector import MoEConnector, direction_name
from m2ae.training.alternation import Direction, check_directions, sequential
from m2ae.training.log import RunLog
from m2ae.training.loop import check_batch_size, descend, run_steps
from m2ae.training.optim import make_optimizer
from m2ae.training.recipe import TrainConfig

Pairs = tuple[dict[str, Tensor], Tensor]  # standardized [n, d_m] by modality, and `same` [n]


class ConnectorTrainer:
    """Trains a MoEConnector by alternating gradient descent.

    The order of the items comes from (seed, epoch), so that a run is repeated by its seed.

    Args:
        model: to train, on its device.
        config: how.
        loss: what for.
        directions: source and target modality, one step each in turn.
        items: training features [n, d_m] by modality, standardized, and which are one thing [n].
        validation: the same of other items, for `eval_every`.

    Raises:
        ValueError: there are fewer items than one batch takes, or a direction is not the model's.
    """

    def __init__(
        self,
        model: MoEConnector,
        config: TrainConfig,
        loss: ConnectorLossConfig,
        directions: Sequence[Direction],
        items: Pairs,
        validation: Pairs | None = None,
    ) -> None:
        check_directions(directions, model.config.dims)
        check_batch_size("ConnectorTrainer", config, len(items[1]))
        self.model = model
        self.config = config
        self.loss = loss
        self.directions = directions
        self.device = next(model.parameters()).device
        self.items = self._placed(items)
        self.validation = None if validation is None else self._placed(validation)
        self.optimizer = make_optimizer(model, config)
        self.steps_of = dict.fromkeys(directions, 0)  # steps that trained each direction, so far

    def fit(self, log: RunLog) -> float:
        """Run all steps.

        Args:
            log: gets a row every `log_every` steps and after every evaluation.

        Returns:
            Items per second, evaluation left out.

        Raises:
            FloatingPointError: the loss is not finite; the step is named.
        """
        self.model.train()
        shown = ("loss", "pred", "cl", "mi_bound")
        items = len(self.items[1])
        return run_steps(self.config, items, self._step, self.evaluate, log, shown)

    def _step(self, step: int, epoch: int, rows: list[int]) -> dict[str, Any]:
        direction = sequential(step, self.directions)
        features, same = self.items
        batch = {name: tensor[rows] for name, tensor in features.items()}
        loss, terms, routing = self._objective(direction, batch, same[rows])
        descended = descend(self.model, self.optimizer, loss, step, self.config)
        self.steps_of[direction] += 1
        load = routing["tokens_per_expert"]
        return {
            "step": step,
            "epoch": epoch,
            "direction": direction_name(*direction),
            "steps_of_direction": self.steps_of[direction],
            "loss": loss.item(),
            **terms,
            "router_entropy": routing["entropy"].mean().item(),
            "largest_share": (load.max() / load.sum()).item(),
            **descended,
        }

    def _objective(
        self, direction: Direction, batch: dict[str, Tensor], same: Tensor
    ) -> tuple[Tensor, dict[str, float], dict[str, Tensor]]:
        """Loss, raw terms and the bound they mean, and the routing."""
        source, target = direction
        output = self.model(batch[source], source, target)
        key = self.model.project_target(batch[target], target)
        loss, raw = connector_loss(
            output.prediction, batch[target], output.query, key, self.loss, same
        )
        terms = {name: value.item() for name, value in raw.items()}
        if "cl" in terms:
            terms["mi_bound"] = mutual_information_bound(terms["cl"], len(same))
        return loss, terms, output.routing

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The terms of the objective on the validation items, all of them as one batch.

        Returns:
            "val_loss" and "val_<term>", the mean over directions, and "val_<term>_<direction>";
            empty without validation items.
        """
        if self.validation is None or len(self.validation[1]) < 2:
            return {}
        features, same = self.validation
        self.model.eval()
        row: dict[str, float] = {}
        for direction in self.directions:
            loss, terms, _ = self._objective(direction, features, same)
            for name, value in {"loss": loss.item(), **terms}.items():
                row.setdefault(f"val_{name}", 0.0)
                row[f"val_{name}"] += value / len(self.directions)
                row[f"val_{name}_{direction_name(*direction)}"] = value
        self.model.train()
        return row

    def _placed(self, pairs: Pairs) -> Pairs:
        features, same = pairs
        return {name: x.to(self.device) for name, x in features.items()}, same.to(self.device)
