"""kit.generate.decode, one token at a time, against the model's own forward over the whole text."""

import copy

import pytest
import torch
from conftest import ALL_FAMILIES, FAMILIES, SHAPE
from counting import Counter
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from kit.generate.decode import Decoder
from kit.generate.kv_cache import SlotCache
from kit.generate.sampler import generate
from kit.generate.sampling import SamplingParams
from kit.models.joined import join
from kit.models.layers import FUSED, PLAIN
from kit.models.nf4 import quantise_decoder

T = 19  # positions, more than twice conftest's window of 7
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8}
SETTINGS = {
    "llama": {"rms_norm_eps": 0.3, "rope_parameters": YARN},
    "qwen2": {"rms_norm_eps": 0.2},
    "qwen3": {"rms_norm_eps": 0.2},
    "gemma3": {"rms_norm_eps": 0.1, "query_pre_attn_scalar": 5, "num_key_value_heads": 2},
}


def make_model(family, dtype=torch.float32):
    """A model without default values that would hide a mistake: norms, biases, eps, score scale, rope."""
    torch.manual_seed(0)
    config = copy.deepcopy(ALL_FAMILIES[family])
    for name, value in SETTINGS[family].items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="kit").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.dim() > 1 else 0.5))
    return model.to(dtype)


def token_by_token(model, ids, operations=None):
    """Compute the hidden states (rows, T, H) one token at a time."""
    cache, decoder = SlotCache(model, len(ids), T), Decoder(model, operations)
    hidden = []
    with torch.no_grad():
        for t in range(T):
            positions = torch.full((len(ids),), t)
            cache.at_decode(positions, max(positions.tolist()))
            hidden.append(decoder(ids[:, t], positions, cache))
    return torch.stack(hidden, dim=1)


def whole(model, ids):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
    model.set_attn_implementation("kit")
    return hidden


def random_ids():
    torch.manual_seed(1)
    return torch.randint(3, 97, (3, T))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("operations", [PLAIN, FUSED], ids=["plain", "fused"])  # on a CPU, on a card
def test_hidden_states_are_the_models_own(family, dtype, operations):
    model, ids = make_model(family, dtype), random_ids()
    truth = whole(make_model(family, dtype).double(), ids)
    ours, theirs = (
        (states.double() - truth).norm()
        for states in (token_by_token(model, ids, operations), whole(model, ids))
    )
    assert ours <= 2 * theirs


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_model_loaded_to_a_card_takes_four_products_per_layer_and_copies_nothing(family):
    model, ids, launches = make_model(family), random_ids(), []
    apart = token_by_token(model, ids, FUSED)
    for _ in range(2):
        decoder, cache, positions = Decoder(model, FUSED), SlotCache(model, 3, T), torch.tensor([3, 5, 9])
        with torch.no_grad(), Counter() as counter:
            cache.at_decode(positions, 9)
            decoder(ids[:, 0], positions, cache)
        products = sum(counter.by_operator[f"aten::{name}"].launches for name in ("mm", "addmm"))
        launches.append((products, counter.total.launches))
        join(model, torch.device("cpu"))
    num_layers = len(decoder.layers)
    assert [products for products, _ in launches] == [7 * num_layers, 4 * num_layers]
    assert launches[0][1] - launches[1][1] == 3 * num_layers
    torch.testing.assert_close(token_by_token(model, ids, FUSED), apart)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_and_quantised_layers_do_here_what_they_do_in_the_models_forward(family):
    model, ids = make_model(family), random_ids()
    plain = whole(model, ids)
    quantise_decoder(model, "cpu")
    inject_adapter_in_model(LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False), model)
    model.eval()
    expected, found = whole(model, ids), token_by_token(model, ids)
    assert (expected - plain).norm() > 0.1 * plain.norm()
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_rows_at_different_positions_are_told_apart(family):
    model, lengths = make_model(family), [60, 37, 2]
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (3, 61))
    alone = [whole(model, ids[row : row + 1, : length + 1])[0, length] for row, length in enumerate(lengths)]
    cache, decoder = SlotCache(model, 3, 70), Decoder(model)
    with torch.no_grad():
        for t in range(max(lengths) + 1):
            positions = torch.tensor([min(t, length) for length in lengths])
            cache.at_decode(positions, max(positions.tolist()))
            hidden = decoder(ids[torch.arange(3), positions], positions, cache)
    torch.testing.assert_close(hidden, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_a_mixture_of_experts_is_refused_with_the_reason():
    config = Qwen3MoeConfig(**SHAPE, num_experts=2, moe_intermediate_size=8, num_experts_per_tok=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="kit")
    said = "a qwen3_moe model, and its feed-forwards are mixtures of experts; .* pass one of gemma3_text"
    with pytest.raises(ValueError, match=said):
        generate(model, [[3, 4]], SamplingParams(max_new_tokens=2), num_slots=1, seed=0, eos_token_id=2)
