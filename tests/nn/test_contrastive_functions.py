"""clip_loss, nt_xent_loss and sup_con_loss against what their papers say, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from m2ae_kernels import ContrastiveMetrics, clip_loss, info_nce_loss, nt_xent_loss, sup_con_loss

N, D = 6, 5


def views():
    z1 = torch.randn(N, D)
    return z1, z1 + 0.5 * torch.randn(N, D)


def simclr(z1, z2, temperature, normalize=True):
    """Equation 1 of Chen et al. 2020, for each view: [2N], those of z1 first."""
    z = torch.cat([z1, z2]).double()
    similarity = F.cosine_similarity(z[:, None], z[None], dim=2) if normalize else z @ z.T
    similarity, losses = similarity / temperature, []
    for i in range(len(z)):
        j = (i + len(z) // 2) % len(z)
        others = [k for k in range(len(z)) if k != i]
        losses.append(-torch.log(similarity[i, j].exp() / similarity[i, others].exp().sum()))
    return torch.stack(losses)


def khosla(features, labels, temperature):
    """Equation 2 of Khosla et al. 2020 for each row whose label occurs again; else 0: [N]."""
    z = F.normalize(features.double())
    losses = []
    for i in range(len(z)):
        logits = z @ z[i] / temperature
        others = [k for k in range(len(z)) if k != i]
        positive = [k for k in others if labels[k] == labels[i]]
        log_sum = logits[others].exp().sum().log()
        losses.append((log_sum - logits[positive]).mean() if positive else logits.sum() * 0)
    return torch.stack(losses)


LABELS = torch.tensor([3, 7, 3, -1, 3, 7])  # -1 occurs once


def gradients(loss, *inputs):
    return [of.float() for of in torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("normalize", [True, False])
def test_nt_xent_loss(normalize):
    z1, z2 = (of.requires_grad_() for of in views())
    rows = simclr(z1, z2, 0.5, normalize)
    assert_close(nt_xent_loss(z1, z2, normalize=normalize), rows.mean().float())
    assert_close(nt_xent_loss(z1, z2, normalize=normalize, reduction="sum"), rows.sum().float())
    got = nt_xent_loss(z1, z2, normalize=normalize, reduction="none")
    assert_close(got, rows.float())
    upstream = torch.randn(2 * N)
    assert_close(
        gradients((got * upstream).sum(), z1, z2), gradients((rows * upstream).sum(), z1, z2)
    )


def test_the_first_losses_are_those_of_the_first_views():
    z1, z2 = views()
    z1[0] = -z2[0]  # a view that is far from the other: both lose
    z2[1] = z1[2]  # a negative of the third item's first view
    got = nt_xent_loss(z1, z2, reduction="none")
    swapped = nt_xent_loss(z2, z1, reduction="none")
    assert_close(swapped, got.roll(N))
    assert not torch.allclose(got[:N], got[N:])


def test_weight_is_of_both_views():
    z1, z2 = views()
    weight = torch.rand(N, requires_grad=True)
    both = torch.cat([weight, weight]).double()
    expected = (both * simclr(z1, z2, 0.5)).sum() / both.sum()
    got = nt_xent_loss(z1, z2, weight=weight)
    assert_close(got, expected.float())
    assert_close(gradients(got, weight), gradients(expected, weight))


def test_sup_con_loss():
    features = torch.randn(N, D, requires_grad=True)
    rows = khosla(features, LABELS, 0.1)
    got = sup_con_loss(features, LABELS, reduction="none")
    assert_close(got, rows.float())
    assert got[3] == 0
    upstream = torch.randn(N)
    assert_close(
        gradients((got * upstream).sum(), features), gradients((rows * upstream).sum(), features)
    )
    # One row is skipped: the mean is over five, not six.
    assert_close(sup_con_loss(features, LABELS), (rows.sum() / 5).float())
    assert_close(sup_con_loss(features, LABELS, reduction="sum"), rows.sum().float())


def test_sup_con_loss_by_weight_leaves_out_what_has_no_positive():
    features, weight = torch.randn(N, D), torch.rand(N)
    rows, kept = khosla(features, LABELS, 0.1), weight.double() * (LABELS >= 0)
    assert_close(
        sup_con_loss(features, LABELS, weight=weight), ((kept * rows).sum() / kept.sum()).float()
    )


def test_a_row_without_a_positive_is_a_negative():
    features = torch.randn(N, D, requires_grad=True)
    sup_con_loss(features, LABELS).backward()
    assert features.grad[3].abs().max() > 1e-3


def test_labels_that_all_differ_have_no_loss():
    features = torch.randn(N, D, requires_grad=True)
    loss = sup_con_loss(features, torch.arange(N))
    loss.backward()
    assert loss == 0
    assert (features.grad == 0).all()


def test_two_views_as_labels_are_nt_xent():
    z1, z2 = views()
    labels = torch.arange(N).repeat(2)
    assert_close(sup_con_loss(torch.cat([z1, z2]), labels, 0.5), nt_xent_loss(z1, z2, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_temperature_that_is_a_tensor_has_a_gradient(dtype):
    z1, z2 = views()
    learned, exact = torch.tensor(0.25, dtype=dtype), torch.tensor(0.25, dtype=torch.float64)
    for function, definition in (
        (lambda t: nt_xent_loss(z1, z2, t), lambda t: simclr(z1, z2, t).mean()),
        (lambda t: sup_con_loss(z1, LABELS, t), lambda t: khosla(z1, LABELS, t).sum() / 5),
    ):
        t, u = learned.clone().requires_grad_(), exact.clone().requires_grad_()
        function(t).backward()
        definition(u).backward()
        assert_close(t.grad, u.grad.to(dtype))


def test_one_item_has_nothing_to_lose():
    z1, z2 = torch.randn(2, 1, D).unbind()
    assert nt_xent_loss(z1, z2) == 0
    assert sup_con_loss(z1, torch.tensor([4])) == 0
    assert nt_xent_loss(z1[:0], z2[:0]) == 0


def test_clip_loss_is_info_nce_loss_in_both_directions():
    x, y = views()
    assert_close(clip_loss(x, y, 5.0), info_nce_loss(x, y, 5.0), rtol=0, atol=0)
    bias = torch.tensor(2.0, requires_grad=True)
    loss = clip_loss(x, y, 5.0, bias, normalize=True)
    loss.backward()
    assert_close(loss.detach(), info_nce_loss(x, y, 5.0, normalize=True), rtol=0, atol=0)
    assert bias.grad == 0
    loss, metrics = clip_loss(x, y, 5.0, return_metrics=True)
    assert isinstance(metrics, ContrastiveMetrics)
    logits = 5 * x @ y.T
    assert metrics.rank_q.tolist() == (logits > logits.diag()[:, None]).sum(1).tolist()


BAD = [
    (
        nt_xent_loss,
        (torch.zeros(3), torch.zeros(3)),
        {},
        r"nt_xent_loss: expected z1 \[N, D\], got \[3\]",
    ),
    (
        nt_xent_loss,
        (torch.zeros(3, 2), torch.zeros(4, 2)),
        {},
        r"nt_xent_loss: expected z2 \[N = 3, D = 2\], got \[4, 2\]",
    ),
    (
        nt_xent_loss,
        (torch.zeros(3, 2), torch.zeros(3, 2)),
        {"weight": torch.ones(6)},
        r"nt_xent_loss: expected weight \[N = 3\], got \[6\]",
    ),
    (
        nt_xent_loss,
        (torch.zeros(3, 2), torch.zeros(3, 2), 0.0),
        {},
        r"nt_xent_loss: expected temperature > 0, got 0.0",
    ),
    (
        sup_con_loss,
        (torch.zeros(3, 2, 4), torch.zeros(3)),
        {},
        r"sup_con_loss: expected features \[N, D\], got \[3, 2, 4\]",
    ),
    (
        sup_con_loss,
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)),
        {},
        r"sup_con_loss: expected labels \[N = 3\], got \[2\]",
    ),
    (
        sup_con_loss,
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), -1.0),
        {},
        r"sup_con_loss: expected temperature > 0, got -1.0",
    ),
    (
        sup_con_loss,
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), float("nan")),
        {},
        "got nan",
    ),
]


@pytest.mark.parametrize("function, arguments, options, message", BAD)
def test_wrong_values(function, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)


def test_wrong_dtypes():
    with pytest.raises(TypeError, match="nt_xent_loss: expected z2 in float32, got"):
        nt_xent_loss(torch.zeros(3, 2), torch.zeros(3, 2).bfloat16())
    with pytest.raises(TypeError, match="sup_con_loss: expected labels in int64, got"):
        sup_con_loss(torch.zeros(3, 2), torch.zeros(3))
