"""kit.models.layers against transformers' own layers, in float64, and its two kinds of operations."""

import copy

import pytest
import torch
from conftest import ALL_FAMILIES, make_model, random_documents
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from kit.models.backbone import hidden_states
from kit.models.families import FAMILIES as ROWS
from kit.models.layers import FUSED, PLAIN, DecoderLayer, Norm
from kit.models.nf4 import quantise_decoder
from kit.packing import PackedBatch

LENGTHS = [9, 1, 23, 4]
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8}
SETTINGS = {
    "llama": {"rms_norm_eps": 0.3, "rope_parameters": YARN, "attention_bias": True, "mlp_bias": True},
    "qwen2": {"rms_norm_eps": 0.2},
    "qwen3": {"rms_norm_eps": 0.2},
    "gemma3": {"rms_norm_eps": 0.1, "query_pre_attn_scalar": 5, "num_key_value_heads": 2},
}


class ExactNorm(nn.Module):
    """A norm of transformers that computes in its input's dtype; their own always compute in fp32."""

    def __init__(self, norm, offset):
        super().__init__()
        self.weight, self.offset = norm.weight, offset
        self.eps = self.variance_epsilon = getattr(norm, "eps", None) or norm.variance_epsilon

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.offset + self.weight)


def unusual_model(family):
    """Make a float64 model without default values that would hide a mistake."""
    torch.manual_seed(0)
    config = copy.deepcopy(ALL_FAMILIES[family])
    for name, value in SETTINGS[family].items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="kit").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.dim() > 1 else 0.5))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, ExactNorm(child, 1.0 if family == "gemma3" else 0.0))
    return model


def with_transformers(model, documents):
    """Compute the hidden states of each document alone, with transformers' own forward."""
    model.set_attn_implementation("sdpa")  # "eager" computes its softmax in fp32
    states = [model.model(input_ids=document.ids.long()[None]).last_hidden_state[0] for document in documents]
    model.set_attn_implementation("kit")
    return torch.cat(states)


def add_adapters(model):
    """Add LoRA to all linear layers, with random values."""
    return inject_adapter_in_model(
        LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False), model
    )


def gradients_of(model, states):
    model.zero_grad()
    states.pow(3).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_in_float64_a_pack_gets_what_transformers_computes_for_each_document(family, adapters):
    model, documents = unusual_model(family), random_documents(LENGTHS)
    if adapters:
        add_adapters(model).double()
    truth = with_transformers(model, documents)
    expected = gradients_of(model, truth)
    found = hidden_states(model, PackedBatch.build(documents))
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
    gradients = gradients_of(model, found)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_adapters_on_nf4_weights_give_a_pack_what_they_give_transformers_to_rounding(family):
    model, documents = unusual_model(family).float(), random_documents(LENGTHS)
    plain = with_transformers(model, documents)
    quantise_decoder(model, "cpu")
    add_adapters(model)
    expected = with_transformers(model, documents)
    found = hidden_states(model, PackedBatch.build(documents))
    assert (expected - plain).norm() > 0.1 * plain.norm()
    assert (found - expected).norm() < 100 * torch.finfo(torch.float32).eps * expected.norm()


def results_of(operations, row, dtype):
    """Return what the operations compute, on inputs that are the same in every dtype but for rounding."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).bfloat16().to(dtype)

    norm = nn.Module()
    norm.weight = nn.Parameter(random(32))
    setattr(norm, row.norm_eps, 1e-6)
    x = random(64, 32)
    x[0] *= 2**-10  # eps decides
    x[1] = 0
    gate, up = random(64, 48), random(64, 48)
    return [
        Norm(norm, row, operations)(x),
        *operations.rope(random(64, 4, 6), random(64, 2, 6), random(64, 6), random(64, 6)),
        *(operations.glu(gate.clone(), up.clone(), activation=name) for name in ("silu", "gelu_tanh")),
    ]


@pytest.mark.parametrize("row", [ROWS["llama"], ROWS["gemma3_text"]], ids=["llama", "gemma3"])
def test_plain_and_fused_operations_err_alike_and_round_once(row):
    truth = results_of(PLAIN, row, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        plain, fused = (results_of(operations, row, dtype) for operations in (PLAIN, FUSED))
        for exact, a, b in zip(truth, plain, fused, strict=True):
            assert a.dtype == b.dtype == dtype
            error, other = ((found.double() - exact).norm() for found in (a, b))
            assert error <= 2 * other and other <= 2 * error
            if dtype == torch.bfloat16:  # but for numbers that fp32 puts on the other side of an edge
                assert (a != exact.to(dtype)).float().mean() < 0.01
                assert (b != exact.to(dtype)).float().mean() < 0.01


@pytest.mark.parametrize("operations", [FUSED, PLAIN])
def test_a_change_of_gemmas_norm_that_is_small_beside_1_is_not_rounded_away(operations):
    norm = Gemma3RMSNorm(8).to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.fill_(0.003)
    x = torch.randn(5, 8)
    ours = Norm(norm, ROWS["gemma3_text"], operations)
    torch.testing.assert_close(ours(x), norm(x), rtol=1e-5, atol=1e-6)


def test_an_activation_that_the_kit_does_not_know_is_named():
    model = make_model("llama")
    model.config.hidden_act = "relu"
    with pytest.raises(ValueError, match=r"hidden_act is 'relu'; the kit knows silu, gelu_pytorch_tanh"):
        DecoderLayer(model.model.layers[0])


def test_a_model_with_an_attention_of_transformers_gets_the_kits(tiny_model):
    batch = PackedBatch.build(random_documents(LENGTHS))
    expected = hidden_states(tiny_model, batch)
    tiny_model.set_attn_implementation("sdpa")
    assert torch.equal(hidden_states(tiny_model, batch), expected)


@pytest.mark.parametrize("replaced", ["mlp", "input_layernorm", "self_attn.q_proj"])
def test_a_module_that_is_replaced_after_a_first_use_is_the_one_that_computes(replaced):
    model, batch = make_model("llama"), PackedBatch.build(random_documents(LENGTHS))
    hidden_states(model, batch)
    parent, _, name = f"model.layers.1.{replaced}".rpartition(".")
    other = copy.deepcopy(model.get_submodule(f"model.layers.1.{replaced}"))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    setattr(model.get_submodule(parent), name, other)
    fresh = make_model("llama")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(hidden_states(model, batch), hidden_states(fresh, batch))
