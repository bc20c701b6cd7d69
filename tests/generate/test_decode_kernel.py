"""The sampler with the kernels of a card, in Triton's interpreter: the tokens are those of the CPU's path.

A child process is needed because TRITON_INTERPRET is read at import.
"""

import pytest
import torch
from children import pass_in_the_interpreter
from conftest import SHAPE, make_model
from transformers import AutoModelForCausalLM, LlamaConfig

import kit.kernels.decode_attention as kernels
from kit.generate import kv_cache
from kit.generate.kv_cache import SlotCache
from kit.generate.sampler import generate
from kit.generate.sampling import SamplingParams
from kit.kernels.backend import INTERPRET

PARAMS = SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=7)


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of the kernels. Rows are cut into splits of 16 keys here."""
    counted, attention = [], kv_cache.decode_attention
    monkeypatch.setattr(kernels, "MIN_SPLIT", 16)

    def count(*inputs, **scale):
        counted.append(1)
        return attention(*inputs, **scale)

    monkeypatch.setattr(kv_cache, "decode_attention", count)
    return counted


def two_layers(model):
    """Drop all layers but the first two, which are of both kinds: the interpreter is slow."""
    model.model.layers, config = model.model.layers[:2], model.config
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    return model


def sampled(model, lengths=(5, 19, 2)):
    """Sample from prompts of these lengths in two slots: one is refilled, and rows move at the end."""
    torch.manual_seed(5)
    prompts = [torch.randint(3, 97, (length,)).tolist() for length in lengths]
    return generate(model, prompts, PARAMS, num_slots=2, seed=0, eos_token_id=range(2, 12))


@pytest.mark.interpreter
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_tokens_are_those_of_the_cpus_path_and_need_neither_lengths_on_the_host_nor_clean_memory(
    family, calls, monkeypatch
):
    model = two_layers(make_model(family))
    with monkeypatch.context() as patch:
        at_decode = SlotCache.at_decode
        patch.setattr(SlotCache, "at_decode", lambda cache, positions, _: at_decode(cache, positions, None))
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN
        by_kernel = sampled(model)
        torch.use_deterministic_algorithms(False)
    layer_steps = len(calls)
    assert layer_steps and layer_steps % 2 == 0

    monkeypatch.setattr(kv_cache, "runs_kernel", lambda like: False)
    in_groups = sampled(model)
    assert len(calls) == layer_steps
    assert [completion.ids for completion in by_kernel] == [completion.ids for completion in in_groups]
    for ours, theirs in zip(by_kernel, in_groups, strict=True):
        torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs))


@pytest.mark.interpreter
def test_a_model_that_the_kernels_do_not_take_is_named_and_sampled_without_them(calls, monkeypatch):
    shape = {"hidden_size": 68, "num_attention_heads": 34, "num_key_value_heads": 1, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | shape), attn_implementation="kit").eval()
    with pytest.warns(UserWarning, match="torch's attention.*34 query heads share"):
        found = sampled(model, [3, 5])
    monkeypatch.setattr(kv_cache, "runs_kernel", lambda like: False)
    assert found == sampled(model, [3, 5]) and not calls


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is the child")
def test_the_sampler_passes_the_same_tests_in_the_interpreter(record_property):
    pass_in_the_interpreter(__file__, record_property)
