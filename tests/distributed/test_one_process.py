"""m2ae_kernels.distributed without process groups: what the ops of one process do."""

import pytest
import torch
from loss_cases import CASES, Result, batch, result
from torch.testing import assert_close

import m2ae_kernels
from m2ae_kernels import distributed

WAYS = ("all_gather", "ring")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_op(name, way):
    case = CASES[name]
    loss_of, op = getattr(distributed, case.op), getattr(m2ae_kernels, case.op)
    options = {key: of for key, of in case.options.items() if key != "even_batches"}
    got = result(loss_of, case, batch(case, 1)[0][0], **case.options, gather=way)
    expected = result(op, case, batch(case, 1)[0][0], **options)
    assert_close(got, expected, rtol=0, atol=0)
    assert isinstance(got, Result)


@pytest.mark.parametrize("op", ["info_nce_loss", "siglip_loss"])
def test_gather_is_one_of_two(op):
    x = torch.zeros(2, 3)
    message = rf'{op}: expected gather "all_gather" or "ring", got "?\'gather\''
    with pytest.raises(ValueError, match=message):
        getattr(distributed, op)(x, x, 1.0, logit_bias=0.0, gather="gather")
