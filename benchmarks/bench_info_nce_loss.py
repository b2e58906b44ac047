"""info_nce_loss against the CLIP loss in eager PyTorch, compiled, and in the peers' packages.

How to run it as a program: contrastive.py
"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from contrastive import DIMS, DIRECTIONS, OURS, SHAPES, Program, call

from m2ae_kernels import info_nce_loss

SCALE = 1 / 0.07
NUMBERS = (SCALE,)


def eager(query, key, scale):
    """As open_clip writes it: two matrices of logits."""
    query, key = F.normalize(query), F.normalize(key)
    target = torch.arange(len(query), device=query.device)
    of_query, of_key = scale * query @ key.mT, scale * key @ query.mT
    return (F.cross_entropy(of_query, target) + F.cross_entropy(of_key, target)) / 2


def eager_shared_logits(query, key, scale):
    """The best form by hand: one matrix, and its transpose."""
    query, key = F.normalize(query), F.normalize(key)
    logits = scale * query @ key.mT
    target = torch.arange(len(query), device=query.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target)) / 2


def ours(query, key, scale):
    return info_nce_loss(query, key, scale, normalize=True)


def inf_cl(query, key, scale):
    from inf_cl import cal_flash_loss

    query, key = F.normalize(query), F.normalize(key)
    both = cal_flash_loss(query, key, scale=scale), cal_flash_loss(key, query, scale=scale)
    return sum(loss.mean() for loss in both) / 2


def memeff(query, key, scale):
    from memeff import MemoryEfficientCLIPLoss

    # Its temperature is a number without a gradient, and stable=True returns another gradient.
    return MemoryEfficientCLIPLoss(temperature=1 / SCALE, stable=False)(query, key)


def rows_on(device):
    """The implementations that can run here, by name."""
    rows = {
        "eager": eager,
        "eager_shared_logits": eager_shared_logits,
        "compile": torch.compile(eager_shared_logits, dynamic=False),
    }
    if device == "cuda":
        peers = {"inf_cl": inf_cl, "memeff": memeff}
        rows |= {name: peer for name, peer in peers.items() if importlib.util.find_spec(name)}
    return rows | {OURS: ours}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", ["eager", "eager_shared_logits", "inf_cl", "memeff", OURS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", range(3))
def bench_info_nce_loss(size, dtype, impl, direction, device, bench):
    """One shape of each size; the table over all shapes is what this file prints as a program."""
    N, D = SHAPES[device][size], DIMS[size % 2]
    function = rows_on(device).get(impl)
    if function is None:
        pytest.skip(f"{impl} is not installed, or does not run on {device}")
    if device == "cpu" and size > 0:
        pytest.skip("takes seconds per call: python benchmarks/bench_info_nce_loss.py")
    if device == "cuda" and (impl, size) == ("inf_cl", 2):
        pytest.skip("takes seconds per call")
    bench(
        f"info_nce_loss {direction} N={N} D={D} {dtype}",
        call(function, NUMBERS, N, D, dtype, direction, device),
        flops=DIRECTIONS[direction] * 2 * N * N * D,
        impl=impl,
    )


if __name__ == "__main__":
    Program(rows_on, NUMBERS).main()
