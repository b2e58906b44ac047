"""The registered op of info_nce_loss and its backward: statistics of rows, and what is done with
those that others have made. Their meaning: m2ae_kernels/ops/_info_nce_loss_op.py.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from info_nce_cases import EPS, entries, exact, features, number, rounding, rows_of
from interpreter import fewer, interpret_only
from torch import Tensor
from torch.testing import assert_close

from m2ae_kernels.ops._contrastive_pairs import SAME_ID


class Outputs(NamedTuple):
    loss_q: Tensor
    loss_k: Tensor
    neg_q: Tensor
    neg_k: Tensor
    pos_q: Tensor
    pos_k: Tensor
    num_q: Tensor
    num_k: Tensor
    rnorm_q: Tensor
    rnorm_k: Tensor
    rank_q: Tensor
    rank_k: Tensor
    kept: Tensor


class Call:
    """One call of the op: its arguments, and the calls they make."""

    def __init__(self, query, key, scale, *, workspace=1 << 29, **given):
        self.features = query, key
        masks = ("target", "query_mask", "key_mask", "query_ids", "key_ids")
        scale = torch.as_tensor(scale, dtype=torch.float32, device=query.device)
        self.inputs = query, key, scale, *(given.get(name) for name in masks)
        defaults = {"target_offset": 0, "ignore_index": -100, "same_id": "negative"}
        defaults |= {"exclude_self": False, "normalize": False, "eps": 1e-12, "symmetric": True}
        options = {name: given.get(name, value) for name, value in defaults.items()}
        self.options = tuple(options.values())
        self.options = *self.options[:2], SAME_ID[options["same_id"]], *self.options[3:]
        self.workspace = workspace

    def forward(self, ranks=False, keep=False):
        op = torch.ops.m2ae_kernels.info_nce_loss
        return Outputs(*op(*self.inputs, *self.options, ranks, keep, False, self.workspace))

    def backward(self, grad_q, grad_k, outputs, needed=(True, True, True)):
        op = torch.ops.m2ae_kernels.info_nce_loss_backward
        saved = (*outputs[2:10], outputs.kept)
        rest = (*self.options, False, self.workspace, list(needed))
        return op(grad_q, grad_k, *self.inputs, *saved, *rest)


@pytest.fixture
def case(impl):
    """Arguments with everything: keys of several queries, absent rows, ignored ones, ids."""
    _, device = impl
    query, key = (t.detach() for t in features(20, 70, D=6, device=device))
    target = torch.randint(0, 9, (20,), device=device)
    target[::5] = -100
    given = {"target": target, "normalize": True}
    given["query_mask"] = torch.arange(20, device=device) % 7 != 1
    given["key_mask"] = torch.arange(70, device=device) % 6 != 1
    given["query_ids"] = torch.arange(20, device=device) % 6
    given["key_ids"] = torch.arange(70, device=device) % 9
    return query, key, 7.0, given


@pytest.mark.parametrize("same_id", SAME_ID)
def test_statistics(same_id, case, impl):
    *inputs, given = case
    outputs = Call(*inputs, same_id=same_id, **given).forward()
    near, far = rounding(*inputs, **given)
    x, y = rows_of(*inputs[:2], **given)
    pairing = {name: value for name, value in given.items() if name != "normalize"}
    absent, positive, _, counts = entries(20, 70, x.device, same_id=same_id, **pairing)
    logits = 7 * x @ y.mT
    negative = ~absent & ~positive
    sides = {
        "q": (logits, negative, positive & counts[:, None]),
        "k": (logits.mT, negative.mT, positive.mT),
    }
    for side, (z, of_negatives, of_positives) in sides.items():
        number = of_positives.sum(1)
        assert number.unique().numel() > 1
        assert (number == 0).any()
        assert torch.equal(getattr(outputs, f"num_{side}"), number.float())
        pos = z.masked_fill(~of_positives, -torch.inf).logsumexp(1)
        pos = torch.where(number > 0, pos, 0)
        assert_close(getattr(outputs, f"pos_{side}").double(), pos, rtol=near, atol=far)
        neg = z.masked_fill(~of_negatives, -torch.inf).logsumexp(1) - pos
        assert_close(getattr(outputs, f"neg_{side}").double(), neg, rtol=near, atol=2 * far)
    losses = exact(*inputs, same_id=same_id, reduction="none", **given)
    for actual, expected in zip(outputs, losses, strict=False):
        assert_close(actual.double(), expected, rtol=near, atol=far)


def test_statistics_of_norms(case, impl):
    *inputs, given = case
    outputs = Call(*inputs, **given).forward()
    for z, mask, rnorm in (
        (inputs[0], given["query_mask"], outputs.rnorm_q),
        (inputs[1], given["key_mask"], outputs.rnorm_k),
    ):
        expected = z.double().norm(dim=1).reciprocal().float()
        assert_close(rnorm[mask], expected[mask])


def test_outputs_are_new_contiguous_and_of_their_dtypes(case, impl):
    *inputs, given = case
    for symmetric, normalize, ranks, keep in fewer(itertools.product([True, False], repeat=4), 4):
        call = Call(*inputs, **given | {"symmetric": symmetric, "normalize": normalize})
        outputs = call.forward(ranks, keep)
        sizes = {"q": 20, "k": 70 if symmetric else 0}
        for name, tensor in outputs._asdict().items():
            kind, _, side = name.partition("_")
            wanted = (sizes.get(side, 0),)
            if kind == "rnorm":
                wanted = ({"q": 20, "k": 70}[side] if normalize else 0,)
            if kind == "rank" and not ranks:
                wanted = (0,)
            if kind == "kept" and keep:
                wanted = (20, 70)
            assert tensor.shape == wanted, name
            assert tensor.is_contiguous()
            assert tensor.dtype == (torch.int64 if kind == "rank" else torch.float32)
        given_ = [t for t in call.inputs if t is not None]
        places = [t.untyped_storage().data_ptr() for t in (*outputs, *given_) if t.numel()]
        assert len(places) == len(set(places))


def test_kept_repeats_and_serves_the_backward(case, impl):
    *inputs, given = case
    for same_id, symmetric in fewer(itertools.product(reversed(SAME_ID), (True, False))):
        call = Call(*inputs, same_id=same_id, symmetric=symmetric, **given)
        outputs = call.forward(keep=True)
        assert not outputs.kept.isnan().any()  # which fresh memory is
        assert torch.equal(outputs.kept, call.forward(keep=True).kept)
        upstream = [torch.randn_like(loss) for loss in outputs[:2]]
        before = outputs.kept.clone()
        grads = call.backward(*upstream, outputs)
        again = call.backward(*upstream, outputs)
        assert torch.equal(outputs.kept, before)  # another backward may follow
        computed = call.backward(*upstream, call.forward())
        assert all(map(torch.equal, grads, again))
        for grad, wanted in zip(grads, computed, strict=True):
            assert_close(grad, wanted, rtol=32 * EPS, atol=EPS)


def test_backward_makes_what_is_needed(case, impl):
    *inputs, given = case
    call = Call(*inputs, **given)
    outputs = call.forward()
    upstream = [torch.randn_like(loss) for loss in outputs[:2]]
    everything = call.backward(*upstream, outputs)
    for needed in fewer(itertools.product([True, False], repeat=3), 5):
        grads = call.backward(*upstream, outputs, needed)
        for grad, wanted, need in zip(grads, everything, needed, strict=True):
            # That of the scale may be summed over the rows of either side.
            assert_close(grad, wanted if need else wanted.new_empty(0))


def combined(statistics):
    """Of several ranks' rows, what a column has of all of them."""
    negatives = torch.stack([s.neg_k + s.pos_k for s in statistics])  # pos is 0 without positives
    positives = torch.stack([torch.where(s.num_k > 0, s.pos_k, -torch.inf) for s in statistics])
    num = sum(s.num_k for s in statistics)
    pos = torch.where(num > 0, positives.logsumexp(0), 0)
    return negatives.logsumexp(0) - pos, pos, num


@pytest.mark.parametrize("same_id", SAME_ID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_column_statistics_of_other_ranks(dtype, same_id, case, impl):
    interpret_only("torch.float32-negative", "torch.bfloat16-positive")
    # Each rank has some queries and all keys; the sums of the columns are those of all ranks.
    query, key, scale, given = case
    query, key = query.to(dtype), key.to(dtype)
    by_row = ("target", "query_mask", "query_ids")
    whole = Call(query, key, scale, same_id=same_id, **given)
    expected = whole.forward()
    upstream = [torch.randn_like(loss) for loss in expected[:2]]
    wanted = whole.backward(*upstream, expected)
    calls, parts = [], (slice(0, 6), slice(6, 7), slice(7, 20))
    for part in parts:
        own = {name: value[part] if name in by_row else value for name, value in given.items()}
        calls.append(Call(query[part], key, scale, same_id=same_id, **own))
    local = [call.forward() for call in calls]
    neg, pos, num = combined(local)
    assert_close(neg, expected.neg_k)
    assert_close(pos, expected.pos_k)
    assert torch.equal(num, expected.num_k)
    assert (num > torch.stack([own.num_k for own in local])).all(0).any()
    grads = [
        call.backward(upstream[0][part], upstream[1], own._replace(neg_k=neg, pos_k=pos, num_k=num))
        for call, part, own in zip(calls, parts, local, strict=True)
    ]
    near = 64 * EPS if dtype == torch.float32 else 6e-3  # rounded here and there
    dquery = torch.cat([grad[0] for grad in grads])
    dkey, dscale = (sum(grad[i].double() for grad in grads) for i in (1, 2))
    for actual, right in zip((dquery, dkey, dscale), wanted, strict=True):
        assert (actual.double() - right.double()).norm() <= near * right.double().norm()


def test_offset_of_other_ranks(impl):
    _, device = impl
    query, key = (t.detach() for t in features(12, 70, D=6, device=device))
    expected = Call(query, key, 9.0).forward()
    for start, stop in ((0, 5), (5, 12)):
        part = Call(query[start:stop], key, 9.0, target_offset=start).forward(ranks=True)
        assert_close(part.loss_q, expected.loss_q[start:stop])
        own = torch.zeros(70, dtype=torch.bool, device=device)
        own[start:stop] = True
        assert torch.equal(part.num_k > 0, own)
        assert torch.equal(part.rank_k == stop - start, ~own)


def test_large_and_small_upstream_gradients_side_by_side(impl):
    _, device = impl
    query, key = (t.detach() for t in features(12, 20, D=6, device=device))
    call = Call(query, key, 9.0)
    outputs = call.forward()
    for size in (1e-20, 1.0, 1e20):
        upstream = [size * torch.randn_like(loss) for loss in outputs[:2]]
        x, y = (t.double().requires_grad_() for t in (query, key))
        s = number(9.0, device, torch.float64)
        losses = exact(x, y, s, reduction="none")
        wanted = torch.autograd.grad(losses, (x, y, s), [u.double() for u in upstream])
        for grad, right in zip(call.backward(*upstream, outputs), wanted, strict=True):
            assert (grad.double() - right).norm() <= 64 * EPS * right.norm()
