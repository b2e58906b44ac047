"""The connector against its equations in float64, its golden counts, padding, and refusals.

The equations: tests/model/reference/connector_equations.py.
"""

import re

import pytest
import torch
from reference import connector_equations as equations
from torch.testing import assert_close

from m2ae.config import ConnectorConfig, ConnectorLossConfig
from m2ae.losses.connector import connector_loss
from m2ae.models.connector import MoEConnector

DIMS = {"image": 10, "text": 7}
SMALL = ConnectorConfig(dims=DIMS, hidden_size=12, num_experts=5, top_k=2, dropout=0.0)
DIRECTIONS = [("image", "text"), ("text", "image")]
B, N = 6, 4


def connector_of(config=SMALL):
    """A connector in eval mode whose router decides clearly and whose biases are not 0."""
    torch.manual_seed(1)
    model = MoEConnector(config).eval()
    with torch.no_grad():
        model.moe.router.weight.mul_(3)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "b1", "b2")) or name.startswith("norm."):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens_of(modality, mask=None):
    z = torch.randn(B, N, DIMS[modality])
    return z if mask is None else torch.where(mask[..., None], z, torch.nan)


def lengths_mask():
    """Row b has 1 + b mod N tokens."""
    return torch.arange(N) < 1 + torch.arange(B)[:, None] % N


def relative(x, exact):
    return ((x - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("source,target", DIRECTIONS)
def test_equals_the_equations_with_every_gradient(source, target, masked, norm_topk_prob):
    config = ConnectorConfig(DIMS, 12, 5, 2, 0.0, norm_topk_prob)
    model = connector_of(config)
    mask = lengths_mask() if masked else torch.ones(B, N, dtype=torch.bool)
    given = mask if masked else None
    x, y = (tokens_of(name, given).requires_grad_() for name in (source, target))

    output = model(x, source, target, given)
    key = model.project_target(y, target, given)
    # The target of the loss: a pooled latent, no function of anything.
    z = torch.randn(B, DIMS[target])
    loss, terms = connector_loss(
        output.prediction, z, output.query, key, ConnectorLossConfig(temperature=0.1)
    )
    loss.backward()

    exact = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    # Padding holds NaN for the model; the equations leave it out, but would multiply it by 0.
    x64, y64 = (t.detach().double().nan_to_num(0).requires_grad_() for t in (x, y))
    prediction, query = equations.connect(exact, x64, source, target, mask, 2, norm_topk_prob)
    k = equations.key(exact, y64, target, mask)
    wanted, pred, cl = equations.objective(prediction, z.double(), query, k, 0.5, 0.1)
    wanted.backward()

    # Sums of at most 40 products in float32, a dozen layers deep: errors of some 1e-7 each, which
    # the temperature of 0.1 makes ten times as large in the gradients.
    pairs = [
        (output.prediction, prediction),
        (output.query, query),
        (key, k),
        (loss, wanted),
        (terms["pred"], pred),
        (terms["cl"], cl),
        (x.grad, x64.grad),
        (y.grad, y64.grad),
    ]
    for ours, right in pairs:
        assert relative(ours.detach(), right.detach()) <= 1e-5
    for name, parameter in model.named_parameters():
        right = exact[name].grad
        if right is None:
            assert parameter.grad is None, name
        else:
            assert relative(parameter.grad, right) <= 1e-5, name


@pytest.mark.parametrize("source,target", DIRECTIONS)
def test_a_direction_reaches_its_own_parameters_and_the_shared_ones(source, target):
    model = connector_of()
    output = model(tokens_of(source), source, target)
    key = model.project_target(tokens_of(target), target)
    (output.prediction.sum() + (output.query * key).sum()).backward()
    shared = {name for name, _ in model.named_parameters()}
    shared = {n for n in shared if n.startswith(("moe.", "norm.", "task_embedding"))}
    own = {f"modality_embedding.{source}"}
    for layer in (
        f"in_proj.{source}",
        f"target_proj.{target}",
        f"pred_head.{source}_to_{target}",
        f"cl_head.{source}_to_{target}",
    ):
        own |= {f"{layer}.weight", f"{layer}.bias"}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == shared | own


def test_parameters_at_the_size_of_the_paper():
    with torch.device("meta"):
        model = MoEConnector(ConnectorConfig(dims={"image": 1024, "text": 4096}))
    assert (model.config.hidden_size, model.config.num_experts) == (2048, 12)
    parts = {}
    for name, parameter in model.named_parameters():
        part = "gate" if name.startswith("moe.router") else name.split(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    assert parts == {
        "moe": 12 * 2 * (2048**2 + 2048),
        "gate": 24_588,
        "in_proj": 2_099_200 + 8_390_656,
        "pred_head": 8_392_704 + 2_098_176,
        "cl_head": 2 * 4_196_352,
        "target_proj": 2_099_200 + 8_390_656,
        "modality_embedding": 1024 + 4096,
        "task_embedding": 2 * 2048,
        "norm": 2 * 4096,
    }
    assert sum(parts.values()) == 140_617_740


def test_drawn_as_the_authors_draw():
    model = MoEConnector(ConnectorConfig(dims={"image": 600, "text": 500}, hidden_size=400))
    for name, parameter in model.named_parameters():
        if name.startswith("norm."):
            assert (parameter == float(name.endswith("weight"))).all(), name
        elif name.endswith((".bias", ".b1", ".b2")):
            assert not parameter.any(), name
        else:
            bound = (6 / parameter.shape[-1]) ** 0.5
            assert parameter.abs().max() <= bound, name
            # Of 500 uniform numbers or more, all are below 0.98 of the bound once in 20,000 times.
            assert parameter.abs().max() > 0.98 * bound, name
            # Their mean square is bound^2 / 3; u^2 has a variance of 4/5 of its mean squared. Four
            # standard errors.
            error = 4 * (4 / 5) ** 0.5 / parameter.numel() ** 0.5
            assert parameter.square().mean().item() == pytest.approx(bound**2 / 3, rel=error), name


def test_swapping_task_embeddings_swaps_the_streams():
    model = connector_of()
    with torch.no_grad():  # what tells the streams apart apart from the embeddings
        model.norm["cl"].load_state_dict(model.norm["pred"].state_dict())
        model.pred_head["image_to_text"] = model.cl_head["image_to_text"]
    z = tokens_of("image")
    before = model(z, "image", "text")
    assert (before.prediction - before.query).norm() > 0.1 * before.query.norm()
    with torch.no_grad():
        model.task_embedding.copy_(model.task_embedding.flip(0))
    after = model(z, "image", "text")
    assert torch.equal(after.prediction, before.query)
    assert torch.equal(after.query, before.prediction)


def test_a_token_may_be_routed_differently_for_each_task():
    model = connector_of()
    with torch.no_grad():  # embeddings that lie along the weights of experts 3 and 1
        model.task_embedding.copy_(10 * model.moe.router.weight[[3, 1]])
    gating = model.moe.router(torch.zeros(1, 12), shift=model.task_embedding)
    assert gating.topk_ids[:, 0].tolist() == [3, 1]


def test_routing_counts_tokens_of_both_tasks_and_no_padding():
    model, mask = connector_of(), lengths_mask()
    routing = model(tokens_of("image", mask), "image", "text", mask).routing
    assert routing["tokens_per_expert"].sum() == 2 * mask.sum() * 2  # tasks, tokens, k


@pytest.mark.parametrize("source,target", DIRECTIONS)
def test_padding_never_matters(source, target):
    model, mask = connector_of(), lengths_mask()
    x, y = tokens_of(source, mask), tokens_of(target, mask)
    padded, padded_key = model(x, source, target, mask), model.project_target(y, target, mask)
    for b in range(B):
        n = int(mask[b].sum())
        alone = model(x[b : b + 1, :n], source, target)
        assert_close(alone.prediction, padded.prediction[b : b + 1])
        assert_close(alone.query, padded.query[b : b + 1])
        assert_close(model.project_target(y[b : b + 1, :n], target), padded_key[b : b + 1])
    garbage = torch.where(mask[..., None], x, 1e30)
    again = model(garbage, source, target, mask)
    assert torch.equal(again.prediction, padded.prediction)
    assert torch.equal(again.query, padded.query)


def test_an_item_without_tokens_gives_the_biases_and_no_gradient():
    model, mask = connector_of(), lengths_mask()
    mask[2] = False
    z = tokens_of("image", mask).requires_grad_()
    output = model(z, "image", "text", mask)
    assert torch.equal(output.prediction[2], model.pred_head["image_to_text"].bias)
    assert torch.equal(output.query[2], model.cl_head["image_to_text"].bias)
    (output.prediction.sum() + output.query.sum()).backward()
    assert not z.grad[2].any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_both_tasks_are_one_call_of_each_op():
    model = connector_of()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(tokens_of("image"), "image", "text")
    called = [event.name for event in profile.events()]
    for op in ("topk_gating", "moe_sort", "expert_mlp"):
        assert called.count(f"m2ae_kernels::{op}") == 1, op


def test_compiles_to_one_graph():
    model, mask = connector_of(), lengths_mask()
    z = tokens_of("image", mask)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours, wanted = compiled(z, "image", "text", mask), model(z, "image", "text", mask)
    assert_close(ours.prediction, wanted.prediction)
    assert_close(ours.query, wanted.query)
    (ours.prediction.sum() + ours.query.sum()).backward()
    assert model.in_proj["image"].weight.grad.isfinite().all()


def test_autocast_is_near_float32():
    model = connector_of()
    with torch.no_grad():  # decided by far, so that no token changes its experts
        model.moe.router.weight.mul_(0)
        model.moe.router.bias.copy_(torch.arange(5.0))
    z = tokens_of("image")
    wanted = model(z, "image", "text")
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(z, "image", "text")
    # A dozen roundings to 8 bits one after the other, each an error of at most 2^-9 of its value.
    assert relative(ours.prediction.float(), wanted.prediction) <= 12 * 2**-9
    assert relative(ours.query.float(), wanted.query) <= 12 * 2**-9
    assert ours.query.dtype == torch.bfloat16  # autocast did take part


def test_a_pooled_latent_is_one_token():
    model = connector_of()
    z = torch.randn(B, 10)
    pooled, token = model(z, "image", "text"), model(z[:, None], "image", "text")
    assert torch.equal(pooled.prediction, token.prediction)
    assert torch.equal(pooled.query, token.query)
    assert pooled.prediction.shape == (B, 7)
    assert pooled.query.shape == model.project_target(torch.randn(B, 7), "text").shape == (B, 12)


def test_no_items():
    model = connector_of()
    output = model(torch.zeros(0, 10), "image", "text")
    assert (output.prediction.shape, output.query.shape) == ((0, 7), (0, 12))


def test_three_modalities_have_six_directions():
    model = connector_of(ConnectorConfig({"image": 10, "text": 7, "audio": 3}, 12, 5, 2, 0.0))
    assert len(model.pred_head) == len(model.cl_head) == 6
    assert model(torch.randn(B, 7), "text", "audio").prediction.shape == (B, 3)


def test_dropout_is_of_training_alone():
    model = connector_of(ConnectorConfig(DIMS, 12, 5, 2, 0.5))
    z = tokens_of("image")
    assert torch.equal(model(z, "image", "text").query, model(z, "image", "text").query)
    model.train()
    assert not torch.equal(model(z, "image", "text").query, model(z, "image", "text").query)


def test_what_is_saved_is_loaded(tmp_path):
    model = connector_of()
    model.save_pretrained(tmp_path)
    loaded = MoEConnector.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config == model.config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    z = tokens_of("text")
    ours, theirs = (m(z, "text", "image") for m in (model, loaded))
    assert torch.equal(ours.prediction, theirs.prediction)
    assert torch.equal(ours.query, theirs.query)


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        (((B, 10), "image", "txet"), ValueError, "a known target, got 'txet'; did you mean 'text'"),
        (((B, 10), "video", "text"), ValueError, "forward: expected a known source, got 'video'"),
        (((B, 10), "image", "image"), ValueError, "expected another target than the source"),
        (((B, 7), "image", "text"), ValueError, "image [B, N, 10] or [B, 10], got [6, 7]"),
        (((10,), "image", "text"), ValueError, "got [10]"),
        (((B, N, 10), "image", "text", (B, 3)), ValueError, "got [6, 3] and [6, 4, 10]"),
        (((B, 10), "image", "text", (B, 10)), ValueError, "got [6, 10] and [6, 10]"),
        (((B, N, 10), "image", "text", None), TypeError, "expected a mask of bool, got torch.fl"),
    ],
)
def test_refusals(arguments, error, message):
    model = connector_of()
    shape, *names = arguments
    if len(names) == 3:  # None: a mask of another dtype
        size = names[2]
        names[2] = torch.ones(B, N) if size is None else torch.ones(size, dtype=torch.bool)
    with pytest.raises(error, match=re.escape(message)):
        model(torch.zeros(shape), *names)


def test_a_name_that_torch_needs_is_refused():
    with pytest.raises(ValueError, match=r"no attribute of, got \['values'\]"):
        MoEConnector(ConnectorConfig({"image": 4, "values": 3}))


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="project_target: expected a known target, got 'audio'"):
        connector_of().project_target(torch.zeros(B, 7), "audio")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"dims": {"image": 4}}, "dims: expected two modalities or more"),
        ({"dims": {"image": 4, "text": 0}}, "dims: expected 1 channel or more each"),
        ({"dims": {"image": 4, "my.text": 4}}, "names of letters, digits and _, without '_to_'"),
        ({"dims": {"a_to_b": 4, "c": 4}}, "names of letters, digits and _, without '_to_'"),
        ({"hidden_size": 0}, "hidden_size: expected 1 channel or more, got 0"),
        ({"num_experts": 0}, "num_experts: expected 1 expert or more, got 0"),
        ({"top_k": 13}, "top_k: expected 1 to num_experts = 12, got 13"),
        ({"top_k": 0}, "top_k: expected 1 to num_experts = 12, got 0"),
        ({"dropout": 1.0}, "dropout: expected a share in [0, 1), got 1.0"),
    ],
)
def test_configs_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ConnectorConfig(**({"dims": DIMS} | changes))


def test_a_config_is_read_back_equal_and_unknown_keys_are_refused():
    assert ConnectorConfig.from_dict(SMALL.to_dict()) == SMALL
    with pytest.raises(ValueError, match="'topk'; did you mean 'top_k'"):
        ConnectorConfig.from_dict({"dims": DIMS, "topk": 2})
    with pytest.raises(ValueError, match=r"ConnectorConfig\.dims: expected a value, got none"):
        ConnectorConfig.from_dict({})
