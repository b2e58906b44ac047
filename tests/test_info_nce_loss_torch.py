"""info_nce_loss as a citizen of PyTorch: registration, compile, autocast, vmap, one backward."""

import pytest
import torch
from info_nce_cases import features, number
from interpreter import interpret_only
from torch.library import opcheck
from torch.testing import assert_close

from m2ae_kernels import reference

SAMPLES = ["plain", "masks", "ids", "permuted", "empty", "no keys", "no width", "16 bits"]


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()


def sample(name, device):
    """(tensors, options, ranks, keep) of a call of the op."""
    query, key = features(6, 7, D=5, device=device)
    scale = number(8.0, device)
    target = torch.tensor([3, 3, -100, 0, 6, 1], device=device)
    mask = torch.tensor([True] * 6 + [False], device=device)
    ids = torch.tensor([0, 0, 1, -2, 1, 5, 5], device=device)
    nothing = (None,) * 5
    permuted = [t.detach().mT.contiguous().mT.requires_grad_() for t in (query, key)]
    halves = [t.detach().bfloat16().requires_grad_() for t in (query, key)]
    # options: target_offset, ignore_index, same_id, exclude_self, normalize, eps, symmetric
    return {
        "plain": ((query, key, scale, *nothing), (1, -100, 0, False, False, 1e-12, True), 0, 0),
        "masks": (
            (query, key, scale, target, mask[1:], mask, None, None),
            (0, -100, 0, False, True, 1e-12, True),
            True,
            False,
        ),
        "ids": (
            (query, key, scale, target, mask[1:], mask, ids[:6], ids),
            (0, -100, 2, True, True, 1e-12, False),
            False,
            True,
        ),
        "permuted": (
            (*permuted, scale, None, None, None, ids[1:], ids),
            (0, -100, 1, False, False, 1e-12, True),
            True,
            True,
        ),
        "empty": ((query[:0], key, scale, *nothing), (1, 0, 0, False, True, 1e-12, True), 1, 1),
        "no keys": (
            (query, key[:0], scale, target * 0 - 100, *nothing[1:]),
            (0, -100, 0, False, True, 1e-12, True),
            True,
            True,
        ),
        "no width": (
            (query[:, :0], key[:, :0], scale, *nothing),
            (0, -100, 0, False, False, 1e-12, True),
            True,
            False,
        ),
        "16 bits": (
            (*halves, number(8.0, device, torch.bfloat16), target, *nothing[1:]),
            (0, -100, 0, False, True, 1e-12, True),
            False,
            True,
        ),
    }[name]


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name, impl):
    interpret_only("masks", "ids", "empty")
    _, device = impl
    tensors, options, ranks, keep = sample(name, device)
    arguments = (*tensors, *options, bool(ranks), bool(keep), False, 1 << 20)
    opcheck(torch.ops.m2ae_kernels.info_nce_loss.default, arguments)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_of_the_backward(name, impl):
    interpret_only("ids", "16 bits")
    _, device = impl
    needed = [name not in ("permuted", "16 bits"), True, name != "permuted"]
    tensors, options, ranks, keep = sample(name, device)
    tensors = [t if t is None else t.detach() for t in tensors]
    op = torch.ops.m2ae_kernels.info_nce_loss.default
    outputs = op(*tensors, *options, bool(ranks), bool(keep), False, 1 << 20)
    upstream = [torch.ones_like(loss) for loss in outputs[:2]]
    saved = (*tensors, *outputs[2:10], outputs[12])
    backward = torch.ops.m2ae_kernels.info_nce_loss_backward.default
    opcheck(backward, (*upstream, *saved, *options, False, 1 << 20, needed))


def options_of(N, M, device):
    target = torch.arange(N, device=device) % 3
    mask = torch.arange(M, device=device) % 5 != 4
    ids = {
        "query_ids": torch.arange(N, device=device),
        "key_ids": torch.arange(M, device=device) // 2,
    }
    return [
        {},
        {"target": target, "key_mask": mask, "normalize": True, "logit_bias": 1.0},
        {"same_id": "positive", "symmetric": False, "label_smoothing": 0.1, **ids},
        {"same_id": "ignore", "weight": torch.rand(N, device=device), "reduction": "sum", **ids},
        {"exclude_self": True, "target": target + 1, "return_metrics": True, "reduction": "none"},
    ]


def results(op, query, key, scale, given):
    outputs = op(query, key, scale, **given)
    losses = outputs[0] if "return_metrics" in given else outputs
    metrics = outputs[1] if "return_metrics" in given else ()
    losses = losses if isinstance(losses, tuple) else (losses,)
    losses = [loss for loss in losses if loss is not None]
    upstream = [torch.ones_like(loss) for loss in losses]
    return (*losses, *metrics, *torch.autograd.grad(losses, (query, key, scale), upstream))


@pytest.mark.parametrize("case", range(5))
def test_compiles_to_one_graph(case, impl):
    interpret_only("1", "2")
    op, device = impl
    scale = number(8.0, device)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for N, M in ((6, 7), (11, 13)) if case == 3 else ((6, 7),):
        inputs = (*features(N, M, D=5, device=device), scale, options_of(N, M, device)[case])
        # Compiled, nothing is kept of a matrix of unknown size; what is kept has the same digits.
        for actual, expected in zip(results(compiled, *inputs), results(op, *inputs), strict=True):
            assert_close(actual, expected)
    if case == 0:
        with torch.no_grad():
            query, key = features(6, 7, D=5, device=device)
            assert torch.equal(compiled(query, key, 3.0), op(query, key, 3.0))


@pytest.mark.parametrize("mark", [True, False])
def test_compiles_once_for_any_number_of_rows(mark, impl):
    interpret_only("True")
    op, device = impl
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(op, fullgraph=True, dynamic=None if mark else True, backend=backend)
    for N, M in ((6, 7), (9, 12), (40, 41)):
        query, key = (t.detach() for t in features(N, M, D=5, device=device))
        target = torch.arange(N, device=device) % 5
        for tensor in (query, key, target) if mark else ():
            torch._dynamo.mark_dynamic(tensor, 0)
        assert_close(compiled(query, key, 3.0, target=target), op(query, key, 3.0, target=target))
    assert len(graphs) == 1


def test_compiles_under_autocast(impl):
    op, device = impl
    query, key = features(6, 7, D=5, device=device)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(compiled(query, key, 8.0), op(query, key, 8.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_features_but_not_the_scale(dtype, impl):
    interpret_only("torch.bfloat16")
    op, device = impl
    query, key = features(9, 9, D=6, device=device)
    scale = number(14.2857, device)
    given = {"normalize": True, "label_smoothing": 0.1}
    with torch.autocast(device, dtype):
        loss = op(query, key, scale, **given)
        assert torch.equal(op(query.to(dtype), key, scale, **given), loss)
        loss.backward()
    assert loss.dtype == query.grad.dtype == key.grad.dtype == scale.grad.dtype == torch.float32
    rounded = [t.detach().to(dtype).requires_grad_() for t in (query, key)]
    again = op(*rounded, scale, **given)
    assert torch.equal(loss, again)
    grads = torch.autograd.grad(again, (*rounded, scale))
    for grad, tensor in zip(grads, (query, key, scale), strict=True):
        assert torch.equal(grad.to(torch.float32), tensor.grad)
    exactly = reference.info_nce_loss(query.double(), key.double(), scale, **given)
    with torch.autocast(device, dtype):  # float64 is somebody's choice
        again = reference.info_nce_loss(query.double(), key.double(), scale, **given)
    assert torch.equal(again, exactly)


def test_second_derivative_is_refused(impl):
    op, device = impl
    query, key = features(4, 4, D=5, device=device)
    scale = number(8.0, device)
    inputs = (query, key, scale)
    for grad in torch.autograd.grad(op(*inputs), inputs, create_graph=True):
        with pytest.raises(RuntimeError, match=r"info_nce_loss: expected one backward, got a seco"):
            torch.autograd.grad(grad.sum(), inputs, retain_graph=True)


def test_vmap(impl):
    # torch calls the op once per element: slow, and it says so, but right.
    op, device = impl
    queries, keys = torch.randn(3, 4, 5, device=device), torch.randn(3, 6, 5, device=device)
    queries.requires_grad_()
    losses = torch.vmap(lambda query, key: op(query, key, 2.0, normalize=True))(queries, keys)
    wanted = [op(query, key, 2.0, normalize=True) for query, key in zip(queries, keys, strict=True)]
    assert_close(losses, torch.stack(wanted))
    grads = [torch.autograd.grad(loss.sum(), queries)[0] for loss in (losses, torch.stack(wanted))]
    assert_close(*grads)


def test_checkpoint_repeats_it(impl):
    from torch.utils.checkpoint import checkpoint

    op, device = impl
    query, key = features(8, 9, D=5, device=device)
    loss = op(query * 2, key)
    again = checkpoint(lambda query: op(query * 2, key), query, use_reentrant=False)
    assert torch.equal(loss, again)
    grads = [torch.autograd.grad(z, (query, key)) for z in (loss, again)]
    assert all(map(torch.equal, *grads))


def test_inference_mode_and_meta(impl):
    op, device = impl
    query, key = (t.detach() for t in features(8, 9, D=5, device=device))
    with torch.inference_mode():
        assert torch.equal(op(query, key), op(query.clone(), key))
    loss_q, loss_k = op(query.to("meta"), key.to("meta"), reduction="none", normalize=True)
    assert (loss_q.shape, loss_k.shape) == ((8,), (9,))
    assert loss_q.device.type == loss_k.device.type == "meta"
