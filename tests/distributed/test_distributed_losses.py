"""Several processes against one that has all rows, in float64: the loss and every gradient."""

import pytest
import torch
from loss_cases import CASES, Result, of_one_process, on_rank
from torch.testing import assert_close

WAYS = ("all_gather", "ring")


def every_case(rank, size):
    return {
        (name, way): on_rank(case, way, rank, size) for name, case in CASES.items() for way in WAYS
    }


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def results(request, processes):
    return processes.run(request.param, every_case)


def test_the_cases_are_what_they_are_called():
    assert 0 < of_one_process(CASES["nearly converged"], 2).loss < 1e-6
    assert of_one_process(CASES["plain"], 2).loss > 0.1
    uneven, promised = CASES["uneven"], CASES["even batches, as promised"]
    assert len(set(uneven.rows[:2])) == 2
    assert len(set(promised.rows)) == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_the_mean_over_ranks_is_one_process_with_all_rows(name, way, results):
    case, size, of_ranks = CASES[name], len(results), [of[name, way] for of in results]
    whole = of_one_process(case, size)
    assert all(of.loss.dtype == torch.float32 for of in of_ranks)
    # A rank's rows are its own; DistributedDataParallel divides what it adds up by their number.
    averaged = Result(
        torch.stack([of.loss for of in of_ranks]).mean(),
        torch.cat([of.query for of in of_ranks]) / size,
        torch.cat([of.key for of in of_ranks]) / size,
        torch.stack([of.scale for of in of_ranks]).mean(),
        torch.stack([of.bias for of in of_ranks]).mean(),
    )
    for side, got, wanted in zip(Result._fields, averaged, whole, strict=True):
        largest = wanted.abs().max().clamp(min=1e-30)  # the bias of a softmax has the gradient 0
        # Of 16-bit inputs each rank's part is rounded, which may be larger than the sum. A cosine
        # that is wrong by 2**-22 is a factor exp(scale * 2**-22) to its pair's share.
        rounding = torch.finfo(got.dtype).eps if got.dtype.itemsize == 2 else 1e-5
        got, wanted = (got / largest).float(), (wanted / largest).float()
        atol = rounding + abs(case.scale) * 2**-22
        assert_close(got, wanted, rtol=0, atol=atol, msg=f"{side}: {got}, expected {wanted}")
