"""The target encoder follows its source, has no gradient, and is part of what is saved."""

import copy

import pytest
import torch
from torch.testing import assert_close

from m2ae.config import ImageConfig
from m2ae.modalities.image import ImageEncoder
from m2ae.models.target import TargetEncoder


@pytest.fixture
def pair():
    """(source, target), whose parameters differ."""
    source = ImageEncoder(ImageConfig(32, 8, embed_dim=24, depth=1, heads=2))
    target = TargetEncoder(source)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter))
    return source, target


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.996, torch.tensor(0.996, dtype=torch.float64)])
def test_update_is_the_weighted_mean(pair, decay):
    source, target = pair
    old = copy.deepcopy(target.encoder.state_dict())
    target.update(decay)
    for name, new in target.encoder.named_parameters():
        expected = torch.lerp(old[name], source.get_parameter(name), 1 - float(decay))
        # the op's formula is lerp's, so the bits are the same; 1 - decay may be rounded once more
        assert_close(new.detach(), expected, rtol=1e-6, atol=1e-7)
        exact = (
            float(decay) * old[name].double()
            + (1 - float(decay)) * source.get_parameter(name).double()
        )
        assert_close(new.detach().double(), exact, rtol=1e-6, atol=1e-6)


def test_a_decay_of_one_leaves_every_bit(pair):
    source, target = pair
    old = copy.deepcopy(target.encoder.state_dict())
    with torch.no_grad():
        source.proj.bias[0] = torch.nan
    target.update(1.0)
    for name, value in target.encoder.state_dict().items():
        assert torch.equal(value, old[name])


def test_buffers_are_copied(pair):
    source, target = pair
    source.mean.add_(1)
    target.update(0.9)
    assert torch.equal(target.encoder.mean, source.mean)


def test_target_has_no_gradient(pair):
    _, target = pair
    image = torch.rand(2, 3, 32, 32, requires_grad=True)
    features = target(image)
    assert features.grad_fn is None
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert_close(features.mean(-1), torch.zeros(2, 16), rtol=0, atol=1e-5)
    assert_close(features.var(-1, correction=0), torch.ones(2, 16), rtol=0, atol=1e-3)


def test_source_is_not_part_of_the_target(pair):
    source, target = pair
    own = {id(parameter) for parameter in target.parameters()}
    assert not own & {id(parameter) for parameter in source.parameters()}
    assert set(target.state_dict()) == {f"encoder.{name}" for name in source.state_dict()}


def test_target_stays_in_eval_mode(small):
    small.train()
    assert small.training
    assert not any(module.training for module in small.target_encoder.modules())


def test_a_copied_model_follows_itself(small):
    twin = copy.deepcopy(small)
    with torch.no_grad():
        twin.image_encoder.proj.bias.fill_(3.0)
    twin.target_encoder.update(0.0)
    small.target_encoder.update(0.0)
    assert (twin.target_encoder.encoder.proj.bias == 3).all()
    assert not (small.target_encoder.encoder.proj.bias == 3).any()


def test_a_training_step_moves_the_target_by_the_average_alone(small, make_inputs):
    trained = [parameter for parameter in small.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    targets = set(small.target_encoder.parameters())
    assert not targets & set(trained)
    old = copy.deepcopy(small.target_encoder.state_dict())
    small(make_inputs()).loss.backward()
    optimizer.step()
    for name, value in small.target_encoder.state_dict().items():
        assert torch.equal(value, old[name])
