"""info_nce_loss, every kernel against float64: shapes, dtypes, reductions, layouts, repeats.

What can go wrong in a contrastive loss, and which tests look for it; the file is test_info_nce_loss
with the suffix in brackets:

 1 scales, gradient of the scale     test_scales, test_scale_* [_scales]
 2 logits far from 0                 test_opposite_cones, test_logits_of_millions [_scales]
 3 ragged shapes                     test_ragged_*, test_ragged_with_logits_below_minus_88
 4 one pair                          test_one_pair_*
 5 equal rows, duplicates            test_equal_rows, test_duplicate_pairs, test_long_sums_* [_sums]
 6 norms of 0, 1e-20, 1e20           test_zero_and_extreme_norms_* [_norms]
 7 nearly converged pairs            test_nearly_converged_* [_converged]
 8 accumulation, underflow           test_accumulation_*, test_negatives_*, test_grad_scaler_*
                                     [_sums]
 9 NaN and inf                       test_nan_spreads_only_*, test_absent_rows_* [_masks]
10 masks                             test_masks_*, test_empty_masks, test_ignored_* [_masks]
11 positives, ids, smoothing         [_positives], [_ids], [_reductions]
12 non-square, frozen sides          test_non_square, test_gradients_that_are_needed
13 upstream gradients                test_upstream_*; second derivative [_torch], [_reference]
14 strides, 64-bit indices           test_strides, test_strides_beyond_2_to_the_31; [_sums], [_gpu]
15 repeatability, chunks             test_repeats_*, test_chunks_*, test_kept_* [_workspace]
16 torch                             [_torch], [_gpu]
17 distributed                       test_column_statistics_of_other_ranks [_statistics];
                                     tests/distributed

The definition: info_nce_cases.exact, brute force [_reference]. Metrics [_metrics], memory
[_workspace], refusals [_arguments].
"""

import itertools
import math

import numpy as np
import pytest
import torch
from info_nce_cases import assert_matches, exact, features, number
from interpreter import fewer, interpret_only, interpreted, skip_if_interpreted
from torch.testing import assert_close

# (N, M, D): around one vector, one tile of 16, 64, 128 and 256, and odd ones between
RAGGED = [(1, 2, 1), (2, 2, 8), (3, 7, 5), (15, 16, 17), (17, 17, 17), (16, 63, 8), (64, 65, 96)]
RAGGED += [(2, 129, 33), (65, 127, 40)]
LARGE = [(128, 129, 200), (255, 257, 384), (3, 1000, 768), (1000, 1000, 17), (65, 4097, 1)]
LARGE += [(1, 255, 1152), (63, 64, 1000)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("N,M,D", RAGGED)
def test_ragged_shapes(N, M, D, normalize, symmetric, impl):
    interpret_only(
        "1-2-1-True-True",
        "3-7-5-False-False",
        "17-17-17-True-False",
        "2-129-33-False-True",
        "65-127-40-True-True",
    )
    op, device = impl
    query, key = features(N, M, D=D, device=device)
    given = {"normalize": normalize, "symmetric": symmetric}
    assert_matches(op, query, key, number(1 / 0.07, device), **given)
    assert_matches(op, query, key, 5.0, target_offset=M - N, reduction="sum", **given)


@pytest.mark.parametrize("N,M,D", LARGE)
def test_ragged_large_shapes(N, M, D, impl):
    skip_if_interpreted("and more tiles of the same kinds as in the small shapes")
    op, device = impl
    query, key = features(N, M, D=D, device=device)
    assert_matches(op, query, key, number(1 / 0.07, device), normalize=True)
    query, key = (t.bfloat16().detach().requires_grad_() for t in (query, key))
    assert_matches(op, query, key, number(1 / 0.07, device), target_offset=M - N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N,M", [(3, 65), (17, 100), (66, 67)])
def test_ragged_with_logits_below_minus_88(N, M, dtype, impl):
    interpret_only("3-65-torch.float32", "17-100-torch.bfloat16")
    # A row of padding that enters a maximum or a sum has the logit 0: exp(0) is all there is then.
    op, device = impl
    query, key = features(N, M, D=8, device=device, dtype=dtype)
    with torch.no_grad():
        query.mul_(0.05)[:, 0] = 1.0
        key.mul_(0.05)[:, 0] = -1.0
    for scale in fewer((100.0, 1000.0)):
        assert_matches(op, query, key, number(scale, device))
        assert_matches(op, query, key, number(scale, device), normalize=True, reduction="none")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_halves(normalize, dtype, impl):
    interpret_only("True-torch.float16", "False-torch.bfloat16")
    op, device = impl
    query, key = features(20, 70, D=24, device=device, dtype=dtype)
    for scale in (number(10.0, device), number(10.0, device, dtype)):
        assert_matches(op, query, key, scale, normalize=normalize)
    target = torch.randint(0, 70, (20,), device=device)
    assert_matches(op, query, key, scale, target=target, normalize=normalize, reduction="none")


def test_one_pair_has_no_loss(impl):
    op, device = impl
    for dtype, normalize in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        query, key = features(1, 1, D=8, device=device, dtype=dtype)
        scale = number(10.0, device)
        loss = op(query, key, scale, normalize=normalize)
        assert loss.item() == 0
        assert not any(grad.any() for grad in torch.autograd.grad(loss, (query, key, scale)))


@pytest.mark.parametrize("side", ["query_mask", "key_mask"])
def test_one_pair_that_is_masked(side, impl):
    op, device = impl
    query, key = features(1, 1, D=8, device=device)
    mask = torch.zeros(1, dtype=torch.bool, device=device)
    loss = op(query, key, **{side: mask})
    assert loss.item() == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (query, key)))


@pytest.mark.parametrize("N,D", [(70, 8), (5, 0)])
def test_equal_rows(N, D, impl):
    op, device = impl
    query, key = (torch.full((N, D), 0.3, device=device, requires_grad=True) for _ in range(2))
    loss_q, loss_k = op(query, key, 14.3, reduction="none")
    for loss in (loss_q, loss_k):  # every probability is 1 / N
        assert_close(loss, torch.full((N,), math.log(N), device=device))
    assert_close(op(query, key, 14.3), torch.tensor(math.log(N), device=device))


def test_duplicate_pairs(impl):
    op, device = impl
    query, key = (t.detach().repeat(3, 1) for t in features(12, 12, D=16, device=device))
    query, key = query.requires_grad_(), key.requires_grad_()
    scale = number(20.0, device)
    assert_matches(op, query, key, scale, normalize=True)
    (grad,) = torch.autograd.grad(op(query, key, scale, normalize=True), query)
    assert_close(grad[:12], grad[12:24])
    assert_close(grad[:12], grad[24:])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("N,M,offset", [(5, 70, 0), (5, 70, 65), (33, 40, 3), (70, 5, 0)])
def test_non_square(N, M, offset, symmetric, impl):
    interpret_only("5-70-65-True", "70-5-0-False")
    op, device = impl
    query, key = features(N, M, D=12, device=device)
    given = {"target_offset": offset, "symmetric": symmetric}
    if N > M:
        given["target"] = torch.arange(N, device=device) % M
    assert_matches(op, query, key, number(9.0, device), **given)
    _, loss_k = op(query, key, 9.0, reduction="none", **given)
    if symmetric and N < M:  # a key that is nobody's positive is a negative, and has no loss
        alone = torch.ones(M, dtype=torch.bool, device=device)
        alone[offset : offset + N] = False
        assert not loss_k[alone].any()
        assert loss_k[~alone].all()


@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=3)), ids=str)
def test_gradients_that_are_needed(needed, impl):
    interpret_only("(True, False, True)", "(False, True, False)")
    op, device = impl
    inputs = [*features(5, 6, D=4, device=device), torch.tensor(8.0, device=device)]
    inputs = [t.detach().requires_grad_() for t in inputs]
    wanted = torch.autograd.grad(op(*inputs, normalize=True), inputs)
    for tensor, needs in zip(inputs, needed, strict=True):
        tensor.requires_grad_(needs)
    loss = op(*inputs, normalize=True)
    assert loss.requires_grad == any(needed)
    for _ in range(2 * any(needed)):
        loss.backward(retain_graph=True)
    for tensor, needs, grad in zip(inputs, needed, wanted, strict=True):
        assert (tensor.grad is not None) == needs
        if needs:  # that of the scale may be summed over the rows of either side
            assert_close(tensor.grad, 2 * grad)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_upstream_gradients_of_rows(dtype, symmetric, impl):
    interpret_only("torch.float32-True", "torch.bfloat16-False")
    op, device = impl
    query, key = features(21, 30, D=8, device=device, dtype=dtype)
    target = torch.randint(0, 30, (21,), device=device)
    given = {"target": target, "symmetric": symmetric, "reduction": "none"}
    assert_matches(op, query, key, number(8.0, device), **given)  # of either sign, by randn
    losses = [loss for loss in op(query, key, 8.0, **given) if loss is not None]
    inputs = (query, key)
    nothing = torch.autograd.grad(
        losses, inputs, [torch.zeros_like(loss) for loss in losses], retain_graph=True
    )
    assert not any(grad.any() for grad in nothing)
    # One row alone: the others' share in the gradient of the logits is exactly 0.
    one = [torch.zeros_like(loss) for loss in losses]
    one[0][4] = -3.0
    grad_q, _ = torch.autograd.grad(losses, inputs, one)
    assert grad_q[4].any()
    assert not grad_q[:4].any()
    assert not grad_q[5:].any()


def test_upstream_gradient_of_one_direction(impl):
    op, device = impl
    query, key = features(9, 12, D=8, device=device)
    for direction in (0, 1):
        actual = op(query, key, 8.0, reduction="none")[direction]
        expected = exact(query, key, 8.0, reduction="none")[direction]
        upstream = torch.randn_like(actual)
        grads = torch.autograd.grad(actual, (query, key), upstream)
        wanted = torch.autograd.grad(expected, (query, key), upstream.double())
        for grad, right in zip(grads, wanted, strict=True):
            assert_close(grad, right)


def test_strides(impl):
    op, device = impl
    N, D = 9, 6
    query, key = (t.detach() for t in features(N, N, D=D, device=device))
    memory = torch.full((2 * N * (D + 3) + 1,), torch.nan, device=device)  # what is not theirs
    layouts = {
        "transposed": query.mT.contiguous().mT,
        "at an odd address": memory[1 : 1 + N * D].view(N, D),
        "columns of a wider one": memory[: N * (D + 3)].view(N, D + 3)[:, 1 : D + 1],
        "every other row": memory[1 : 1 + 2 * N * D].view(2 * N, D)[::2],
        "every other column": memory[: N * 2 * D].view(N, 2 * D)[:, ::2],
        "expanded rows": query[:1].expand(N, -1),
        "expanded columns": query[:, :1].expand(-1, D),
    }
    mask = torch.tensor([True, False], device=device).repeat(N)[::2]
    target = torch.arange(2 * N, device=device).flip(0)[::2] // 2
    for name, view in fewer(layouts.items(), 4):
        memory.fill_(torch.nan)
        view = view if name.startswith(("expanded", "transposed")) else view.copy_(query)
        for x, y in fewer(((view, key), (key, view))):
            given = {"target": target, "key_mask": mask, "query_ids": target, "key_ids": target}
            inputs = [t.detach().requires_grad_() for t in (x, y)]
            assert_matches(op, *inputs, 9.0, same_id="ignore", normalize=True, **given)


def test_strides_of_upstream_gradients(impl):
    op, device = impl
    query, key = features(9, 9, D=6, device=device)
    losses = op(query, key, reduction="none")
    wide = torch.randn(9, 2, device=device)
    views = [wide[:, 0], wide[:1, 1].expand(9)]
    grads = torch.autograd.grad(losses, (query, key), views, retain_graph=True)
    wanted = torch.autograd.grad(losses, (query, key), [view.contiguous() for view in views])
    assert all(map(torch.equal, grads, wanted))


def test_strides_beyond_2_to_the_31(impl):
    op, device = impl
    if device == "cpu":  # zeros that no page of memory stands for until it is written to
        memory = torch.from_numpy(np.zeros(2**31 + 2**28, dtype=np.float16))
    else:
        memory = torch.zeros(2**31 + 2**28, dtype=torch.float16, device=device)
    query, key = features(3, 3, D=8, device=device, dtype=torch.float16)
    far = memory.as_strided((3, 8), (2**30, 1)).copy_(query.detach())
    assert far.stride(0) * 2 == 2**31
    assert_close(op(far, key), op(query, key))
    assert_close(op(key, far), op(key, query))


def test_repeats_bitwise(impl):
    op, device = impl
    N, M = (34, 66) if interpreted() else (150, 140)
    query, key = features(N, M, D=16, device=device)
    scale = number(8.0, device)
    target = torch.randint(0, 20, (N,), device=device)
    runs = []
    for _ in range(2 if interpreted() else 20):
        loss = op(query, key, scale, target=target, normalize=True)
        runs.append((loss, *torch.autograd.grad(loss, (query, key, scale))))
    assert all(all(map(torch.equal, run, runs[0])) for run in runs)


@pytest.mark.parametrize("count", [2, 3])
def test_repeats_with_several_threads(count, impl):
    skip_if_interpreted("by one thread")
    op, device = impl
    query, key = features(700, 300, D=40, device=device)
    target = torch.randint(0, 50, (700,), device=device)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        runs = []
        for _ in range(5):
            loss = op(query, key, 8.0, target=target, normalize=True)
            runs.append((loss, *torch.autograd.grad(loss, (query, key))))
        assert all(all(map(torch.equal, run, runs[0])) for run in runs)
        assert_matches(op, query, key, number(8.0, device), target=target, normalize=True)
    finally:
        torch.set_num_threads(threads)


def test_nothing_to_learn_from(impl):
    op, device = impl
    query, key = features(3, 4, D=8, device=device)
    scale = number(10.0, device)
    ignored = torch.full((3,), -100, device=device)
    nothing = [
        (query[:0], key, {}),
        (query[:0], key[:0], {"normalize": True}),
        (query, key[:0], {"target": ignored}),
        (query, key, {"target": ignored}),
    ]
    for (x, y, given), reduction in itertools.product(nothing, fewer(("mean", "sum"))):
        loss = op(x, y, scale, reduction=reduction, **given)
        assert loss.item() == 0
        assert not any(grad.any() for grad in torch.autograd.grad(loss, (query, key, scale)))
    loss_q, loss_k = op(query[:0], key, scale, reduction="none")
    assert loss_q.shape == (0,)
    assert loss_k.tolist() == [0.0] * 4
