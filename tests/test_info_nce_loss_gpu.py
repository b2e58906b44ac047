"""info_nce_loss on a GPU: graphs, streams, devices, tf32, targets that nobody can check."""

import pytest
import torch
from gpu_streams import captured, own_stream
from info_nce_cases import EPS, exact, features, number, on_cuda
from torch.testing import assert_close

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("same_id", ["negative", "ignore", "positive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_sync(dtype, same_id, on_gpu, no_sync):
    query, key = features(300, 400, D=64, device="cuda", dtype=dtype)
    scale, weight = number(14.3, "cuda"), torch.rand(300, device="cuda")
    given = {"normalize": True, "same_id": same_id, "weight": weight, "label_smoothing": 0.1}
    given |= {"return_metrics": True, **on_cuda(300, 400)}
    on_gpu(query, key, scale, **given)[0].backward()  # compiles, which may wait
    no_sync()
    loss, _ = on_gpu(query, key, scale, **given)
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_in_one_graph(dtype, on_gpu):
    query, key = features(300, 400, D=64, device="cuda", dtype=dtype)
    scale = number(14.3, "cuda")
    given = {"normalize": True, **on_cuda(300, 400)}

    def step():
        loss = on_gpu(query, key, scale, **given)
        return loss, *torch.autograd.grad(loss, (query, key, scale))

    graph, outputs = captured(step)
    for value in (5.0, 100.0, 200.0):  # the same graph on either side of what one exp covers
        with torch.no_grad():
            query.normal_()
            key.normal_()
            scale.fill_(value)
        graph.replay()
        replayed = [t.clone() for t in outputs]
        assert all(map(torch.equal, replayed, step()))


def test_another_stream(on_gpu):
    query, key = features(1000, 1000, D=64, device="cuda")
    expected = on_gpu(query, key, normalize=True)
    wanted = torch.autograd.grad(expected, (query, key))
    with own_stream(busy=True):
        copies = [t.detach().clone().requires_grad_() for t in (query, key)]  # not there before
        loss = on_gpu(*copies, normalize=True)
        grads = torch.autograd.grad(loss, copies)
    assert torch.equal(loss, expected)
    assert all(map(torch.equal, grads, wanted))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device(on_gpu):
    query, key = features(100, 120, D=64, device="cuda:0")
    there = [t.detach().to("cuda:1").requires_grad_() for t in (query, key)]
    for here, other in ((on_gpu(query, key), on_gpu(*there)),):
        assert other.device == torch.device("cuda:1")
        assert_close(other.cpu(), here.cpu())
    assert torch.cuda.current_device() == 0
    with pytest.raises(TypeError, match="expected key on the device of query, cuda:0, got cuda:1"):
        on_gpu(query, there[1])


def test_targets_out_of_range_have_no_loss(on_gpu):
    query, key = features(5, 6, D=8, device="cuda")
    target = torch.tensor([0, 6, -1, 2**40, 3], device="cuda")
    ignored = torch.tensor([0, -100, -100, -100, 3], device="cuda")
    losses = on_gpu(query, key, target=target, reduction="none")
    expected = on_gpu(query, key, target=ignored, reduction="none")
    assert all(map(torch.equal, losses, expected))
    loss = on_gpu(query, key, target=target, label_smoothing=0.1, weight=torch.rand(5).cuda())
    assert loss.isfinite()
    loss.backward()


def test_tf32_only_where_it_is_allowed(on_gpu):
    query, key = features(300, 300, D=200, device="cuda")
    x, y = (t.detach().double().requires_grad_() for t in (query, key))
    expected = exact(x, y, 30.0)
    wanted = torch.autograd.grad(expected, (x, y))

    def errors(**given):
        loss = on_gpu(query, key, 30.0, **given)
        grads = torch.autograd.grad(loss, (query, key))
        return max(
            ((g.double() - w).norm() / w.norm()).item() for g, w in zip(grads, wanted, strict=True)
        )

    exactly, rounded = errors(allow_tf32=False), errors(allow_tf32=True)
    assert exactly <= EPS * 30 * 8
    assert exactly < rounded < 2e-2  # 10 bits of logits up to 30
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert errors() == errors(allow_tf32=allowed)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_more_numbers_than_2_to_the_31(on_gpu):
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    N, M, D = 2_200_000, 16, 1024  # N x D of 4.5 GB
    query = torch.randn(N, D, device="cuda", dtype=torch.bfloat16).requires_grad_()
    key = torch.randn(M, D, device="cuda", dtype=torch.bfloat16).requires_grad_()
    target = torch.arange(N, device="cuda") % M
    given = {"normalize": True, "target": target, "reduction": "none"}
    loss_q, loss_k = on_gpu(query, key, 14.3, **given)
    (grad,) = torch.autograd.grad(loss_q.sum(), query)
    few = slice(N - 100, N)
    given["target"] = target[few]
    x = query.detach()[few].requires_grad_()
    expected, _ = on_gpu(x, key, 14.3, **given)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    assert_close(loss_q[few], expected)
    assert_close(grad[few], wanted)
    assert loss_k.isfinite().all()
    assert grad.isfinite().all()


def test_memory_of_65536_pairs(on_gpu):
    query, key = features(65_536, 65_536, D=512, device="cuda", dtype=torch.bfloat16)
    scale = number(14.3, "cuda")
    on_gpu(query[:1000], key[:1000], scale, normalize=True).backward()
    query.grad = key.grad = None
    for workspace in (None, 128 << 20):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = on_gpu(query, key, scale, normalize=True, max_workspace_bytes=workspace)
        torch.autograd.grad(loss, (query, key, scale))
        peak = torch.cuda.max_memory_allocated() - before
        # the workspace; both gradients in bfloat16 and one side in float32 to add them up in;
        # column sums of 512 rows each. The matrix of logits alone would be 8.6 GB of bfloat16.
        linear = 2 * query.nbytes + 2 * key.nbytes + 65_536 * 4 * 2 * 128 + (64 << 20)
        assert peak <= (512 << 20 if workspace is None else workspace) + linear
