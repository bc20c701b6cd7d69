"""Families that transformers computes, with the kit's attention: against transformers alone."""

import json
from dataclasses import dataclass

import pytest
import torch
from conftest import SHAPE, random_documents
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from kit import models
from kit.generate.decode import make_decoder
from kit.generate.kv_cache import SlotCache
from kit.generate.sampler import generate
from kit.generate.sampling import SamplingParams
from kit.kernels.packed_attention import packed_attention
from kit.memory.settings import PlanSettings
from kit.memory.simulate import fake_model
from kit.models import attention, other_families
from kit.models.backbone import hidden_states, next_token_logits
from kit.models.families import OTHER, family_of
from kit.models.other_families import check
from kit.models.qlora import add_adapters
from kit.packing import Document, PackedBatch
from kit.train.recompute import recompute_layers
from kit.train.savings import Savings

LENGTHS = [9, 1, 23, 4]
T = 19  # positions, more than twice the windows
TURNING = {"rope_type": "default", "rope_theta": 500.0}
MIXED = ["sliding_attention", "full_attention"] * 2
FAMILIES = {
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
    "mistral": {"sliding_window": 7},
    "phi3": {"sliding_window": 7, "rope_parameters": TURNING | {"partial_rotary_factor": 0.5}},
    "olmo2": {},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "cohere2": {"logit_scale": 0.2, "sliding_window": 7, "layer_types": MIXED},
    "exaone4": {"sliding_window": 7, "layer_types": MIXED},
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
LATENT |= {"v_head_dim": 16, "num_key_value_heads": 4}
WRONG = {  # a family -> what is wrong with it
    "stablelm": ({}, "stablelm model, which cannot be run in packs: no boundaries of documents reach"),
    "diffllama": ({}, "diffllama model, whose attention or logits are .* away from transformers'"),
    "hyperclovax": ({"logits_scaling": 0.5}, "whose attention or logits are .* away from transformers'"),
    "youtu": (
        LATENT,
        r"keys and values of a token are \(4, 16\) and \(4, 16\), and its config says \(4, 8\)",
    ),
}


@pytest.fixture(autouse=True)
def nothing_was_announced():
    other_families._announce.cache_clear()


def make_model(kind, **settings):
    """A float64 model without default values that would hide a mistake. It stands in for a loaded one."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE | FAMILIES.get(kind, {}) | settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="kit").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.dim() > 1 else 0.5))
    return model


def whole(model, ids):
    """Compute logits (rows, T, V) with transformers alone."""
    model.set_attn_implementation("eager")
    logits = model(input_ids=ids).logits
    model.set_attn_implementation("kit")
    return logits


def gradients_of(model, logits):
    model.zero_grad()
    logits.pow(3).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
@pytest.mark.parametrize("recomputed", ["", "on the device", "in CPU memory"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_pack_gets_what_transformers_computes_for_each_document(kind, recomputed, adapters):
    model, documents = make_model(kind), random_documents(LENGTHS)
    if adapters:
        add_adapters(model, base="", rank=3, nf4=False)
    truth = torch.cat([whole(model, document.ids.long()[None])[0] for document in documents])
    expected = gradients_of(model, truth)
    if recomputed:
        recompute_layers(model.train(), offload=recomputed == "in CPU memory")
    found = next_token_logits(model, hidden_states(model, PackedBatch.build(documents)))
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)  # their norms compute in fp32
    gradients = gradients_of(model, found)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("kind", FAMILIES)
def test_token_by_token_it_is_the_models_own_forward(kind):
    model = make_model(kind)
    ids = torch.randint(3, 97, (3, T), generator=torch.Generator().manual_seed(1))
    cache, decoder, logits = SlotCache(model, len(ids), T), make_decoder(model), []
    with torch.no_grad():
        for t in range(T):
            positions = torch.full((len(ids),), t)
            cache.at_decode(positions, t)
            logits.append(next_token_logits(model, decoder(ids[:, t], positions, cache)))
        torch.testing.assert_close(torch.stack(logits, dim=1), whole(model, ids), rtol=1e-5, atol=1e-6)


class Questions(TorchDispatchMode):
    """Count the values that the host asks for at once: on a card it waits for them."""

    asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.asked += func._schema.name in ("aten::is_nonzero", "aten::_local_scalar_dense", "aten::nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", FAMILIES)
def test_neither_a_pack_nor_a_token_makes_the_host_wait_for_the_device(kind):
    model, batch = make_model(kind), PackedBatch.build(random_documents(LENGTHS))
    cache, decoder, positions = SlotCache(model, 2, T), make_decoder(model), torch.tensor([0, 3])
    cache.at_decode(positions, 3)
    with torch.no_grad(), Questions() as questions:
        hidden_states(model, batch)
        decoder(torch.tensor([5, 6]), positions, cache)
    assert questions.asked == 0


@pytest.mark.parametrize("kind", FAMILIES)
def test_sampled_tokens_are_those_of_transformers_generate(kind):
    model, prompts = make_model(kind), [[5, 9, 33, 7, 21, 60, 2, 44, 8], [11]]
    how = {"num_slots": 2, "seed": 0, "eos_token_id": 96}
    found = generate(model, prompts, SamplingParams(temperature=0.0, max_new_tokens=12), **how)
    model.set_attn_implementation("eager")
    for prompt, completion in zip(prompts, found, strict=True):
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 96, "pad_token_id": 0}
        assert completion.ids == model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", FAMILIES)
def test_loading_says_once_who_computes_the_layers(kind, tmp_path):
    save(make_model(kind), tmp_path)
    with pytest.warns(UserWarning, match=f"transformers computes the layers of a {kind} model") as said:
        model, _ = models.load(str(tmp_path), device="cpu")
        models.load(str(tmp_path), device="cpu")  # as a recipe does, to measure what it has trained
        fake_model(model.config, 0)
    assert len(said) == 1 and family_of(model.config) is OTHER


def save(model, folder):
    model.float().save_pretrained(folder)
    for file in models.loading.path_of("tiny").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize("kind", WRONG)
def test_a_family_that_computes_something_else_is_refused_when_it_is_loaded(kind, tmp_path):
    settings, said = WRONG[kind]
    save(make_model(kind, **settings), tmp_path)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=said):
        models.load(str(tmp_path), device="cpu")


@pytest.mark.parametrize("reached", [{"cu_seqlens"}, {"cache"}], ids=["pack", "token step"])
def test_a_model_is_checked_both_as_it_is_trained_and_as_it_is_sampled_from(reached, monkeypatch):
    model = make_model("olmo2")

    def forward(self, *args, **kwargs):
        if {name for name in ("cu_seqlens", "cache") if kwargs.get(name) is not None} == reached:
            kwargs["position_ids"] = kwargs["position_ids"] * 2
        return run(*args, **kwargs)

    run = model.model.forward
    monkeypatch.setattr(type(model.model), "forward", forward)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"attention or logits are .* away from"):
        check(model, "it")


def test_rounding_that_grows_with_depth_is_not_taken_for_another_computation():
    model, ids = make_model("mistral", num_hidden_layers=30, sliding_window=None), torch.arange(3, 19)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)  # a small difference grows in every layer
        model.bfloat16()
        truth = whole(model, ids[None])[0]
        logits = next_token_logits(model, hidden_states(model, PackedBatch.build([Document(ids, 1)])))
    assert (logits - truth).norm() > torch.finfo(torch.bfloat16).eps ** 0.5 * truth.norm()
    with pytest.warns(UserWarning):
        check(model, "it")


@pytest.mark.parametrize("dropout", ["attention_dropout", "residual_dropout", "embedding_dropout"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_model_with_dropout_is_refused_when_it_is_loaded_to_be_trained(dropout, rank, tmp_path):
    none = {"attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0}
    save(make_model("starcoder2", **none | {dropout: 0.1}), tmp_path)
    with pytest.warns(UserWarning):
        models.load(str(tmp_path), device="cpu")  # which can be measured
    with pytest.raises(ValueError, match=f"says {dropout} 0.1, but the kit trains without dropout"):
        models.load_to_train(str(tmp_path), device="cpu", lora_rank=rank)


@dataclass(frozen=True)
class Chosen(PlanSettings, Savings):
    """Settings of a recipe: those that are not in `typed` come from a preset."""


def test_typed_tiles_are_refused_before_anything_is_loaded_and_a_presets_are_left_out(tmp_path, capsys):
    make_model("olmo2").config.save_pretrained(tmp_path)
    other, eight = str(tmp_path), Savings(tile_tokens=8)
    assert Savings().for_layers_of(other) == Savings() and eight.for_layers_of("tiny") is eight
    for typed in (eight, Chosen(tile_tokens=8, typed=("tile_tokens",))):
        with pytest.raises(
            ValueError, match="tile_tokens is 8 but transformers computes the layers of a olmo2"
        ):
            typed.for_layers_of(other)
    assert Chosen(tile_tokens=8).for_layers_of(other) == Chosen()
    assert "tiles       none: transformers computes the layers of a olmo2 model" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_in_every_dtype_rounding_passes_the_check_and_sharper_attention_does_not(kind, dtype, monkeypatch):
    model = make_model(kind).to(dtype)
    with pytest.warns(UserWarning):
        check(model, "it")

    def sharper(*args, scale, **kwargs):
        return packed_attention(*args, scale=1.5 * scale, **kwargs)

    monkeypatch.setitem(attention.BY_NAME, "kit", sharper)
    with pytest.raises(ValueError, match=r"attention or logits are .* away from"):
        check(model, "it")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("phi", "its head has a bias"),
        ("lfm2", "it has no model.norm"),
        ("gemma", "its embedding is a GemmaTextScaledWordEmbedding"),
    ],
)
def test_a_model_with_an_odd_part_is_refused_by_its_plan_and_when_it_is_loaded(kind, why):
    model = make_model(kind)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=f"it is a {kind} model, and {why}; pass"):
        check(model, "it")
    with pytest.raises(ValueError, match=f"the model is a {kind} model, and {why}; pass"):
        fake_model(model.config, 0)


REFUSED = {
    "gpt2": ({}, "its config has no single num_key_value_heads"),
    "gemma2": ({}, "its attention caps scores by a tanh"),
    "gemma3": ({}, r"it reads images or sound, too; .* one of .*google/gemma-3-1b-it\)"),
    "qwen3_moe": ({}, "its feed-forwards are mixtures of experts"),
    "qwen3_5_text": ({}, "some of its layers are linear_attention"),
    "llama4_text": ({}, "its feed-forwards are mixtures of experts"),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 16}, "some of its layers are conv"),
    "arcee": (
        {"rope_parameters": TURNING | {"rope_type": "dynamic", "factor": 2.0}},
        "its rotation, dynamic",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_config_shows_to_be_out_of_reach_is_refused_before_anything_is_loaded(kind, tmp_path):
    settings, said = REFUSED[kind]
    (tmp_path / "config.json").write_text(
        json.dumps(AutoConfig.for_model(kind, **settings).to_dict(), default=str)
    )
    with pytest.raises(ValueError, match=f"is a {kind} model, and {said}"):
        models.load(str(tmp_path), device="cpu")


def test_an_attention_that_would_let_documents_see_each_other_is_refused():
    model, batch = make_model("olmo2"), PackedBatch.build(random_documents([3, 2]))
    model.set_attn_implementation("sdpa")
    with pytest.raises(
        ValueError, match=r"the model's attention is sdpa, .* see each other; .*kit.models.load"
    ):
        hidden_states(model, batch)


def test_tiles_are_refused_where_layers_are_transformers():
    with pytest.raises(ValueError, match="tile_tokens is 8 but transformers computes a Olmo2DecoderLayer"):
        recompute_layers(make_model("olmo2"), tile_tokens=8)


def test_what_an_attention_cannot_compute_is_refused_by_name():
    model, ids = make_model("olmo2"), torch.tensor([[3, 4]])
    with pytest.raises(ValueError, match="Olmo2Attention asks its attention for softcap, which"):
        model.model(input_ids=ids, use_cache=False, softcap=50.0)
    layer, angles = model.model.layers[0], model.model.rotary_emb(torch.zeros(1, 2, 32), ids)
    x, mask = torch.zeros(1, 2, 32).double(), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="Olmo2Attention asks its attention for attention_mask, which"):
        layer(x, attention_mask=mask, position_embeddings=angles)
    model.config.sliding_window = 3  # which its layers do not have
    cache = SlotCache(model, 1, 8)
    cache.at_prefill([0], [0], [2])
    with pytest.raises(ValueError, match="layer 0 attends to None positions and its config says 3"):
        next_token_logits(model, hidden_states(model, PackedBatch.build(random_documents([2])), cache=cache))
