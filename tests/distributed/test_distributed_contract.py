"""What the docstrings of m2ae_kernels.distributed say beside the numbers: calls, groups, errors."""

import pytest
import torch
import torch.distributed as dist
from loss_cases import BIAS, Case, batch, of_one_process, on_rank
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import m2ae_kernels
from m2ae_kernels import distributed
from m2ae_kernels.nn import ClipLoss, SigLipLoss

SIZE = 4
WAYS = ("all_gather", "ring")


class Calls(TorchDispatchMode):
    """Rows and columns of each call of one of our ops, and whether it makes gradients."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "m2ae_kernels":
            name = function.name().partition("::")[2]
            first = 2 if name == "info_nce_loss_backward" else 0
            gradients = [any(of) for of in args if isinstance(of, list)]
            shape = args[first].shape[0], args[first + 1].shape[0]
            self.made.append((name, *shape, *gradients))
        return function(*args, **(kwargs or {}))


def of_rank(size, rank):
    return batch(Case(), size)[0][rank]


def error(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except (ValueError, RuntimeError) as raised:
        return f"{type(raised).__name__}: {raised}"
    return None


def on_a_rank(rank, size):
    results = {}
    rows = of_rank(size, rank)
    for op in ("info_nce_loss", "siglip_loss"):
        loss_of = getattr(distributed, op)
        for way in WAYS:
            with Calls() as calls:
                on_rank(Case(op), way, rank, size)
            results[op, way, "calls"] = calls.made
            with Calls() as calls, torch.no_grad():
                loss = loss_of(*rows[:2], 5.0, logit_bias=BIAS, gather=way)
            results[op, way, "no grad"] = loss, calls.made

            x, y = (of.clone().requires_grad_() for of in rows[:2])
            loss = loss_of(x, y, 5.0, logit_bias=BIAS, gather=way) * (rank + 1)
            loss.backward()
            results[op, way, "upstream"] = x.grad, y.grad

            with torch.autocast("cpu", torch.bfloat16):
                results[op, way, "autocast"] = loss_of(*rows[:2], 5.0, logit_bias=BIAS, gather=way)

            x = rows.query.clone().requires_grad_()
            loss = loss_of(x, rows.key, 5.0, logit_bias=BIAS, gather=way)
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            penalty = grad.square().sum()
            results[op, way, "twice"] = error(torch.autograd.grad, penalty, x)

            mask = torch.ones(4, dtype=torch.bool)
            one_differs = {
                "mask": {"key_mask": mask if rank == 1 else None},
                "D": {
                    "query": rows.query[:, : 7 - (rank == 1)],
                    "key": rows.key[:, : 7 - (rank == 1)],
                },
                "dtype": {"query": rows.query.bfloat16(), "key": rows.key.bfloat16()}
                if rank
                else {},
            }
            for what, given in one_differs.items():
                given = {"query": rows.query, "key": rows.key} | given
                sides = given.pop("query"), given.pop("key")
                results[op, way, what] = error(
                    loss_of, *sides, 5.0, logit_bias=BIAS, gather=way, **given
                )
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    for way in WAYS:
        half = of_rank(2, rank // 2)
        options = {"gather": way, "group": groups[rank % 2]}
        results[way, "group"] = distributed.info_nce_loss(*half[:2], 5.0, **options)
        results[way, "siglip group"] = distributed.siglip_loss(*half[:2], 5.0, BIAS, **options)
    results["not a member"] = error(
        distributed.info_nce_loss, *rows[:2], group=groups[(rank + 1) % 2]
    )
    for module in (ClipLoss(rank=rank, world_size=2), SigLipLoss(rank=3 - rank, world_size=size)):
        results[type(module).__name__] = error(module, *rows[:2], 5.0, BIAS)
    return results


@pytest.fixture(scope="module")
def results(processes):
    return processes.run(SIZE, on_a_rank)


@pytest.mark.parametrize(
    "way, visits, columns", [("all_gather", 1, 16), ("ring", SIZE, 4)], ids=WAYS
)
def test_local_rows_times_all_columns_are_computed_once(way, visits, columns, results):
    for of in results:
        forward, backward = ("info_nce_loss", 4, columns), ("info_nce_loss_backward", 4, columns)
        assert (
            of["info_nce_loss", way, "calls"] == [forward] * visits + [(*backward, True)] * visits
        )
        assert of["siglip_loss", way, "calls"] == [("siglip_loss", 4, columns, True)] * visits
        assert of["info_nce_loss", way, "no grad"][1] == [forward] * visits
        assert of["siglip_loss", way, "no grad"][1] == [("siglip_loss", 4, columns, False)] * visits


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", ["info_nce_loss", "siglip_loss"])
def test_without_gradients_the_value_is_the_same(op, way, results):
    mean = torch.stack([of[op, way, "no grad"][0] for of in results]).mean()
    assert_close(mean, of_one_process(Case(op), SIZE).loss.float())


def shares_in_one_process():
    """Every rank's share of info_nce_loss, differentiable, and all rows."""
    sides = zip(*(of[:2] for of in batch(Case(), SIZE)[0]), strict=True)
    x, y = (torch.cat(of).double().requires_grad_() for of in sides)
    losses = m2ae_kernels.reference.info_nce_loss(x, y, 5.0, reduction="none")
    rows, columns = (of.view(SIZE, 4).mean(1) for of in losses)
    return (rows + columns) / 2, x, y


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_the_shares_times_their_upstream(way, results):
    shares, x, y = shares_in_one_process()
    (shares * torch.arange(1, SIZE + 1)).sum().backward()
    got = [
        torch.cat([of["info_nce_loss", way, "upstream"][side] for of in results]) for side in (0, 1)
    ]
    assert_close(got, [x.grad.float(), y.grad.float()])


@pytest.mark.parametrize("way", WAYS)
def test_a_share_is_the_losses_of_the_ranks_rows_and_columns(way, results):
    shares, _, _ = shares_in_one_process()
    got = torch.stack([of["info_nce_loss", way, "no grad"][0] for of in results])
    assert_close(got, shares.detach().float())


@pytest.mark.parametrize("way", WAYS)
def test_texts_have_no_gradient_where_upstream_ones_differ(way, results):
    for of in results:
        of_images, of_texts = of["siglip_loss", way, "upstream"]
        assert of_images.isfinite().all()
        assert of_texts.isnan().all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", ["info_nce_loss", "siglip_loss"])
def test_autocast_rounds_the_features(op, way, results):
    got = torch.stack([of[op, way, "autocast"] for of in results])
    assert got.dtype == torch.float32
    expected = of_one_process(Case(op, dtype=torch.bfloat16), SIZE).loss.float()
    assert_close(got.mean(), expected)
    assert abs(expected - of_one_process(Case(op), SIZE).loss) > 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_a_group_is_all_there_is(way, results):
    for name, op in (("group", "info_nce_loss"), ("siglip group", "siglip_loss")):
        expected = of_one_process(Case(op), 2).loss.float()
        for group in (results[0::2], results[1::2]):
            assert_close(torch.stack([of[way, name] for of in group]).mean(), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", ["info_nce_loss", "siglip_loss"])
def test_errors_are_raised_on_every_rank(op, way, results):
    for of in results:
        assert of[op, way, "twice"] == (
            f"RuntimeError: {op}: expected one backward, got a second derivative;"
            f" m2ae_kernels.reference.{op} has it"
        )
        told = f"ValueError: {op}: expected every rank to agree on"
        assert of[op, way, "mask"].startswith(
            f"{told} a key_mask, got [0, 1, 0, 0] on ranks 0 to 3"
        )
        assert of[op, way, "D"].startswith(f"{told} D, got [7, 6, 7, 7] on ranks 0 to 3")
        assert of[op, way, "dtype"].startswith(f"{told} the dtype of the features, got [")


def test_modules_and_groups_are_of_this_process(results):
    for rank, of in enumerate(results):
        assert of["ClipLoss"] == (
            "ValueError: ClipLoss: expected rank and world_size of torch.distributed,"
            f" {rank} and 4, got {rank} and 2"
        )
        assert of["SigLipLoss"].endswith(f"{rank} and 4, got {3 - rank} and 4")
        assert "expected a group that this rank is in" in of["not a member"]
