"""What the tests of info_nce_loss share: its definition in float64, and how close is close."""

import torch
import torch.nn.functional as F
from torch.testing import assert_close

EPS = torch.finfo(torch.float32).eps


def features(*sizes, D, device="cpu", dtype=torch.float32):
    """Rows of norm about 1."""
    return [
        (torch.randn(N, D, device=device) / max(D, 1) ** 0.5).to(dtype).requires_grad_()
        for N in sizes
    ]


def number(value, device="cpu", dtype=torch.float32):
    return torch.tensor(value, device=device, dtype=dtype, requires_grad=True)


def entries(
    N,
    M,
    device,
    target=None,
    target_offset=0,
    ignore_index=-100,
    query_mask=None,
    key_mask=None,
    query_ids=None,
    key_ids=None,
    same_id="negative",
    exclude_self=False,
):
    """Which pairs are absent, positive, a query with its target, [N, M]; which rows count, [N]."""
    rows, columns = torch.arange(N, device=device)[:, None], torch.arange(M, device=device)
    target = rows[:, 0] + target_offset if target is None else target
    counts = target != ignore_index
    at_target = (target[:, None] == columns) & counts[:, None]
    absent = torch.zeros(N, M, dtype=torch.bool, device=device)
    if query_mask is not None:
        absent[~query_mask] = True
    if key_mask is not None:
        absent[:, ~key_mask] = True
    if exclude_self:
        absent[columns == rows + target_offset] = True
    positive = at_target.clone()
    if same_id != "negative":
        same = query_ids[:, None] == key_ids
        (absent if same_id == "ignore" else positive)[same & ~at_target] = True
    return absent, positive & ~absent, at_target & ~absent, counts


def direction(logits, absent, positive, smoothing):
    """Each row's loss, and whether it has one: the mean over its positives p of log(1 + sum of
    exp(l - l_p) over the other pairs), which loses no digits to a softmax of almost 1.
    """
    M = logits.shape[1]
    row, p = positive.nonzero(as_tuple=True)
    others = ~absent[row] & (torch.arange(M, device=p.device) != p[:, None])
    above = (logits[row] - logits[row, p][:, None]).masked_fill(~others, -torch.inf)
    of_pair = above.logsumexp(1) if M else above.sum(1)
    of_pair = torch.logaddexp(of_pair, torch.zeros_like(of_pair))
    count = positive.sum(1)
    loss = logits.new_zeros(len(logits)).index_add(0, row, of_pair) / count.clamp(min=1)
    if smoothing > 0:
        present = (~absent).sum(1).clamp(min=1)
        mean = torch.where(absent, 0, logits).sum(1) / present
        spread = torch.where(absent, -torch.inf, logits).logsumexp(1) - mean
        loss = torch.where(count > 0, (1 - smoothing) * loss + smoothing * spread, 0)
    return loss, count > 0


def rows_of(query, key, normalize=False, eps=1e-12, query_mask=None, key_mask=None, **_):
    """Both sides in float64; absent rows are 0."""
    x = query if query_mask is None else torch.where(query_mask[:, None], query, 0)
    y = key if key_mask is None else torch.where(key_mask[:, None], key, 0)
    sides = x.double(), y.double()
    return tuple(F.normalize(z, eps=eps) for z in sides) if normalize else sides


def exact(query, key, scale=1 / 0.07, *, added=(0, 0, 0), **given):
    """info_nce_loss by its definition, in float64; it holds the matrix once per positive of a row.

    `added` to the logits, to the losses of queries and to those of keys: to get their gradients.
    """
    x, y = rows_of(query, key, **given)
    logits = torch.as_tensor(scale, device=x.device).double() * (x @ y.mT) + added[0]
    given = {name: value for name, value in given.items() if name not in ("normalize", "eps")}
    symmetric, reduction = given.pop("symmetric", True), given.pop("reduction", "mean")
    smoothing, weight = given.pop("label_smoothing", 0.0), given.pop("weight", None)
    absent, positive, _, counts = entries(*logits.shape, logits.device, **given)
    sides = [(logits, absent, positive & counts[:, None])]
    sides += [(logits.mT, absent.mT, positive.mT)] if symmetric else []
    weight = torch.ones_like(logits[:, 0]) if weight is None else weight.double()
    mean = (positive * weight[:, None]).sum(0) / positive.sum(0).clamp(min=1)
    losses = []
    for side, weights, more in zip(sides, (weight, mean), added[1:], strict=False):
        loss, in_loss = direction(*side, smoothing)
        loss = (loss + more) * weights
        if reduction != "none":
            total = torch.where(in_loss, weights, 0).sum() if reduction == "mean" else 1
            loss = loss.sum() / (total if total != 0 else 1)
        losses.append(loss)
    return tuple(losses) if reduction == "none" else sum(losses) / len(losses)


def rounding(query, key, scale, **given):
    """(relative error of loss and gradients in float32, rounding of the largest logit).

    A logit is off by about one EPS of the largest one, for its product and for its scale each; its
    exp is off by that relatively, and sums and the second product add a few EPS.
    """
    with torch.no_grad():
        x, y = rows_of(query, key, **given)
        logits = float(scale) * (x @ y.mT)
    largest = logits.abs().max().item() if logits.numel() else 0.0
    return EPS * (8 + 2 * largest), EPS * largest


# The matrix of the logits' gradients is rounded to 16 bits on its way into a product: by 0.2 eps of
# its elements in the root mean square. Some room is left.
HALVES = {torch.bfloat16: 2e-3, torch.float16: 2e-3 / 8, torch.float32: 0.0}


def assert_matches(op, query, key, scale=1 / 0.07, **given):
    """Loss, or losses, and gradients by a random upstream one, of what requires them."""
    names = {"query": query, "key": key, "scale": scale, "weight": given.get("weight")}
    inputs = {k: t for k, t in names.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    doubled = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    twins = {**given, **{name: t for name, t in doubled.items() if name == "weight"}}
    x, y, s = (doubled.get(name, names[name]) for name in ("query", "key", "scale"))
    added = [x.new_zeros(size, dtype=torch.float64) for size in ((len(x), len(y)), len(x), len(y))]
    added = [zeros.requires_grad_() for zeros in added]
    actual, expected = op(query, key, scale, **given), exact(x, y, s, added=added, **twins)
    losses = [z for z in actual if z is not None] if isinstance(actual, tuple) else [actual]
    wanted = list(expected) if isinstance(expected, tuple) else [expected]
    near, far = rounding(query, key, scale, **given)
    for loss, right in zip(losses, wanted, strict=True):
        assert loss.dtype == torch.float32
        # Of one positive, the loss is off relatively; the mean of several logits is off by itself.
        assert_close(loss.double(), right, rtol=near, atol=far + EPS)
    upstream = [torch.randn_like(loss) for loss in losses]
    grads = torch.autograd.grad(losses, list(inputs.values()), upstream)
    of_all, upstream = (*doubled.values(), *added), [u.double() for u in upstream]
    right = torch.autograd.grad(wanted, of_all, upstream, allow_unused=True)
    right = [torch.zeros_like(t) if g is None else g for g, t in zip(right, of_all, strict=True)]
    half = HALVES[query.dtype]
    sizes = _sizes(x, y, s, _dlogits(*right[-3:], **given), **given)
    for (name, tensor), grad, exactly in zip(inputs.items(), grads, right, strict=False):
        assert grad.dtype == tensor.dtype, name
        terms, roundings = sizes.get(name, (exactly.norm(), 0))
        bound = near * terms + half * roundings + torch.finfo(grad.dtype).eps / 2 * exactly.norm()
        error = (grad.double() - exactly).norm()
        assert error <= bound, f"{name}: off by {error:.3g}, more than {bound:.3g}"


def _dlogits(dlogits, w, v, label_smoothing=0.0, normalize=False, eps=0, **given):
    """Sizes of what the gradients of the logits are made of: of several positives, shares of which
    1 / k is taken off, and with smoothing what is spread evenly.
    """
    sizes = dlogits.abs()
    for name in ("symmetric", "reduction", "weight"):
        given.pop(name, None)
    absent, positive, _, _ = entries(*dlogits.shape, dlogits.device, **given)
    for dim, upstream in ((1, w[:, None]), (0, v)):
        k, present = positive.sum(dim, keepdim=True), (~absent).sum(dim, keepdim=True)
        share = positive / k.clamp(min=1)
        sizes = sizes + upstream.abs() * torch.where(k > 1, share, 0)
        even = ~absent / present.clamp(min=1)
        sizes = sizes + label_smoothing * upstream.abs() * (share + even)
    return sizes


def _sizes(query, key, scale, dlogits, **given):
    """Of each gradient, a sum of terms that may cancel: the sum of their sizes, which bounds what
    a relative error of each does; and the root of that of their squares, for independent roundings.
    """
    with torch.no_grad():
        x, y = rows_of(query, key, **given)
        factors = [torch.as_tensor(scale).abs().double()] * 2
        if given.get("normalize"):
            eps = given.get("eps", 1e-12)
            factors = [
                f / z.norm(dim=1).clamp(min=eps) for f, z in zip(factors, (query, key), strict=True)
            ]
        sizes = {}
        for name, dz, z, factor in (
            ("query", dlogits, y, factors[0]),
            ("key", dlogits.mT, x, factors[1]),
        ):
            terms, squares = dz @ z.abs(), dz.square() @ z.square().sum(1)
            sizes[name] = (terms.mT * factor).norm(), (squares.sqrt() * factor).norm()
        terms = dlogits * (x @ y.mT)
        # One number, and not the norm of many: four standard deviations.
        return sizes | {"scale": (terms.abs().sum(), 4 * terms.norm())}


def on_cuda(N, M):
    """Targets, masks and ids of N queries and M keys, on a GPU."""
    return {
        "target": torch.arange(N, device="cuda") % 7,
        "query_mask": torch.arange(N, device="cuda") % 5 != 1,
        "key_mask": torch.arange(M, device="cuda") % 6 != 1,
        "query_ids": torch.arange(N, device="cuda") % 9,
        "key_ids": torch.arange(M, device="cuda") % 11,
    }
