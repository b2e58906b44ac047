"""info_nce_loss and memory: what is saved, what is kept, and that neither changes results."""

import subprocess
import sys

import pytest
import torch
from info_nce_cases import EPS, features, number
from interpreter import fewer, interpret_only, interpreted, skip_if_interpreted


def saved_by(op, *inputs, **given):
    """Numbers of elements of what the call saves for its backward."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, id):
        op(*inputs, **given)
    return sizes


def test_nothing_quadratic_is_saved_beyond_64_mib(impl):
    skip_if_interpreted("and keeps nothing of what is large")
    op, device = impl
    query, key = features(200, 300, D=4, device=device)
    linear = {"normalize": True, "max_workspace_bytes": 0}
    assert max(saved_by(op, query, key, 8.0, **linear)) == 300 * 4
    assert max(saved_by(op, query, key, 8.0, **linear | {"max_workspace_bytes": 239_999})) == 1200
    kept = max(saved_by(op, query, key, 8.0, normalize=True))
    assert kept == (200 * 300 if device == "cpu" else 300 * 4)
    query, key = features(4096, 4097, D=1, device=device)  # 64 MiB and 16 KiB of float32
    assert max(saved_by(op, query, key, 8.0)) == 4097
    with torch.no_grad():
        assert op(query[:16], key[:16]).grad_fn is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_kept_or_computed_twice(symmetric, dtype, impl):
    interpret_only("True-torch.bfloat16")
    op, device = impl
    query, key = features(70, 80, D=20, device=device, dtype=dtype)
    scale = number(14.3, device)
    target = torch.randint(-1, 20, (70,), device=device)
    mask = torch.rand(80, device=device) < 0.9
    given = {"target": target, "ignore_index": -1, "key_mask": mask, "normalize": True}
    runs = []
    for workspace in (None, 0):
        given |= {"max_workspace_bytes": workspace, "symmetric": symmetric}
        loss = op(query, key, scale, **given)
        runs.append((loss, *torch.autograd.grad(loss, (query, key, scale))))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_do_not_change_the_statistics(dtype, impl):
    interpret_only("torch.float32")
    op, device = impl
    N, M = (140, 70) if interpreted() else (1100, 900)
    query, key = features(N, M, D=20, device=device, dtype=dtype)
    target = torch.randint(0, 70, (N,), device=device)
    given = {"target": target, "normalize": True, "return_metrics": True, "reduction": "none"}
    runs = []
    for workspace in fewer((0, N * M * 2, 50_000, 400_000, None), 2):
        losses, metrics = op(query, key, 14.3, max_workspace_bytes=workspace, **given)
        upstream = [torch.ones_like(loss) for loss in losses]
        grads = torch.autograd.grad(losses, (query, key), upstream)
        runs.append(((*losses, *metrics), grads))
    for statistics, grads in runs[1:]:
        assert all(map(torch.equal, statistics, runs[0][0]))
        for grad, wanted in zip(grads, runs[0][1], strict=True):
            # Summed in another order: a few last bits of float32, or one of the 16-bit result.
            error = (grad.double() - wanted.double()).norm() / wanted.double().norm()
            assert error <= (4 * EPS if dtype == torch.float32 else 1e-4)


PEAK = """
import resource, torch, m2ae_kernels
torch.set_num_threads(1)
query, key = (torch.randn(32768, 128).requires_grad_() for _ in range(2))
scale = torch.tensor(14.3, requires_grad=True)
m2ae_kernels.info_nce_loss(query[:64], key[:64], scale, normalize=True).backward()
query.grad = key.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open("/proc/self/statm") as statm:
    mapped = int(statm.read().split()[0]) * resource.getpagesize()
# One N x M matrix takes 4.3 GB: rather an error than a machine that is out of memory.
resource.setrlimit(resource.RLIMIT_AS, (mapped + 3 * 2**30,) * 2)
m2ae_kernels.info_nce_loss(query, key, scale, normalize=True).backward()
print("raised by", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, "KiB")
"""


@pytest.mark.slow
def test_memory_of_32768_pairs():
    # The two gradients are 34 MB of it. Not for each kernel: it is what a CPU caller gets.
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    raised = int(run.stdout.split()[-2]) * 1024
    assert raised < 300e6, f"{raised / 1e6:.0f} MB"
