"""Alternation: whose turn it is, and that who is idle is left exactly as it was."""

import copy
import re

import pytest
import torch

from m2ae.config import ConnectorConfig, ConnectorLossConfig
from m2ae.models.connector import MoEConnector
from m2ae.training.alternation import check_directions, sequential
from m2ae.training.connector_trainer import ConnectorTrainer
from m2ae.training.recipe import TrainConfig

DIRECTIONS = [("image", "text"), ("text", "image")]
CONFIG = ConnectorConfig({"image": 6, "text": 5}, 8, 4, 2)


def trainer_of(directions=DIRECTIONS, **train):
    config = TrainConfig(steps=8, batch_size=4, warmup_steps=0, weight_decay=0.5, lr=0.1, **train)
    items = {"image": torch.randn(16, 6), "text": torch.randn(16, 5)}, torch.arange(16)
    model = MoEConnector(CONFIG)
    return ConnectorTrainer(model, config, ConnectorLossConfig(), directions, items)


def test_directions_take_turns():
    three = [*DIRECTIONS, ("image", "audio")]
    assert [sequential(step, DIRECTIONS) for step in range(4)] == DIRECTIONS * 2
    assert [sequential(step, three) for step in range(5)] == [*three, *three[:2]]


def idle_names(model, source, target):
    """What a step from source to target must not touch."""
    other = f"{target}_to_{source}"
    idle = {f"modality_embedding.{target}"}
    for layer in (
        f"in_proj.{target}", f"target_proj.{source}", f"pred_head.{other}", f"cl_head.{other}",
    ):  # fmt: skip
        idle |= {f"{layer}.weight", f"{layer}.bias"}
    assert idle < {name for name, _ in model.named_parameters()}
    return idle


def test_a_step_leaves_the_idle_direction_bit_for_bit():
    trainer = trainer_of()
    model, optimizer = trainer.model.train(), trainer.optimizer
    trained = set()
    for step in range(4):  # from step 2 on, the idle direction has moments, too
        source, target = DIRECTIONS[step % 2]
        idle = idle_names(model, source, target)
        before = copy.deepcopy(
            {n: (p.data, optimizer.state[p]) for n, p in model.named_parameters()}
        )
        row = trainer._step(step, 0, [0, 1, 2, 3])
        assert row["direction"] == f"{source}_to_{target}"
        for name, parameter in model.named_parameters():
            value, state = before[name]
            if name in idle:
                assert parameter.grad is None, name
                assert torch.equal(parameter, value), name
                assert bool(state) == (name in trained), name
                for key, tensor in state.items():
                    assert torch.equal(optimizer.state[parameter][key], tensor), (name, key)
            else:
                assert not torch.equal(parameter, value), name
                trained.add(name)
    assert trained == {name for name, _ in model.named_parameters()}
    assert trainer.steps_of == dict.fromkeys(DIRECTIONS, 2)


def test_one_direction_alone_trains_every_step():
    trainer = trainer_of(DIRECTIONS[:1])
    rows = [trainer._step(step, 0, [0, 1, 2, 3]) for step in range(3)]
    assert [row["steps_of_direction"] for row in rows] == [1, 2, 3]
    assert trainer.model.pred_head["text_to_image"].weight.grad is None


@pytest.mark.parametrize(
    "directions,message",
    [
        ([], "directions: expected at least one pair of modalities, got none"),
        ([("image", "txt")], "expected known modalities, got 'txt'; did you mean 'text'?"),
        ([("text", "text")], "expected two modalities, got 'text' and itself"),
        ([*DIRECTIONS, DIRECTIONS[0]], "each pair once, got ['image', 'text'] twice"),
    ],
)
def test_directions_that_cannot_be_are_refused(directions, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_directions(directions, ["image", "text"])
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer_of(directions)
