"""nn.MoE under DDP and FSDP, with an expert that no token of a rank chose."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from m2ae_kernels.nn import GroupedExperts, MoE, TopKRouter

D, E, RANKS = 6, 4, 2


def layer():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        moe = MoE(TopKRouter(D, E, 1, bias=True), GroupedExperts(E, D, 8))
    with torch.no_grad():
        moe.router.bias.copy_(torch.tensor([0.0, 0.0, 0.0, -1e4]))  # nobody goes to the last one
        moe.router.weight[0] = -moe.router.weight[1]
    return moe


def tokens(rank):
    return torch.randn(11, D, generator=torch.Generator().manual_seed(rank))


def gradients(rank, size):
    moe = layer()
    wrapped = DistributedDataParallel(moe)
    for _ in range(2):  # a gradient that never came would stop the second step
        moe.zero_grad()
        out, for_losses = wrapped(tokens(rank))
        (out.square().mean() + 0 * for_losses["logsumexp"].sum()).backward()
    return [parameter.grad for parameter in moe.parameters()]


def sharded_gradients(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    moe = fully_shard(layer(), mesh=mesh)
    for _ in range(2):
        moe.zero_grad()
        moe(tokens(rank))[0].square().mean().backward()
    return [parameter.grad.full_tensor() for parameter in moe.parameters()]


def expected_gradients():
    moe = layer()
    loss = sum(moe(tokens(rank))[0].square().mean() for rank in range(RANKS)) / RANKS
    return torch.autograd.grad(loss, list(moe.parameters()))


def test_weights_sharded_by_fsdp(processes):
    for grads in processes.run(RANKS, sharded_gradients):
        assert_close(grads, list(expected_gradients()))


def test_experts_that_nobody_chose_have_zero_gradients(processes):
    of_ranks = processes.run(RANKS, gradients)
    for grads in of_ranks:
        assert_close(grads, list(expected_gradients()))
    names = [name for name, _ in layer().named_parameters()]
    of_last = dict(zip(names, of_ranks[0], strict=True))
    assert not any(of_last[f"experts.{name}"][E - 1].any() for name in ("w1", "b1", "w2", "b2"))
