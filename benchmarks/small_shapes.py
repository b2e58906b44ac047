"""Launch every CUDA kernel on small inputs of every kind, for compute-sanitizer to watch."""

import torch

import m2ae_kernels

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((), (0,), (1,), (5,), (8193,), (3, 7))


def ema_update() -> None:
    """Every pair of dtypes, with and without shadows, runs of memory and strides, copies."""
    for target_dtype in FLOATING:
        for source_dtype in FLOATING:
            targets = [torch.randn(s, device="cuda").to(target_dtype) for s in SHAPES]
            sources = [torch.randn(s, device="cuda").to(source_dtype) for s in SHAPES]
            targets.append(torch.randn(9, 8, device="cuda").to(target_dtype)[::2, 1::3])
            sources.append(torch.randn(3, 5, device="cuda").to(source_dtype).T)
            shadows = [torch.empty_like(t, dtype=torch.bfloat16) for t in targets]
            decay = torch.tensor(0.9, dtype=torch.float64, device="cuda")
            m2ae_kernels.ema_update_(targets, sources, 0.9)
            m2ae_kernels.ema_update_(targets, sources, decay, shadows=shadows)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.bool):
        counts = torch.ones(33, dtype=dtype, device="cuda")
        m2ae_kernels.ema_update_([torch.zeros_like(counts)], [counts], 0.9)


def contrastive_losses() -> None:
    """Ragged sizes, every dtype, masks, ids and targets; forward and backward."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for N, M, D in ((1, 1, 1), (17, 33, 5), (130, 259, 40), (300, 200, 96)):
            query, key = (
                torch.randn(size, D, device="cuda").to(dtype).requires_grad_() for size in (N, M)
            )
            scale = torch.tensor(10.0, device="cuda", requires_grad=True)
            bias = torch.tensor(-10.0, device="cuda", requires_grad=True)
            target = torch.randint(0, M, (N,), device="cuda")
            target[0] = -100
            masks = (torch.rand(size, device="cuda") < 0.9 for size in (N, M))
            ids = (torch.randint(0, 9, (size,), device="cuda") for size in (N, M))
            given = {"target": target, "normalize": True}
            given |= dict(zip(("query_mask", "key_mask"), masks, strict=True))
            given |= dict(zip(("query_ids", "key_ids"), ids, strict=True))
            for same_id in ("negative", "ignore", "positive"):
                loss = m2ae_kernels.info_nce_loss(query, key, scale, same_id=same_id, **given)
                loss = loss + m2ae_kernels.siglip_loss(
                    query, key, scale, bias, same_id=same_id, **given
                )
                loss.backward()
            m2ae_kernels.info_nce_loss(query * 100, key, scale, target=target).backward()


def experts() -> None:
    """Ragged sizes, every dtype, streams, masked slots, every way to drop; forward and backward."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for T, S, E, k, D in ((1, 1, 1, 1, 1), (33, 2, 5, 2, 24), (700, 1, 300, 4, 17)):
            x = torch.randn(T, D, device="cuda").to(dtype).requires_grad_()
            ids = torch.rand(S * T, E, device="cuda").argsort(1)[:, :k].int()
            ids[0, 0] = -1
            weights = torch.rand(S * T, k, device="cuda").requires_grad_()
            for policy in ("position", "slot", "prob"):
                options = {"capacity": 3, "drop_policy": policy, "align": 8}
                given = {"topk_weights": weights.detach(), **options}
                for routing in (
                    m2ae_kernels.moe_sort(ids, E, **given),
                    m2ae_kernels.moe_sort(ids, E),
                ):
                    rows, _ = m2ae_kernels.moe_permute(x, routing, topk_weights=weights)
                    m2ae_kernels.moe_unpermute(rows, routing, weights).sum().backward()


def expert_layers() -> None:
    """Every dtype, tiles of every height, odd widths, weights everywhere; forward and backward."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for T, S, E, k, D in (
            (1, 1, 1, 1, 1),
            (33, 2, 5, 2, 24),
            (60, 1, 4, 2, 64),
            (700, 1, 9, 4, 17),
        ):
            for name, wide in (("gelu", D), ("swiglu", 2 * D)):
                ids = torch.rand(S * T, E, device="cuda").argsort(1)[:, :k].int()
                ids[0, 0] = -1
                shapes = ((T, D), (E, wide, D), (E, D, D), (E, wide), (E, D), (S, D))
                x, w1, w2, b1, b2, shift = (
                    torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape in shapes
                )
                weights = torch.rand(S * T, k, device="cuda").requires_grad_()
                given = {"b1": b1, "b2": b2, "shift": shift, "activation": name}
                given |= {"dropout_p": 0.1, "output_dropout_p": 0.1}
                for at, output in (("output", "identity"), ("input", "silu"), ("none", "relu")):
                    options = {"apply_router_weight": at, "output_activation": output}
                    out = m2ae_kernels.expert_mlp(x, w1, w2, weights, ids, **given, **options)
                    out.sum().backward()


def grouped_products() -> None:
    """The four forms, ragged, with empty groups and a tail; forward and backward."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for M, K, C in ((1, 1, 2), (33, 24, 40), (700, 17, 70)):
            offs = torch.tensor([M // 3, M // 3, M - 1], dtype=torch.int32, device="cuda")
            shapes = {
                "2x3": ((M, K), (3, K, C)),
                "3x2": ((3, C, K), (K, M)),
                "2x2": ((K, M), (M, C)),
                "3x3": ((3, M, K), (3, K, C)),
            }
            for form, (a, b) in shapes.items():
                mat_a, mat_b = (
                    torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape in (a, b)
                )
                given = {} if form == "3x3" else {"offs": offs}
                for activation in (None, "gelu", "geglu") if form[2] == "3" else (None,):
                    m2ae_kernels.grouped_mm(
                        mat_a, mat_b, activation=activation, **given
                    ).sum().backward()
            ids = torch.randint(-1, M, (2 * M,), device="cuda")
            mat_a, mat_b = (
                torch.randn(s, device="cuda").to(dtype).requires_grad_() for s in shapes["2x3"]
            )
            m2ae_kernels.grouped_mm(mat_a, mat_b, offs=offs, a_ids=ids).sum().backward()


def gating() -> None:
    """Rows of a thread and of a warp, aligned and not, every score, streams, masks, groups."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for T, E, k in ((1, 1, 1), (33, 7, 7), (700, 12, 4), (130, 32, 8), (37, 65, 40)):
            gate(torch.randn(T, E, device="cuda").to(dtype), k)
        for T, E, k in ((33, 256, 8), (5, 510, 3), (9, 1024, 64)):
            gate(torch.randn(T, E, device="cuda").to(dtype), k, n_group=2, topk_group=1)


def gate(logits: torch.Tensor, k: int, **groups: int) -> None:
    T, E = logits.shape
    mask = torch.rand(T, device="cuda") < 0.9
    shift = torch.randn(2, E, device="cuda", requires_grad=True)
    logits.requires_grad_()
    for score in ("softmax", "sigmoid", "sqrtsoftplus"):
        for given in (
            {},
            {"logit_shift": shift, "token_mask": mask},
            {"expert_bias": torch.randn(E, device="cuda"), "norm_topk_prob": True, **groups},
        ):
            output = m2ae_kernels.topk_gating(
                logits, k, score_function=score, return_entropy=True, return_probs_sum=True, **given
            )
            loss = output.topk_weights.square().sum() + output.entropy.sum()
            (loss + output.logsumexp.sum() + output.probs_sum.square().sum()).backward()


if __name__ == "__main__":
    ema_update()
    contrastive_losses()
    experts()
    expert_layers()
    grouped_products()
    gating()
    torch.cuda.synchronize()
    print("all kernels launched")
