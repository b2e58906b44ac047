"""TopKRouter, GroupedExperts, MoE: against all experts on all tokens, in checkpoints, under DDP."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from m2ae_kernels.nn import GroupedExperts, MoE, TopKRouter
from m2ae_kernels.ops._philox import HIDDEN, OUTPUT, dropout_factors

T, D, H, Do, E, k, S = 37, 12, 20, 9, 5, 2, 2


def moe_of(**given):
    """A MoE whose router decides clearly."""
    torch.manual_seed(1)
    names = ("norm_topk_prob", "score_function", "bias", "use_expert_bias")
    router = TopKRouter(D, E, k, **{name: given.pop(name) for name in names if name in given})
    with torch.no_grad():
        router.weight.mul_(8)
    layer = {name: given.pop(name) for name in ("capacity", "drop_policy") if name in given}
    return MoE(router, GroupedExperts(E, D, H, Do, **given), **layer)


def dense(moe, x, shift=None, seed=None):
    """The same equations in float64: every expert on every token, weights zero but for k."""
    router, experts = moe.router, moe.experts
    u = x if shift is None else torch.cat([x + row for row in shift])  # [R, D]
    bias = 0 if router.bias is None else router.bias
    p = (u @ router.weight.T + bias).softmax(1)
    weights, ids = torch.sort(p, dim=1, descending=True, stable=True)
    weights, ids = weights[:, :k], ids[:, :k]
    if router.gating_options.get("norm_topk_prob"):
        weights = weights / weights.sum(1, keepdim=True)
    h = torch.einsum("rd,ehd->reh", u, experts.w1) + experts.b1
    a = F.gelu(h)
    masks = (1, 1)
    if seed is not None:
        slots = torch.arange(len(u) * k).view(-1, k)
        masks = [
            dropout_factors(seed, slots, columns, rate, which, torch.float64)
            for columns, rate, which in (
                (H, experts.dropout_p, HIDDEN),
                (Do, experts.output_dropout_p, OUTPUT),
            )
        ]
    out = 0
    for j in range(k):  # a mask belongs to a slot, whichever expert it has
        of_slot = a[torch.arange(len(u)), ids[:, j]]
        of_slot = of_slot * (masks[0] if seed is None else masks[0][:, j])
        w2, b2 = experts.w2[ids[:, j]], experts.b2[ids[:, j]]
        y = torch.einsum("rh,roh->ro", of_slot, w2) + b2
        out = out + weights[:, j, None] * y * (masks[1] if seed is None else masks[1][:, j])
    return out


def assert_equals_dense(moe, x, shift, seed):
    twin = copy.deepcopy(moe).double()
    doubled = [t if t is None else t.detach().double().requires_grad_() for t in (x, shift)]
    state = torch.get_rng_state()
    out, _ = moe(x, shift=shift)
    if seed:
        torch.set_rng_state(state)
        seed = torch.randint(2**63 - 1, (2,))
    expected = dense(twin, *doubled, seed if moe.training and seed is not None else None)
    upstream = torch.randn_like(expected)
    inputs = [x, *([] if shift is None else [shift]), *moe.parameters()]
    wanted = [t for t in doubled if t is not None] + list(twin.parameters())
    grads = torch.autograd.grad(out.flatten(0, -2), inputs, upstream.float())
    exact = torch.autograd.grad(expected, wanted, upstream)
    assert (out.flatten(0, -2) - expected).norm() <= 1e-5 * expected.norm()
    for grad, right in zip(grads, exact, strict=True):
        assert (grad - right).norm() <= 1e-5 * right.norm()


@pytest.mark.parametrize("streams", [None, S])
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_equals_all_experts_on_all_tokens(norm_topk_prob, streams):
    moe = moe_of(norm_topk_prob=norm_topk_prob, bias=True)
    shift = None if streams is None else torch.randn(streams, D).requires_grad_()
    assert_equals_dense(moe, torch.randn(T, D).requires_grad_(), shift, None)


@pytest.mark.parametrize("streams", [None, S])
def test_equals_all_experts_with_the_same_dropout(streams):
    moe = moe_of(dropout_p=0.3, output_dropout_p=0.2)
    shift = None if streams is None else torch.randn(streams, D).requires_grad_()
    assert_equals_dense(moe, torch.randn(T, D).requires_grad_(), shift, True)
    x = torch.randn(T, D)
    assert not torch.equal(moe(x)[0], moe(x)[0])
    moe.eval()
    assert torch.equal(moe(x)[0], moe(x)[0])


def test_shapes_and_what_the_losses_need():
    moe = moe_of()
    x = torch.randn(3, 4, D)
    out, for_losses = moe(x)
    assert out.shape == (3, 4, Do)
    assert {name: tuple(t.shape) for name, t in for_losses.items()} == {
        "logsumexp": (12,), "entropy": (12,), "probs_sum": (E,), "tokens_per_expert": (E,),
    }  # fmt: skip
    assert for_losses["tokens_per_expert"].sum() == 12 * k
    out, for_losses = moe(x, shift=torch.randn(S, D))
    assert out.shape == (S, 3, 4, Do)
    assert for_losses["logsumexp"].shape == (S * 12,)
    assert for_losses["tokens_per_expert"].sum() == S * 12 * k
    assert moe(x[:0])[0].shape == (0, 4, Do)
    quiet = MoE(TopKRouter(D, E, k, return_entropy=False, return_probs_sum=False), moe.experts)
    assert set(quiet(x)[1]) == {"logsumexp", "tokens_per_expert"}


def test_masked_tokens_give_nothing():
    moe = moe_of(bias=True)
    x = torch.randn(3, 4, D)
    mask = torch.rand(3, 4) < 0.5
    mask[0, 0], mask[0, 1] = True, False
    x[~mask] = torch.nan
    x.requires_grad_()
    out, for_losses = moe(x, token_mask=mask)
    assert not out[~mask].any()
    assert_close(out[mask], moe(x.detach()[mask])[0])
    assert for_losses["tokens_per_expert"].sum() == mask.sum() * k
    out.sum().backward()
    assert not x.grad[~mask].any()
    assert all(p.grad.isfinite().all() for p in moe.parameters())


@pytest.mark.parametrize("policy", ["position", "slot", "prob"])
def test_capacity_drops_and_does_not_renormalise(policy):
    moe = moe_of(capacity=6, drop_policy=policy, norm_topk_prob=True)
    x = torch.randn(T, D)
    out, for_losses = moe(x)
    assert for_losses["tokens_per_expert"].max() > 6  # before any is dropped
    gating = moe.router(x)
    free = MoE(moe.router, moe.experts)
    alone = [  # what each slot adds
        moe.experts(x, gating.topk_weights[:, [j]], gating.topk_ids[:, [j]]) for j in range(k)
    ]
    assert_close(sum(alone), free(x)[0])
    # Each row is the sum of some of its slots: 2^k cases.
    none = torch.zeros_like(out)
    cases = torch.stack([none, alone[0], alone[1], alone[0] + alone[1]])
    distance = (cases - out).norm(dim=2).min(0).values
    assert (distance <= 1e-5 * cases[3].norm(dim=1)).all()
    assert not torch.allclose(out, free(x)[0])
    moe.capacity = 0
    assert not moe(x)[0].any()


def test_shared_expert():
    moe = moe_of()
    shared = nn.Linear(D, Do)
    both = MoE(moe.router, moe.experts, shared_expert=shared)
    x, shift = torch.randn(T, D), torch.randn(S, D)
    assert_close(both(x)[0], moe(x)[0] + shared(x))
    assert_close(both(x, shift=shift)[0][1], moe(x, shift=shift)[0][1] + shared(x + shift[1]))


def test_router_and_experts_must_fit():
    with pytest.raises(ValueError, match=r"^MoE: expected .* \(5, 12\), got \(4, 12\)"):
        MoE(TopKRouter(D, E, k), GroupedExperts(4, D, H))
    with pytest.raises(ValueError, match=r"^MoE: expected .* \(5, 12\), got \(5, 13\)"):
        MoE(TopKRouter(D, E, k), GroupedExperts(E, D + 1, H))
    with pytest.raises(ValueError, match=r"^TopKRouter: expected 1 <= top_k <= .* 5, got 6"):
        TopKRouter(D, E, 6)
    with pytest.raises(TypeError, match=r"^TopKRouter: expected options of .*got \['topk'\]"):
        TopKRouter(D, E, k, topk=1)
    with pytest.raises(ValueError, match=r"^GroupedExperts: expected output_activation in"):
        GroupedExperts(E, D, H, output_activation="swiglu")


def test_expert_bias_stays_float32():
    router = TopKRouter(D, E, k, use_expert_bias=True)
    router.e_score_correction_bias.add_(torch.rand(E))
    exactly = router.e_score_correction_bias.clone()
    assert router.bfloat16().weight.dtype == torch.bfloat16
    assert router.double().float().half().e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.e_score_correction_bias, exactly)
    assert "e_score_correction_bias" in router.state_dict()
    router.e_score_correction_bias[3] = 100.0
    assert (router(torch.randn(7, D)).topk_ids[:, 0] == 3).all()


def test_dropout_repeats_in_a_checkpoint():
    moe = moe_of(dropout_p=0.5, output_dropout_p=0.5)
    x = torch.randn(T, D).requires_grad_()
    runs = []
    for layer in (moe, lambda z: checkpoint(moe, z, use_reentrant=False)):
        torch.manual_seed(5)
        out, _ = layer(x)
        runs.append((out, *torch.autograd.grad(out.sum(), [x, *moe.parameters()])))
    assert all(map(torch.equal, *runs))


def test_compiles_to_one_graph():
    moe = moe_of(dropout_p=0.1)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager", dynamic=True)
    moe.eval()
    for rows in (T, 2 * T):
        x = torch.randn(rows, D).requires_grad_()
        (grad,) = torch.autograd.grad(compiled(x)[0].sum(), x)
        (expected,) = torch.autograd.grad(moe(x)[0].sum(), x)
        assert_close(grad, expected)


def test_autocast_routes_in_float32():
    moe = moe_of(bias=True)
    x = torch.randn(T, D).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, for_losses = moe(x)
        gating = moe.router(x)
    exactly = moe.router(x)
    assert torch.equal(gating.topk_ids, exactly.topk_ids)
    assert torch.equal(for_losses["logsumexp"], exactly.logsumexp)
    assert out.dtype == torch.bfloat16
    # Experts on rounded tokens and weights, by the op's own rule: the same bits.
    half = copy.deepcopy(moe.experts).bfloat16()
    expected = half(x.bfloat16(), gating.topk_weights, gating.topk_ids)
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out.float().sum(), [x, *moe.parameters()])
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_gradients_accumulate():
    moe = moe_of(bias=True)
    parts = [torch.randn(T, D), torch.randn(2 * T, D)]
    for part in parts:
        moe(part)[0].square().sum().backward()
    of_steps = [parameter.grad for parameter in moe.parameters()]
    loss = sum(moe(part)[0].square().sum() for part in parts)
    assert_close(of_steps, list(torch.autograd.grad(loss, list(moe.parameters()))))


# ---- modules and their lists


class Expert(nn.Module):
    """As M3-JEPA writes it."""

    def __init__(self, last=()):
        super().__init__()
        layers = [nn.Linear(D, H), nn.GELU(), nn.Dropout(0.1), nn.Linear(H, Do), *last]
        self.net = nn.Sequential(*layers, nn.Dropout(0.2))

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("last", [(), (nn.GELU(),)], ids=["", "gelu"])
def test_list_of_modules_and_back(last):
    experts = nn.ModuleList(Expert(last) for _ in range(E)).eval()
    grouped = GroupedExperts.from_modulelist(experts)
    assert (grouped.dropout_p, grouped.output_dropout_p) == (0.1, 0.2)
    assert not grouped.training
    x, ids = torch.randn(T, D), torch.randint(0, E, (T, 1))
    expected = torch.stack([experts[e](row) for e, row in zip(ids[:, 0], x, strict=True)])
    assert_close(grouped(x, torch.ones(T, 1), ids), expected)
    back = grouped.to_modulelist()
    theirs = {name.replace("net.", ""): tensor for name, tensor in experts.state_dict().items()}
    assert_close(dict(back.state_dict()), theirs, rtol=0, atol=0)
    assert_close(back[2](x), experts[2](x), rtol=0, atol=0)
    grouped.w1.data.zero_()  # a copy
    assert experts[0].net[0].weight.any()


def test_lists_that_are_no_experts():
    def of(*layers):
        return nn.Sequential(*layers)

    with pytest.raises(ValueError, match="expected at least one expert, got none"):
        GroupedExperts.from_modulelist(nn.ModuleList())
    wrong = of(nn.Linear(D, H), nn.GELU())
    with pytest.raises(ValueError, match=r"expert 1 is \['Linear', 'GELU'\]"):
        GroupedExperts.from_modulelist(nn.ModuleList([Expert(), wrong]))
    tanh = of(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, Do))
    with pytest.raises(ValueError, match=r"expert 0 is \['Linear', 'Tanh', 'Linear'\]"):
        GroupedExperts.from_modulelist(nn.ModuleList([tanh]))
    other = of(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, Do))
    with pytest.raises(ValueError, match=r"like the first, .*'gelu'.*; expert 1 is .*'relu'"):
        GroupedExperts.from_modulelist(nn.ModuleList([Expert(), other]))
    half = of(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, Do, bias=False))
    with pytest.raises(ValueError, match="expected biases in both layers or none"):
        GroupedExperts.from_modulelist(nn.ModuleList([half]))
    with pytest.raises(ValueError, match="which torch has as modules, got swiglu and identity"):
        GroupedExperts(E, D, H, activation="swiglu").to_modulelist()


def test_without_biases():
    layers = [nn.Linear(D, H, bias=False), nn.SiLU(), nn.Linear(H, Do, bias=False)]
    grouped = GroupedExperts.from_modulelist(nn.ModuleList([nn.Sequential(*layers)]))
    assert grouped.b1 is grouped.b2 is None
    x = torch.randn(T, D)
    one, first = torch.ones(T, 1), torch.zeros(T, 1, dtype=torch.int32)
    assert_close(grouped(x, one, first), nn.Sequential(*layers)(x))
