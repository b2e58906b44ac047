"""ClipLoss and SigLipLoss over several processes: against open_clip's there, and under DDP."""

import pytest
import torch
from loss_cases import UNEVEN, Case, Result, batch
from open_clip_loss import open_clip_loss
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from m2ae_kernels.nn import ClipLoss, SigLipLoss

# Theirs, ours. Without gather_with_grad theirs leaves out a part of the gradient.
CLIP = [
    ({"local_loss": local, "gather_with_grad": True}, {"local_loss": local, "gather": gather})
    for local in (False, True)
    for gather in ("all_gather", "ring")
]
SIGLIP = [
    ({"dist_impl": way}, {"dist_impl": way}) for way in (None, "bidir", "shift", "reduce", "gather")
]
LOSSES = {"ClipLoss": CLIP, "SigLipLoss": SIGLIP}
PAIRS = [(name, index) for name, pairs in LOSSES.items() for index in range(len(pairs))]
OURS = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}


def loss_and_gradients(loss_of, rows):
    scale, bias = (torch.tensor(of, requires_grad=True) for of in (5.0, -1.5))
    x, y = (of.clone().requires_grad_() for of in (rows.query, rows.key))
    loss = loss_of(x, y, scale, bias)
    loss.backward()
    return Result(loss.detach(), x.grad, y.grad, scale.grad, bias.grad)


class Towers(nn.Module):
    """Two encoders, scale and bias, as a CLIP model has them."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(7, 6), nn.Linear(7, 6)
        self.scale, self.bias = (nn.Parameter(torch.tensor(of)) for of in (1.5, -1.5))

    def forward(self, images, texts):
        x, y = self.image(images), self.text(texts)
        return nn.functional.normalize(x), nn.functional.normalize(y), self.scale.exp(), self.bias


def towers():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Towers()


def trained(loss_of, rows, wrap=lambda model: model):
    model = towers()
    wrapped = wrap(model)  # averages gradients while it lives
    loss = loss_of(*wrapped(rows.query, rows.key), output_dict=True)["contrastive_loss"]
    loss.backward()
    return {"loss": loss.detach()} | {name: of.grad for name, of in model.named_parameters()}


def on_a_rank(rank, size):
    try:
        theirs = open_clip_loss()
    except pytest.skip.Exception:
        theirs = None
    results = {}
    place = {"rank": rank, "world_size": size}
    for name, index in PAIRS:
        with_theirs, with_ours = LOSSES[name][index]
        ours = OURS[name](**with_ours, **place)
        rows = batch(Case(), size)[0][rank]
        results["ours", name, index] = loss_and_gradients(ours, rows)
        if theirs is not None:
            loss = getattr(theirs, name)(**with_theirs, **place)
            results["theirs", name, index] = loss_and_gradients(loss, rows)
        for kind, sizes in {"even": Case().rows, "uneven": UNEVEN}.items():
            rows = batch(Case(rows=sizes), size)[0][rank]
            results[kind, name, index] = trained(ours, rows, DistributedDataParallel)
    return results


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def results(request, processes):
    return processes.run(request.param, on_a_rank)


@pytest.mark.parametrize("name, index", PAIRS)
def test_equals_open_clip_on_the_same_ranks(name, index, results):
    open_clip_loss()  # skips without it
    ours, theirs = ([of[who, name, index] for of in results] for who in ("ours", "theirs"))
    for one, other in zip(ours, theirs, strict=True):
        # Of scale and bias, the ranks have parts: not the same ones in a softmax, but of one mean.
        assert_close(one[:3], other[:3])
    for of in (3, 4):
        means = (torch.stack([rank[of] for rank in side]).mean() for side in (ours, theirs))
        assert_close(*means)


@pytest.mark.parametrize("kind", ["even", "uneven"])
@pytest.mark.parametrize("name, index", PAIRS)
def test_under_ddp_every_parameter_has_the_gradient_of_one_process(name, index, kind, results):
    size = len(results)
    sides = zip(
        *batch(Case(rows=UNEVEN if kind == "uneven" else Case().rows), size)[0], strict=True
    )
    query, key, *_ = (of if of[0] is None else torch.cat(of) for of in sides)
    expected = trained(OURS[name](), batch(Case(), 1)[0][0]._replace(query=query, key=key))
    of_ranks = [of[kind, name, index] for of in results]
    mean = torch.stack([of["loss"] for of in of_ranks]).mean()
    for of in of_ranks:
        assert_close({**of, "loss": mean}, expected)
    if name == "ClipLoss" and not LOSSES[name][index][1]["local_loss"]:
        assert all(of["loss"] == of_ranks[0]["loss"] for of in of_ranks)
