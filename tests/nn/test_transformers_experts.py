"""Models of transformers give the same logits and gradients on expert_mlp as on their own loop."""

import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers_cases import D, E, H, K, assert_same, made_experts, tokens, transformers

import m2ae_kernels
from m2ae_kernels import register_transformers_experts, transformers_experts

# Draws of this width make each layer's output as large as its input; with the default, 0.02, what
# the experts add would be lost in float32's rounding of the residual.
SHARED = {
    "vocab_size": 50,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": K,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "output_router_logits": True,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def mixtral(**given):
    config = transformers.MixtralConfig(
        **SHARED, intermediate_size=H, num_local_experts=E, router_aux_loss_coef=0.1, **given
    )
    return transformers.MixtralForCausalLM._from_config(config, experts_implementation="eager")


def qwen3(**given):
    config = transformers.Qwen3MoeConfig(
        **SHARED, moe_intermediate_size=H, num_experts=E, norm_topk_prob=True, head_dim=8, **given
    )
    return transformers.Qwen3MoeForCausalLM._from_config(config, experts_implementation="eager")


MODELS = {"mixtral": mixtral, "qwen3_moe": qwen3}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]().eval()


def batch():
    """Ids [3, 9] and their mask: one sequence is padded at its left, one at its right."""
    ids, mask = torch.randint(1, 50, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[1, :4], mask[2, 6:] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def run(model, inputs):
    """Logits and the gradients of all parameters."""
    model.zero_grad()
    out = model(**inputs, labels=inputs["input_ids"])
    out.loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **grads}


def first_experts(model):
    return model.model.layers[0].mlp.experts


# ---- whole models


def test_one_call_gives_the_same_logits_and_gradients(model):
    inputs = batch()
    expected = run(model, inputs)
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    register_transformers_experts(model=model)
    assert model.config._experts_implementation == "m2ae_kernels"
    assert_same(run(model, inputs), expected)
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == places
    model.set_experts_implementation("eager")
    assert_close(run(model, inputs), expected, rtol=0, atol=0)


def test_expert_mlp_is_what_runs_on_the_parameters_themselves(model, monkeypatch):
    seen = []
    op = transformers_experts.expert_mlp

    def spy(x, w1, w2, *rest, **given):
        seen.append((w1, w2, given["activation"]))
        return op(x, w1, w2, *rest, **given)

    register_transformers_experts(model=model)
    monkeypatch.setattr(transformers_experts, "expert_mlp", spy)
    model(**batch())
    assert [activation for *_, activation in seen] == ["swiglu"] * 2
    experts = first_experts(model)
    assert seen[0][0] is experts.gate_up_proj
    assert seen[0][1] is experts.down_proj


def test_a_name_of_ones_own_for_from_config():
    register_transformers_experts("ours")
    model = transformers.MixtralForCausalLM._from_config(
        mixtral().config, experts_implementation="ours"
    )
    assert model.config._experts_implementation == "ours"
    inputs = batch()
    ours = run(model, inputs)
    model.set_experts_implementation("eager")
    assert_same(ours, run(model, inputs))
    register_transformers_experts("ours", model)  # once more does no harm


def test_gradients_of_experts_without_tokens_are_zero(model):
    register_transformers_experts(model=model)
    one = {"input_ids": torch.tensor([[7]])}
    logits = model(**one).router_logits[0]
    model(**one).logits.square().sum().backward()
    chosen = logits.topk(K).indices[0].tolist()
    for parameter in (first_experts(model).gate_up_proj, first_experts(model).down_proj):
        assert [e for e in range(E) if parameter.grad[e].any()] == sorted(chosen)
        assert parameter.grad.isfinite().all()


def test_compiles_to_one_graph(model):
    register_transformers_experts(model=model)
    inputs = batch()
    expected = run(model, inputs)
    assert_same(run_compiled(model, inputs), expected)


def run_compiled(model, inputs):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    out = compiled(**inputs, labels=inputs["input_ids"])
    out.loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **grads}


def test_activation_checkpointing(model):
    register_transformers_experts(model=model)
    model.train()
    inputs = batch()
    expected = run(model, inputs)
    older = "gradient_checkpointing_enable"  # its name in transformers 5.9
    getattr(model, "activation_checkpointing_enable", getattr(model, older, None))()
    assert_same(run(model, inputs), expected)


def test_generates_the_same_tokens(model):
    model.config.output_router_logits = False  # transformers' own loss of them fails while decoding
    inputs = {name: tensor[:2] for name, tensor in batch().items()}  # padded at the left alone
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **options)
    register_transformers_experts(model=model)
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_under_autocast(model):
    inputs = batch()
    exact = run(model, inputs)
    errors = {}
    register_transformers_experts()
    for name in ("eager", "m2ae_kernels"):
        model.set_experts_implementation(name)
        with torch.autocast("cpu", torch.bfloat16):
            found = run(model, inputs)
        assert found["logits"].isfinite().all()
        errors[name] = (found["logits"] - exact["logits"]).norm()
    # Attention and router are the same bfloat16 products in both, and err as much.
    assert errors["m2ae_kernels"] <= 1.5 * errors["eager"]


# ---- what is refused


def test_refuses_experts_that_expert_mlp_cannot_serve():
    gelu = mixtral(hidden_act="gelu_pytorch_tanh")
    with pytest.raises(
        ValueError,
        match=r"^register_transformers_experts: expected act_fn silu, gelu, relu of gated experts,"
        r" got GELUTanh\(\) in MixtralExperts; experts_implementation=\"grouped_mm\" takes any",
    ):
        register_transformers_experts(model=gelu)
    assert gelu.config._experts_implementation == "eager"  # and nothing is half done
    config = transformers.GptOssConfig(
        vocab_size=50, hidden_size=D, intermediate_size=H, num_hidden_layers=1, num_local_experts=E,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    clamped = transformers.GptOssForCausalLM(config)
    with pytest.raises(ValueError, match=r"expected act_fn\(gate\) \* up, got an _apply_gate of"):
        register_transformers_experts(model=clamped)


def test_refuses_weights_in_other_dtypes():
    for dtype in (torch.float64, torch.float8_e4m3fn):
        model = mixtral()
        first_experts(model).down_proj.data = first_experts(model).down_proj.data.to(dtype)
        with pytest.raises(ValueError, match=f"bfloat16 or float16, got {dtype} in MixtralExperts"):
            register_transformers_experts(model=model)


def test_refuses_in_forward_what_was_not_given_as_a_model():
    register_transformers_experts()
    norm, _ = made_experts()
    norm.has_post_expert_norm = True
    for experts, message in (
        (norm, "no norm behind the experts, got post_expert_norm"),
        (made_experts(is_concatenated=False)[0], "gate rows before up rows, got interleaved rows"),
        (made_experts("tanh", has_gate=False)[0], r"act_fn gelu, .* of plain experts, got Tanh"),
    ):
        with pytest.raises(ValueError, match=f"^register_transformers_experts: .*{message}"):
            experts(*tokens())


def test_refuses_models_without_such_experts():
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        register_transformers_experts(model=nn.Linear(2, 2))
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=D, intermediate_size=H, num_hidden_layers=1,
            num_attention_heads=4,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"with experts .* got LlamaForCausalLM, which has none"):
        register_transformers_experts(model=llama)


@pytest.mark.parametrize("name", ["eager", "grouped_mm"])
def test_refuses_a_name_that_is_taken(name):
    with pytest.raises(ValueError, match=f"expected a name that is free, got '{name}'"):
        register_transformers_experts(name)


def test_refuses_experts_that_do_not_take_the_name(monkeypatch):
    model = mixtral()
    monkeypatch.setattr(model, "set_experts_implementation", lambda name: None)
    with pytest.raises(ValueError, match="MixtralExperts to take 'm2ae_kernels', got 'eager'"):
        register_transformers_experts(model=model)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"expected transformers 5.9 .*m2ae\[transformers\]"):
        m2ae_kernels.register_transformers_experts()
