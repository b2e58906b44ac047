"""The modules: open_clip's signatures and numbers, temperatures, representations, round trips."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from open_clip_loss import open_clip_loss
from torch.testing import assert_close

from m2ae_kernels import info_nce_loss, nn, nt_xent_loss, sup_con_loss

N, D = 9, 6


def pair(dtype=torch.float32):
    x = torch.randn(N, D)
    y = x + 0.5 * torch.randn(N, D)
    return tuple(torch.nn.functional.normalize(of).to(dtype).requires_grad_() for of in (x, y))


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures_begin_with_open_clips(name, method):
    theirs = inspect.signature(getattr(getattr(open_clip_loss(), name), method)).parameters
    ours = inspect.signature(getattr(getattr(nn, name), method)).parameters
    positional = [of for of in ours.values() if of.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert [of.name for of in positional][: len(theirs)] == list(theirs)
    for parameter in theirs.values():
        assert ours[parameter.name].default == parameter.default
        assert ours[parameter.name].kind == parameter.kind
    added = [of for of in ours.values() if of.name not in theirs]
    assert all(of.default is not inspect.Parameter.empty for of in added)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("as_dictionary", [True, False])
def test_equals_open_clip(name, has_bias, as_dictionary):
    x, y = pair()
    results = []
    for of in (nn, open_clip_loss()):
        scale = torch.tensor(10.0, requires_grad=True)
        bias = torch.tensor(-3.0, requires_grad=True) if has_bias else None
        loss = getattr(of, name)()(x, y, scale, bias, as_dictionary)
        if as_dictionary:
            assert list(loss) == ["contrastive_loss"]
            loss = loss["contrastive_loss"]
        inputs = [x, y, scale, *([bias] if has_bias else [])]
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    if has_bias and name == "ClipLoss":
        assert results[0].pop() == 0  # theirs is what rounding leaves of 0
        assert abs(results[1].pop()) < 1e-6
    assert_close(*results)


def test_horovod_is_refused():
    with pytest.raises(ValueError, match="ClipLoss: expected use_horovod=False, got True"):
        nn.ClipLoss(False, False, False, 0, 1, True)


def test_wrong_ways_to_travel():
    with pytest.raises(ValueError, match='ClipLoss: expected gather "all_gather" or "ring", got'):
        nn.ClipLoss(gather="bidir")
    message = "SigLipLoss: expected dist_impl bidir, shift, reduce, gather or None, got 'ring'"
    with pytest.raises(ValueError, match=message):
        nn.SigLipLoss(dist_impl="ring")


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_several_ranks_need_a_process_group(name):
    x, y = pair()
    message = f"{name}: expected rank and world_size of torch.distributed, 0 and 1, got 1 and 2"
    with pytest.raises(ValueError, match=message):
        getattr(nn, name)(rank=1, world_size=2)(x, y, 1.0, 0.0)


def test_info_nce_loss_passes_its_arguments_on():
    x, y = pair()
    ids = torch.arange(N) % 4
    rows = {
        "target": torch.arange(N).roll(1),
        "query_mask": torch.arange(N) != 2,
        "key_mask": torch.arange(N) != 5,
        "query_ids": ids,
        "key_ids": ids.roll(2),
        "weight": torch.rand(N),
    }
    options = {"normalize": True, "same_id": "ignore", "label_smoothing": 0.1}
    loss = nn.InfoNCELoss(0.2, **options)(x, y, **rows)
    assert_close(loss, info_nce_loss(x, y, 5.0, **rows, **options))
    loss = nn.InfoNCELoss(0.2, symmetric=False, reduction="none")(x, y)
    assert_close(loss[0], info_nce_loss(x, y, 5.0, symmetric=False, reduction="none")[0])
    assert loss[1] is None


def test_the_temperature_is_a_parameter_or_a_buffer():
    learnable, fixed = nn.InfoNCELoss(0.1), nn.InfoNCELoss(0.1, learnable=False)
    assert [name for name, _ in learnable.named_parameters()] == ["logit_scale"]
    assert not list(fixed.parameters())
    for module in (learnable, fixed):
        assert_close(module.logit_scale.detach(), torch.tensor(math.log(10)))
        assert list(module.state_dict()) == ["logit_scale"]
    x, y = pair()
    learnable(x, y).backward()
    scale = torch.tensor(10.0, requires_grad=True)
    info_nce_loss(x, y, scale).backward()
    assert_close(learnable.logit_scale.grad, 10 * scale.grad)


def test_a_step_beyond_the_limit_is_taken_back():
    module, (x, y) = nn.InfoNCELoss(max_scale=20.0), pair()
    with torch.no_grad():
        module.logit_scale.fill_(9.0)
    at_limit = info_nce_loss(x, y, 20.0)
    assert_close(module.eval()(x, y), at_limit)
    assert module.logit_scale == 9  # evaluation changes nothing
    # Two calls before one backward, as for two batches that share a step.
    loss = module.train()(x, y) + module(y, x)
    assert_close(loss, 2 * at_limit)
    assert_close(module.logit_scale.detach(), torch.tensor(math.log(20)))
    loss.backward()
    assert abs(module.logit_scale.grad) > 1e-3


def test_no_limit():
    module, (x, y) = nn.InfoNCELoss(0.001, max_scale=math.inf), pair()
    assert_close(module(x, y), info_nce_loss(x, y, 1000.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["temperature", "max_scale"])
def test_numbers_are_positive(name):
    with pytest.raises(ValueError, match=f"InfoNCELoss: expected {name} > 0, got 0"):
        nn.InfoNCELoss(**{name: 0})


def test_views_and_labels():
    x, y = pair()
    labels = torch.arange(N) % 3
    for normalize, reduction in ((True, "mean"), (False, "sum"), (True, "none")):
        options = {"normalize": normalize, "reduction": reduction}
        assert_close(nn.NTXentLoss(0.3, **options)(x, y), nt_xent_loss(x, y, 0.3, **options))
        got = nn.SupConLoss(0.3, **options)(x, labels)
        assert_close(got, sup_con_loss(x, labels, 0.3, **options))
    assert_close(nn.NTXentLoss()(x, y), nt_xent_loss(x, y))
    assert_close(nn.SupConLoss()(x, labels), sup_con_loss(x, labels))
    for module in (nn.NTXentLoss, nn.SupConLoss):
        with pytest.raises(ValueError, match=f"{module.__name__}: expected temperature > 0, got 0"):
            module(0)


MODULES = [
    (
        nn.InfoNCELoss(normalize=True),
        "InfoNCELoss(learnable=True, max_scale=100, symmetric=True, normalize=True,"
        " same_id='negative', label_smoothing=0, reduction='mean')",
    ),
    (
        nn.ClipLoss(True, gather="ring"),
        "ClipLoss(local_loss=True, rank=0, world_size=1, gather='ring', even_batches=False)",
    ),
    (nn.SigLipLoss(), "SigLipLoss(rank=0, world_size=1, dist_impl='bidir', even_batches=False)"),
    (nn.NTXentLoss(), "NTXentLoss(temperature=0.5, normalize=True, reduction='mean')"),
    (
        nn.SupConLoss(reduction="sum"),
        "SupConLoss(temperature=0.1, normalize=True, reduction='sum')",
    ),
]


@pytest.mark.parametrize("module, text", MODULES)
def test_modules_say_what_they_are_and_survive_copies(module, text):
    assert repr(module) == text
    for again in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert repr(again) == text
    again = type(module)()
    again.load_state_dict(module.state_dict())


def test_a_state_dict_carries_the_temperature():
    for learnable in (True, False):
        module = nn.InfoNCELoss(0.3, learnable)
        again = nn.InfoNCELoss(0.9, learnable)
        again.load_state_dict(module.state_dict())
        assert again.logit_scale == module.logit_scale
