"""siglip_loss on a GPU: graphs, waits, streams, devices, targets that nobody can check, memory."""

import pytest
import torch
from gpu_streams import captured, own_stream
from info_nce_cases import on_cuda
from test_siglip_loss import features, numbers
from torch.testing import assert_close

pytestmark = pytest.mark.gpu


def pairing(N, M):
    return {**on_cuda(N, M), "weight": torch.rand(N, device="cuda")}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("same_id", ["negative", "ignore", "positive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_sync(dtype, same_id, reduction, on_gpu, no_sync):
    inputs = (
        *features(300, 400, D=64, device="cuda", dtype=dtype),
        *numbers(10.0, -5.0, device="cuda"),
    )
    given = {"normalize": True, "same_id": same_id, "reduction": reduction, **pairing(300, 400)}
    on_gpu(*inputs, **given).sum().backward()  # compiles, which may wait
    no_sync()
    on_gpu(*inputs, **given).sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_in_one_graph(dtype, reduction, on_gpu):
    inputs = (
        *features(300, 400, D=64, device="cuda", dtype=dtype),
        *numbers(10.0, -5.0, device="cuda"),
    )
    given = {"normalize": True, "reduction": reduction, **pairing(300, 400)}

    def step():
        loss = on_gpu(*inputs, **given).sum()
        return loss, *torch.autograd.grad(loss, inputs)

    graph, outputs = captured(step)
    for scale, bias in ((5.0, -3.0), (100.0, -60.0)):
        with torch.no_grad():
            for tensor, value in zip(inputs[2:], (scale, bias), strict=True):
                tensor.fill_(value)
            inputs[0].normal_()
            inputs[1].normal_()
        graph.replay()
        replayed = [t.clone() for t in outputs]
        assert all(map(torch.equal, replayed, step()))


def test_another_stream(on_gpu):
    images, texts = features(1000, 1000, D=64, device="cuda")
    expected = on_gpu(images, texts, 10.0, -10.0, normalize=True)
    wanted = torch.autograd.grad(expected, (images, texts))
    with own_stream(busy=True):
        copies = [t.detach().clone().requires_grad_() for t in (images, texts)]  # not there before
        loss = on_gpu(*copies, 10.0, -10.0, normalize=True)
        grads = torch.autograd.grad(loss, copies)
    assert torch.equal(loss, expected)
    assert all(map(torch.equal, grads, wanted))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device(on_gpu):
    images, texts = features(100, 120, D=64, device="cuda:0")
    there = [t.detach().to("cuda:1") for t in (images, texts)]
    loss = on_gpu(*there, 10.0, -10.0)
    assert loss.device == torch.device("cuda:1")
    assert_close(loss.cpu(), on_gpu(images, texts, 10.0, -10.0).cpu())
    assert torch.cuda.current_device() == 0


def test_targets_out_of_range_are_no_pairs(on_gpu):
    images, texts = features(5, 6, D=8, device="cuda")
    target = torch.tensor([0, 6, -1, 2**40, 3], device="cuda")
    ignored = torch.tensor([0, -100, -100, -100, 3], device="cuda")
    losses = [on_gpu(images, texts, 10.0, -5.0, target=t) for t in (target, ignored)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_of_65536_pairs(reduction, on_gpu):
    images, texts = features(65_536, 65_536, D=512, device="cuda", dtype=torch.bfloat16)
    inputs = images, texts, *numbers(10.0, -10.0, device="cuda")
    given = {"normalize": True, "reduction": reduction}
    on_gpu(images[:1000], texts[:1000], *inputs[2:], **given).sum().backward()
    images.grad = texts.grad = None
    workspace = 128 << 20
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = on_gpu(*inputs, **given, max_workspace_bytes=workspace)
    torch.autograd.grad(loss.sum(), inputs)
    peak = torch.cuda.max_memory_allocated() - before
    # Both gradients, which the forward of "mean" holds in float32, and again as they are returned.
    # The matrix of logits alone would be 8.6 GB of bfloat16.
    linear = 4 * (images.nbytes + texts.nbytes) + 65_536 * 4 * 128 + (64 << 20)
    assert peak <= workspace + linear
