"""A merged model computes what base and adapters computed together."""

import json
import warnings

import pytest
import torch
from test_lora import KINDS, RANK, documents, logits_of, rms, train_with_peft
from transformers import AutoModelForCausalLM, AutoTokenizer

from kit import models
from kit.models.folder import save_model
from kit.models.merge import merge


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_a_merged_folder_computes_what_base_and_adapters_did(tmp_path, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns that the tied head and embedding separate: intended here
        folder = train_with_peft(tmp_path / "theirs", **settings)
        model, tokenizer = models.load(str(folder), device="cpu")
    expected = logits_of(model)
    merge(model, torch.float32)
    save_model(tmp_path / "merged", model, tokenizer)
    again, _ = models.load(str(tmp_path / "merged"), device="cpu")
    base, _ = models.load("tiny", device="cpu")
    change = rms(expected - logits_of(base))
    assert rms(logits_of(again) - expected) < 1e-4 * change
    apart = "lm_head" in str(settings) or "embed_tokens" in str(settings)
    stored = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert stored["tie_word_embeddings"] == (not apart)
    # and anybody reads it without peft
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        theirs = torch.cat([plain(document.ids.long()[None]).logits[0] for document in documents()])
    assert rms(theirs - expected) < 1e-4 * change
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template


def test_the_sum_is_rounded_once_to_the_dtype_asked_for(tmp_path):
    model, _ = models.load(str(train_with_peft(tmp_path / "theirs")), device="cpu")
    layer = model.model.layers[0].self_attn.q_proj
    a, b = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
    assert len(a) == RANK
    exact = layer.get_base_layer().weight.double() + layer.scaling["default"] * b @ a
    merge(model, torch.bfloat16)
    found = model.model.layers[0].self_attn.q_proj.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    apart = (found.double() - exact).abs() / exact.abs().clamp(min=1e-3)
    assert apart.max() <= 2**-8
    assert not hasattr(model, "peft_config")
