"""moe_sort: order, capacity and padding of every kernel, against a loop over slots.

What a mixture of experts gets wrong elsewhere, and the test that would show it here:

| trap | test |
|---|---|
| experts nobody chose; all to one; T = 0; k = E | test_order_of_every_routing |
| order inside an expert random, or by unstable sort | test_order_of_every_routing, test_repeats |
| capacity 0, 1, full, more than T; whom it drops | test_capacity |
| ties and NaN among the weights that decide it | test_equal_and_nan_weights |
| no second choice before a first | test_slot_policy_keeps_first_choices |
| padding to 8, 16, 64, 128 | test_padding |
| ids of -1; the same expert twice; ids out of range | test_order_of_every_routing, test_bad_ids_* |
| int64 ids that wrap around in int32 | test_ids_of_int64 |
| results that depend on the number of threads | test_threads |
| host syncs, sizes that depend on data | test_compiles_to_one_graph, test_no_sync |
| rows of padding in gradients | test_moe_permute.py, test_moe_unpermute.py: test_poison |
| tokens with every slot dropped | test_moe_unpermute.py: test_token_without_slots |
| sums in 16 bits, cancellation | test_moe_unpermute.py: test_cancellation |
| streams of the same tokens | test_moe_permute.py: test_streams |
| the order of tokens showing | test_moe_unpermute.py: test_permutation_equivariance |
"""

import pytest
import torch
from moe_cases import ROUTINGS, distinct_ids, routing_by_loops, routing_named
from torch.library import opcheck

from m2ae_kernels import moe_sort, reference

POLICIES = ["position", "slot", "prob"]


def assert_routing(actual, expected):
    for name, x, y in zip(expected._fields, actual, expected, strict=True):
        assert x.dtype == torch.int32, name
        assert x.cpu().tolist() == y.tolist(), name


def sort(op, ids, E, weights=None, **given):
    """By the op and by loops; both must agree."""
    actual = op(ids, E, topk_weights=weights, **given)
    listed = None if weights is None else weights.tolist()
    expected = routing_by_loops(ids.tolist(), E, weights=listed, **given)
    if ids.shape[0] == 0:
        expected = expected._replace(inverse_ids=torch.empty(0, ids.shape[1]))
    assert_routing(actual, expected)
    return actual


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("name", ROUTINGS)
def test_order_of_every_routing(name, align, impl):
    op, device = impl
    ids, E = routing_named(name)
    routing = sort(op, ids.to(device), E, align=align)
    # The same, said without the loops: a permutation and its inverse, ascending in each expert.
    inverse = routing.inverse_ids.flatten()
    kept = (inverse >= 0).nonzero().squeeze(1)
    assert routing.sorted_ids[inverse[kept].long()].tolist() == kept.tolist()
    assert kept.numel() == (ids >= 0).sum()
    for begin, count in zip(routing.expert_offsets, routing.tokens_per_expert, strict=False):
        slots = routing.sorted_ids[begin : begin + count]
        assert (slots.diff() > 0).all()
    assert routing.tokens_per_expert.sum() == kept.numel()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capacity", [0, 1, 3, 8, 9, 10, 1000])
def test_capacity(capacity, policy, impl):
    op, device = impl
    for ids, E in (
        (distinct_ids(40, 4, 12, likes=1 / torch.arange(1.0, 13.0)), 12),
        (distinct_ids(9, 5, 5), 5),  # 9 each: exactly full, one short, one over
        (torch.zeros(9, 1, dtype=torch.int32), 3),
        (routing_named("some masked")[0], 12),
        (distinct_ids(0, 2, 3), 3),
    ):
        weights = torch.rand(ids.shape, device=device)
        given = {"capacity": capacity, "drop_policy": policy}
        routing = sort(op, ids.to(device), E, weights, **given)
        assert (routing.tokens_per_expert <= capacity).all()
        sort(op, ids.to(device), E, weights, align=8, **given)


@pytest.mark.parametrize("E", [256, 257, 288, 1000, 2048])
def test_many_experts(E, impl):
    op, device = impl
    ids = distinct_ids(500, 3, E).to(device)
    ids[:, 0] = E - 1
    weights = torch.rand(500, 3, device=device)
    sort(op, ids, E, weights)
    sort(op, ids, E, weights, capacity=7, drop_policy="prob", align=16)


def test_more_experts_than_cuda_sorts(impl, request):
    op, device = impl
    ids = torch.tensor([[2048, 0]], dtype=torch.int32, device=device)
    if request.node.callspec.params["impl"].startswith(("emulated", "cuda")):
        with pytest.raises(ValueError, match="expected at most 2048 experts on CUDA, got 2049"):
            op(ids, 2049)
    else:
        assert op(ids, 2049).sorted_ids[:2].tolist() == [1, 0]


@pytest.mark.parametrize("policy", POLICIES)
def test_capacity_of_many_slots(policy, impl):
    op, device = impl
    ids = distinct_ids(3000, 2, 5, likes=torch.tensor([8.0, 4, 2, 1, 1])).to(device)
    weights = torch.rand(3000, 2, device=device).mul(50).floor()  # with ties at every border
    sort(op, ids, 5, weights, capacity=1100, drop_policy=policy, align=64)


def test_equal_and_nan_weights(impl):
    op, device = impl
    nan, inf = float("nan"), float("inf")
    rows = [[0.5, nan], [nan, 0.5], [-0.0, 0.0], [0.0, -0.0], [inf, -inf], [0.5, 0.5], [nan, nan]]
    weights = torch.tensor(rows, device=device)
    ids = torch.tensor([[0, 1]] * 7, device=device)
    for capacity in range(8):
        sort(op, ids, 2, weights, capacity=capacity, drop_policy="prob")
    for dtype in (torch.bfloat16, torch.float16):  # compared as float32, which holds them
        routing = op(ids, 2, capacity=3, drop_policy="prob", topk_weights=weights.to(dtype))
        assert_routing(
            routing,
            routing_by_loops(ids.tolist(), 2, capacity=3, drop_policy="prob", weights=rows),
        )


def test_slot_policy_keeps_first_choices(impl):
    op, device = impl
    ids = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]], device=device)
    position = op(ids, 2, capacity=2)
    slot = op(ids, 2, capacity=2, drop_policy="slot")
    assert (position.inverse_ids >= 0).tolist() == [[True, True]] * 2 + [[False, False]] * 2
    assert (slot.inverse_ids >= 0).tolist() == [[True, False]] * 4
    assert slot.sorted_ids.tolist() == [4, 6, 0, 2, -1, -1, -1, -1]


@pytest.mark.parametrize("align", [8, 16, 64, 128])
def test_padding(align, impl):
    op, device = impl
    for ids, E in (
        (distinct_ids(100, 3, 6), 9),  # the last three experts are empty: they take no row
        (torch.arange(128, dtype=torch.int32)[:, None] % 2, 2),  # counts that need no padding
        (distinct_ids(0, 2, 5), 5),
    ):
        routing = sort(op, ids.to(device), E, align=align)
        assert routing.sorted_ids.numel() % align == 0
        assert not (routing.expert_offsets % align).any()
        assert (routing.expert_offsets.diff()[routing.tokens_per_expert == 0] == 0).all()


def test_drop_policy_without_capacity(impl):
    op, device = impl
    ids = distinct_ids(20, 2, 4).to(device)
    for policy in POLICIES:  # drops nothing, and needs no weights
        assert_routing(op(ids, 4, drop_policy=policy), routing_by_loops(ids.tolist(), 4))


def test_ids_of_int64(impl):
    op, device = impl
    ids = distinct_ids(20, 2, 4).to(device)
    for x, y in zip(op(ids.long(), 4), op(ids, 4), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("op", [moe_sort, reference.moe_sort], ids=["op", "reference"])
@pytest.mark.parametrize("bad", [-2, 4, 5, 2**31 - 1, -(2**31), 2**32 + 1, -(2**40)])
def test_bad_ids_raise_on_the_cpu(bad, op):
    wide = torch.tensor([[0, 1], [bad, 3]])  # int64: what int32 does not hold must not wrap
    for ids in (wide, wide.int()) if abs(bad) < 2**31 else (wide,):
        with pytest.raises(ValueError, match=r"^moe_sort: expected ids in \[-1, E = 4\), got"):
            op(ids, 4)
        with pytest.raises(ValueError, match=r"^moe_sort: expected ids in \[-1, E = 4\), got"):
            op(ids, 4, capacity=1, drop_policy="slot", align=8)


def test_bad_ids_raise_where_compiled():
    compiled = torch.compile(moe_sort, fullgraph=True, backend="aot_eager")
    ids = distinct_ids(6, 2, 4)
    assert_routing(compiled(ids, 4), routing_by_loops(ids.tolist(), 4))
    with pytest.raises(RuntimeError, match=r"moe_sort: expected ids in \[-1, E = 4\), got 9"):
        compiled(torch.full_like(ids, 9), 4)


def test_bad_ids_are_skipped_on_cuda(impl, request):
    if not request.node.callspec.params["impl"].startswith(("cuda", "emulated")):
        pytest.skip("on the CPU they raise")
    op, device = impl
    ids = torch.tensor([[0, 4], [-2, 3], [2**31 - 1, 1]], dtype=torch.int32, device=device)
    assert_routing(op(ids, 4), routing_by_loops([[0, -1], [-1, 3], [-1, 1]], 4))


def test_strides(impl):
    op, device = impl
    ids = distinct_ids(30, 4, 9).to(device)
    weights = torch.rand(4, 30, device=device).t()
    given = {"capacity": 5, "drop_policy": "prob"}
    expected = op(ids, 9, topk_weights=weights.contiguous(), **given)
    transposed = ids.t().contiguous().t()
    assert all(map(torch.equal, op(transposed, 9, topk_weights=weights, **given), expected))
    wide = torch.full((30, 9), 99, dtype=torch.int32, device=device)
    wide[:, 2:6] = ids
    assert all(map(torch.equal, op(wide[:, 2:6], 9, topk_weights=weights, **given), expected))


def test_repeats(impl):
    op, device = impl
    ids = distinct_ids(200, 4, 12).to(device)
    weights = torch.rand(200, 4, device=device).mul(8).floor()
    given = {"topk_weights": weights, "capacity": 50, "drop_policy": "prob", "align": 16}
    expected = op(ids, 12, **given)
    for _ in range(100):
        assert all(map(torch.equal, op(ids, 12, **given), expected))


@pytest.mark.parametrize("policy", [None, *POLICIES])
def test_threads(policy):
    # Over 2^15 slots, so that three threads have a run each; the last is shorter.
    ids = distinct_ids(25_001, 2, 12, likes=1 / torch.arange(1.0, 13.0))
    ids[7::11] = -1
    weights = torch.rand(ids.shape)
    given = {"capacity": 3000, "drop_policy": policy} if policy else {}
    try:
        expected = reference.moe_sort(ids, 12, topk_weights=weights, **given)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            actual = moe_sort(ids, 12, topk_weights=weights, **given)
            assert all(map(torch.equal, actual, expected)), threads
    finally:
        torch.set_num_threads(1)


def test_weights_get_no_gradient(impl):
    op, device = impl
    ids = distinct_ids(6, 2, 3).to(device)
    weights = torch.rand(6, 2, device=device, requires_grad=True)
    routing = op(ids, 3, topk_weights=weights, capacity=2, drop_policy="prob")
    assert not any(tensor.requires_grad for tensor in routing)


@pytest.mark.gpu
def test_no_sync():
    ids = distinct_ids(64, 2, 8).cuda()
    weights = torch.rand(64, 2, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for policy in POLICIES:
            moe_sort(ids, 8, capacity=4, drop_policy=policy, topk_weights=weights, align=8)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_registration(impl):
    _, device = impl
    op = torch.ops.m2ae_kernels.moe_sort.default
    ids = distinct_ids(6, 2, 5).to(device)
    weights = torch.rand(6, 2, device=device)
    opcheck(op, (ids, 5, None, 0, None, 1))
    opcheck(op, (ids.t().contiguous().t(), 5, 2, 1, None, 8))
    opcheck(op, (ids, 5, 1, 2, weights, 16))


def test_compiles_to_one_graph(impl):
    op, device = impl
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    for R in (6, 11, 30):
        ids = distinct_ids(R, 2, 5).to(device)
        weights = torch.rand(R, 2, device=device)
        for given in ({}, {"capacity": R // 3, "drop_policy": "prob", "align": 8}):
            expected = op(ids, 5, topk_weights=weights, **given)
            actual = compiled(ids, 5, topk_weights=weights, **given)
            assert all(map(torch.equal, actual, expected))
