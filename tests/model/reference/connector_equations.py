"""A connector, written again from the equations: every expert on every token, heads per token.

It reads a model's state_dict, works in the dtype of what it is given, and shares no code with the
package. z_m: [B, N, d_m], mask: [B, N] bool.
"""

import torch
import torch.nn.functional as F


def mean_of_tokens(x, mask):
    """[B, N, D] to [B, D], item by item, over the tokens that are there."""
    return torch.stack([rows[there].mean(0) for rows, there in zip(x, mask, strict=True)])


def common_space(state, z, modality):
    """(2): z^c = GELU(W_in (z + E) + b)."""
    embedded = z + state[f"modality_embedding.{modality}"]
    return F.gelu(
        embedded @ state[f"in_proj.{modality}.weight"].T + state[f"in_proj.{modality}.bias"]
    )


def gate(state, u, top_k, norm_topk_prob):
    """p_e of the k best experts, 0 of the others, [..., E]."""
    p = (u @ state["moe.router.weight"].T + state["moe.router.bias"]).softmax(-1)
    best = p.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    chosen = torch.zeros_like(p).scatter(-1, best, 1)
    p = p * chosen
    return p / p.sum(-1, keepdim=True) if norm_topk_prob else p


def moe(state, u, top_k, norm_topk_prob):
    """The sum over experts of p_e W2 GELU(W1 u + b1) + b2."""
    p = gate(state, u, top_k, norm_topk_prob)
    out = torch.zeros_like(u)
    for e in range(p.shape[-1]):
        w1, b1 = state["moe.experts.w1"][e], state["moe.experts.b1"][e]
        w2, b2 = state["moe.experts.w2"][e], state["moe.experts.b2"][e]
        out = out + p[..., e, None] * (F.gelu(u @ w1.T + b1) @ w2.T + b2)
    return out


def f(state, c, task, top_k, norm_topk_prob):
    """The core for one task: GELU(LayerNorm(MoE(u))) + u, u = z^c + E_task."""
    u = c + state["task_embedding"][["pred", "cl"].index(task)]
    y = moe(state, u, top_k, norm_topk_prob)
    centered = y - y.mean(-1, keepdim=True)
    normed = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return F.gelu(normed * state[f"norm.{task}.weight"] + state[f"norm.{task}.bias"]) + u


def connect(state, z, source, target, mask, top_k, norm_topk_prob=False):
    """(3), (4): prediction [B, d_target] and query [B, d], the means over tokens of both heads."""
    c = common_space(state, z, source)
    results = []
    for task, head in (("pred", "pred_head"), ("cl", "cl_head")):
        name = f"{head}.{source}_to_{target}"
        per_token = f(state, c, task, top_k, norm_topk_prob) @ state[f"{name}.weight"].T
        results.append(mean_of_tokens(per_token + state[f"{name}.bias"], mask))
    return results


def key(state, z, target, mask):
    """The key [B, d]: each token projected, then the mean."""
    name = f"target_proj.{target}"
    return mean_of_tokens(z @ state[f"{name}.weight"].T + state[f"{name}.bias"], mask)


def objective(prediction, z, query, k, alpha, temperature):
    """(3), (5), (6), with smooth-L1 for (5); z [B, d_target] is a constant."""
    error = (prediction - z).abs()
    pred = torch.where(error < 1, error.square() / 2, error - 0.5).mean()
    cosines = F.normalize(query, dim=1) @ F.normalize(k, dim=1).T / temperature
    own = cosines.diagonal()
    rows, columns = cosines.logsumexp(1) - own, cosines.logsumexp(0) - own
    cl = (rows + columns).sum() / (2 * len(own))
    return alpha * pred + (1 - alpha) * cl, pred, cl
