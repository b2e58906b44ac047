"""The reference of info_nce_loss: its own gradients, in float64."""

import pytest
import torch
from test_info_nce_loss import exact, features
from torch.autograd import gradcheck
from torch.testing import assert_close

from m2ae_kernels import info_nce_loss, reference


def test_reference_gradients():
    query, key = (t.detach().double().requires_grad_() for t in features(4, 5, D=3))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, 1, -100, 3])
    key_mask = torch.tensor([True, True, False, True, True])
    for normalize in (False, True):

        def losses(query, key, scale, normalize=normalize):
            return reference.info_nce_loss(
                query,
                key,
                scale,
                target=target,
                key_mask=key_mask,
                normalize=normalize,
                reduction="none",
            )

        assert gradcheck(losses, (query, key, scale))


@pytest.mark.parametrize("normalize", [True, False])
def test_reference_gradients_where_there_is_no_negative(normalize):
    query, key = features(3, 3, D=4)
    scale = torch.tensor(9.0, requires_grad=True)
    alone = torch.tensor([True, False, False])
    for mask in (alone, ~alone, torch.zeros(3, dtype=torch.bool)):
        for masks in ({"query_mask": mask}, {"key_mask": mask, "query_mask": mask}):
            grads = []
            for op in (reference.info_nce_loss, info_nce_loss):
                loss = op(query, key, scale, normalize=normalize, **masks)
                grads.append(torch.autograd.grad(loss, (query, key, scale)))
            for actual, expected in zip(*grads, strict=True):
                assert_close(actual, expected)
    for given in ({"query": query[:0]}, {"query": query[:1], "key": key[:1]}):
        inputs = {"query": query, "key": key, "normalize": normalize} | given
        loss = reference.info_nce_loss(logit_scale=scale, **inputs)
        assert loss.item() == 0
        assert not any(grad.any() for grad in torch.autograd.grad(loss, (query, key, scale)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_reference_in_float64(symmetric):
    query, key = (t.detach().double() for t in features(8, 9, D=5))
    target = torch.tensor([1, 1, -100, 3, 8, 8, 8, 0])
    given = {"target": target, "normalize": True, "symmetric": symmetric}
    loss = reference.info_nce_loss(query, key, 14.3, **given)
    assert_close(loss, exact(query, key, 14.3, **given))
