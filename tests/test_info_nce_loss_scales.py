"""info_nce_loss: scales of any size, sign and dtype, and logits far from 0."""

import itertools
import math

import pytest
import torch
from info_nce_cases import EPS, assert_matches, exact, features, number
from interpreter import fewer, interpret_only
from torch.testing import assert_close

# 78: exp of the logits of rows of norm 1 still has a float32 relative to one common maximum; 78.3
# and more: not any more. 1 / 0.07: where CLIP starts; 100: where it is clamped.
SCALES = [0.0, 1.0, 14.3, 50.0, 78.0, 78.3, 100.0, 200.0, 1e4, -5.0, -100.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_scales(scale, dtype, impl):
    interpret_only(
        "0.0-torch.float32",
        "78.3-torch.bfloat16",
        "100.0-torch.float32",
        "10000.0-torch.float32",
        "-5.0-torch.float16",
    )
    op, device = impl
    query, key = features(16, 20, D=32, device=device, dtype=dtype)
    assert_matches(op, query, key, number(scale, device), normalize=True)
    assert_matches(op, query, key, number(scale, device), reduction="none")
    as_float = op(query, key, scale, normalize=True)
    as_tensor = op(query, key, torch.tensor([scale], device=device), normalize=True)
    assert torch.equal(as_float, as_tensor)


def test_scale_of_0_has_a_gradient(impl):
    op, device = impl
    query, key = features(16, 20, D=32, device=device)
    scale = number(0.0, device)
    loss = op(query, key, scale)
    assert_close(loss, torch.tensor((math.log(16) + math.log(20)) / 2, device=device))
    of_query, of_key, of_scale = torch.autograd.grad(loss, (query, key, scale))
    assert not of_query.any()
    assert not of_key.any()
    # All logits are 0, so all probabilities 1 / M: the mean similarity minus that of the pairs.
    u = (query.detach().double() @ key.detach().double().mT)[:, :16]
    rows = query.detach().double() @ key.detach().double().mean(0) - u.diag()
    columns = query.detach().double().mean(0) @ key.detach().double()[:16].mT - u.diag()
    assert_close(of_scale.double(), (rows.mean() + columns.mean()) / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_scale_keeps_its_dtype(dtype, impl):
    interpret_only("dtype1", "dtype2")
    op, device = impl
    query, key = features(5, 5, D=4, device=device)
    for shape in ((), (1,), (1, 1)):
        scale = torch.full(shape, 14.3, dtype=dtype, device=device, requires_grad=True)
        loss = op(query, key, scale)
        assert_close(loss, exact(query, key, scale.item()).float())
        (grad,) = torch.autograd.grad(loss, scale)
        assert (grad.dtype, grad.shape) == (dtype, shape)
        (wanted,) = torch.autograd.grad(exact(query, key, scale.reshape(())), scale)
        near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float64 else {}  # float32 sums
        assert_close(grad, wanted, **near)


@pytest.mark.parametrize("p", [0.001, 0.5, 0.998, 1 - 1e-6, 1 - 1e-9])
def test_scale_gradient_at_probabilities(p, impl):
    op, device = impl
    # Two orthogonal pairs: each row has the logits s and 0, so its positive has p, and
    # d loss / d scale is -(1 - p) exactly. A negative scale makes p small.
    query, key = (torch.eye(2, device=device, requires_grad=True) for _ in range(2))
    scale = number(math.log(p / (1 - p)), device)
    loss = op(query, key, scale)
    s = scale.detach().double()
    # To base 2 the logit is s log2(e): by its own rounding and the factor's off by up to EPS s.
    exactly = {"rtol": max(1.3e-6, EPS * s.item()), "atol": 0.0}
    assert_close(loss.double(), torch.log1p(torch.exp(-s)), **exactly)
    of_query, of_key, of_scale = torch.autograd.grad(loss, (query, key, scale))
    left = torch.sigmoid(-s)
    assert_close(of_scale.double(), -left, **exactly)
    sign = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], device=device)
    for grad in (of_query, of_key):
        assert_close(grad.double(), sign.double() * (s * left / 2), **exactly)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cosine", [-1.0, -0.6, 0.6])
@pytest.mark.parametrize("scale", [100.0, 200.0])
def test_opposite_cones(scale, cosine, dtype, impl):
    interpret_only("100.0--1.0-torch.float32", "200.0--0.6-torch.bfloat16")
    op, device = impl
    # All queries about one direction, all keys about another: at -1 every logit is about -100,
    # exp of which is no float32 of full precision, nor is it relative to the largest that s allows.
    (noise_q, noise_k), D = features(20, 30, D=16, device=device), 16
    axis, side = torch.eye(D, device=device)[:2]
    query = (axis + 0.05 * noise_q).to(dtype).detach().requires_grad_()
    key = cosine * axis + (1 - cosine**2) ** 0.5 * side + 0.05 * noise_k
    key = key.to(dtype).detach().requires_grad_()
    options = ({}, {"normalize": True}, {"reduction": "none", "symmetric": False})
    for given in fewer(options):
        assert_matches(op, query, key, number(scale, device), **given)
    # Half of the queries, and half of the keys, in the same cone: large and small sums side by side
    mixed = torch.where(torch.arange(30, device=device)[:, None] % 2 == 0, key, -key)
    mixed = mixed.detach().requires_grad_()
    target = torch.randperm(30, device=device)[:20]
    assert_matches(op, query, mixed, number(scale, device), target=target, reduction="none")


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_row_in_the_opposite_cone(symmetric, impl):
    interpret_only("True")
    op, device = impl
    query, key = features(30, 40, D=16, device=device)
    with torch.no_grad():  # logits of query 3 and of key 5 are all about -100, those of others not
        query.mul_(0.1)[:, 0] = 0.0
        key.mul_(0.1)[:, 0] = 1.0
        query[3, 0] = -1.0
        query[:, 1], key[:, 1], key[5, 1] = 1.0, 0.0, -1.0
    given = {"symmetric": symmetric, "reduction": "none"}
    assert_matches(op, query, key, number(100.0, device), **given)


def test_logits_of_millions(impl):
    op, device = impl
    query, key = features(20, 24, D=16, device=device)
    for norm_q, norm_k, scale in itertools.product((1.0, 1e3), (1e3,), (10.0, -10.0)):
        large = [(t.detach() * n).requires_grad_() for t, n in ((query, norm_q), (key, norm_k))]
        assert_matches(op, *large, number(scale, device), reduction="none")
    one = query.detach().clone()
    one[7] *= 1e3  # a single long row; the bound from the largest norms is far from the others
    assert_matches(op, one.requires_grad_(), key, number(30.0, device), reduction="none")


def test_bias_cancels(impl):
    op, device = impl
    query, key = features(5, 5, D=4, device=device)
    expected = op(query, key, 8.0)
    assert torch.equal(op(query, key, 8.0, logit_bias=-10.0), expected)
    for value, dtype in ((-math.inf, torch.float32), (-10.0, torch.bfloat16)):
        bias = number([value], device, dtype)
        loss = op(query, key, 8.0, logit_bias=bias)
        assert torch.equal(loss, expected)
        (grad,) = torch.autograd.grad(loss, bias)
        assert grad.item() == 0
        assert (grad.dtype, grad.shape) == (dtype, (1,))
    losses = op(query, key, 8.0, logit_bias=-10.0, symmetric=False, reduction="none")
    assert losses[1] is None
