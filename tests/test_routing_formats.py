"""vLLM's and Transformer Engine's forms of a routing, from their definitions and back."""

import pytest
import torch
from torch.testing import assert_close

from m2ae_kernels import (
    expert_mlp,
    from_routing_map,
    to_routing_map,
    topk_gating,
    vllm_topk_softmax,
)

T, E, k = 7, 6, 3
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("renormalize", [False, True])
def test_vllm(renormalize):
    logits = torch.randn(T, E)
    weights, ids, source = vllm_topk_softmax(logits, k, renormalize)
    expected, expected_ids = logits.softmax(1).topk(k)
    if renormalize:
        expected = expected / expected.sum(1, keepdim=True)
    assert_close(weights, expected)
    assert torch.equal(ids, expected_ids.int())
    assert source.tolist() == [[j * T + t for j in range(k)] for t in range(T)]
    assert (ids.dtype, source.dtype) == (torch.int32, torch.int32)
    assert vllm_topk_softmax(logits, k, renormalize, torch.int64)[1].dtype == torch.int64


def test_vllm_ties_nan_and_gradient():
    logits = torch.tensor([[1.0, NAN, 1.0, 0.0]], requires_grad=True)
    weights, ids, _ = vllm_topk_softmax(logits, 2, False)
    assert ids.tolist() == [[0, 2]]
    p = torch.tensor([1.0, -INF, 1.0, 0.0], requires_grad=True).softmax(0)
    assert_close(weights, p[None, [0, 2]], check_stride=False)
    (grad,) = torch.autograd.grad(weights[0, 0], logits)
    assert_close(grad, (p[0] * (torch.eye(4)[0] - p))[None])
    assert vllm_topk_softmax(torch.empty(0, 4), 2, True)[2].shape == (0, 2)


def test_vllm_refuses():
    with pytest.raises(ValueError, match=r"^vllm_topk_softmax: expected gating_output \[T, E\], g"):
        vllm_topk_softmax(torch.randn(2, 3, 4), 2, True)
    with pytest.raises(TypeError, match=r"^vllm_topk_softmax: expected indices_type int32 or"):
        vllm_topk_softmax(torch.randn(3, 4), 2, True, torch.uint32)


def test_to_routing_map():
    weights = torch.tensor([[0.5, 0.25], [0.75, 9.0], [8.0, 7.0]], requires_grad=True)
    ids = torch.tensor([[2, 0], [1, -1], [-1, -1]], dtype=torch.int32)
    probs, routing_map = to_routing_map(weights, ids, 4)
    assert probs.tolist() == [[0.25, 0, 0.5, 0], [0, 0.75, 0, 0], [0, 0, 0, 0]]
    assert routing_map.tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert routing_map.dtype == torch.bool
    upstream = torch.arange(12.0).view(3, 4)
    (grad,) = torch.autograd.grad(probs, weights, upstream)
    assert grad.tolist() == [[2, 0], [5, 0], [0, 0]]


def test_there_and_back():
    mask = torch.rand(T) < 0.7
    gating = topk_gating(torch.randn(T, E), k, norm_topk_prob=True, token_mask=mask)
    probs, routing_map = to_routing_map(gating.topk_weights, gating.topk_ids, E)
    assert torch.equal(routing_map.sum(0).int(), gating.tokens_per_expert)
    weights, ids = from_routing_map(probs, routing_map, k)
    assert torch.equal(weights, gating.topk_weights)
    assert torch.equal(ids, gating.topk_ids)
    more_slots, _ = from_routing_map(probs, routing_map, k + 1)
    assert torch.equal(more_slots[:, :k], weights)
    assert not more_slots[:, k].any()


def test_from_routing_map_looks_at_what_is_chosen_alone():
    probs = torch.tensor([[0.1, NAN, 0.3, 0.1], [INF, 0.2, -1.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    routing_map = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.uint8)
    probs.requires_grad_()
    weights, ids = from_routing_map(probs, routing_map, 2)
    assert ids.tolist() == [[0, 3], [2, -1], [0, 1]]
    assert_close(weights, torch.tensor([[0.1, 0.1], [-1.0, 0.0], [0.5, 0.5]]))
    (grad,) = torch.autograd.grad(weights.sum(), probs)
    assert grad.tolist() == [[1, 0, 0, 1], [0, 0, 1, 0], [1, 1, 0, 0]]


def test_a_map_routes_experts():
    """A row may choose from no expert to k: expert_mlp gives what the dense sum does."""
    routing_map = torch.rand(T, E) < 0.3
    routing_map[0] = False
    routing_map[1:, 0] = True
    probs = torch.rand(T, E).bfloat16()
    x, w1, w2 = torch.randn(T, 4), torch.randn(E, 5, 4), torch.randn(E, 4, 5)
    out = expert_mlp(x, w1, w2, *from_routing_map(probs, routing_map, E), activation="relu")
    y = torch.einsum("teh,eoh->teo", torch.einsum("td,ehd->teh", x, w1).relu(), w2)
    assert_close(out, ((probs * routing_map)[..., None] * y).sum(1), check_dtype=False)


@pytest.mark.parametrize("function", [to_routing_map, from_routing_map])
def test_refuses(function):
    probs, other = torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int32)
    names = {
        to_routing_map: (r"topk_weights and topk_ids \[R, k\]", "topk_weights", "topk_ids"),
        from_routing_map: (r"probs and routing_map \[R, E\]", "probs", "routing_map"),
    }
    both, first, second = names[function]
    message = rf"^{function.__name__}: expected {both}, got \[3, 2\] and \[2, 2\]"
    with pytest.raises(ValueError, match=message):
        function(probs, other[:2], 2)
    with pytest.raises(ValueError, match=r"got \[3\] and \[3\]"):
        function(probs[:, 0], other[:, 0], 2)
    with pytest.raises(TypeError, match=f"^{function.__name__}: expected {first} in float32"):
        function(other, other, 2)
    with pytest.raises(TypeError, match=f"^{function.__name__}: expected {second} in "):
        function(probs, probs, 2)
    with pytest.raises(TypeError, match=f"expected {second} on the device of {first}, cpu"):
        function(probs, other.to("meta"), 2)


def test_refuses_k_out_of_range():
    with pytest.raises(ValueError, match=r"^from_routing_map: expected 1 <= top_k <= E = 2, got 3"):
        from_routing_map(torch.rand(3, 2), torch.ones(3, 2, dtype=torch.bool), 3)
