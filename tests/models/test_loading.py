import copy
import json
import os
import shutil

import pytest
import torch
from conftest import ALL_FAMILIES, make_model, random_documents
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from kit import models
from kit.data.toy import make_tokenizer
from kit.models import folder
from kit.models.backbone import head_weight, hidden_states, next_token_logits
from kit.models.joined import join
from kit.models.loading import load_config
from kit.models.shipped import TINY
from kit.packing import Document, PackedBatch
from kit.train.recompute import recompute_layers

LENGTHS = [9, 1, 23, 4]  # 23 tokens pass the window of 7 three times


def logits_of(model, documents):
    return next_token_logits(model, hidden_states(model, PackedBatch.build(documents)))


def with_transformers(model, documents, dtype):
    """Compute each document's logits alone, with transformers' eager attention and the weights in `dtype`."""
    # models share the config that they are built from, and with it the kind of attention
    config = copy.deepcopy(model.config)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    plain.load_state_dict(model.state_dict())
    return torch.cat([plain(document.ids.long()[None]).logits[0] for document in documents])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_logits_of_a_pack_are_the_logits_of_its_documents(family, checkpointing):
    documents = random_documents(LENGTHS)
    model = make_model(family)
    truth = with_transformers(model, documents, torch.float64)
    torchs = (with_transformers(model, documents, torch.float32) - truth).square().mean().sqrt()
    if checkpointing:
        recompute_layers(model)
        model.train()
    ours = (logits_of(model, documents) - truth).square().mean().sqrt()
    assert ours <= 2 * torchs
    # the bar is a rounding error: the two have the same weights
    assert 0 < torchs < 1e-4 * truth.square().mean().sqrt()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_perturbing_one_document_leaves_the_others_logits_and_gradients_bit_equal(tiny_model, checkpointing):
    if checkpointing:
        recompute_layers(tiny_model)
        tiny_model.train()
    seen = {}
    tiny_model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.update(embedded=output)
    )

    def run(documents):
        logits = logits_of(tiny_model, documents)
        (gradient,) = torch.autograd.grad(logits.square().sum(), seen["embedded"])
        return logits.detach(), gradient[0]

    documents = random_documents(LENGTHS)
    changed = [*documents[:2], random_documents([23], seed=1)[0], documents[3]]
    rows = torch.arange(sum(LENGTHS))
    others = (rows < 10) | (rows >= 33)
    for before, after in zip(run(documents), run(changed), strict=True):
        assert torch.equal(before[others], after[others])
        assert not torch.equal(before[~others], after[~others])


def test_a_model_loaded_for_packs_refuses_to_run_without_boundaries(tiny_model):
    with pytest.raises(ValueError, match=r"kit.models.hidden_states or kit.generate.sampler"):
        tiny_model(torch.tensor([[3, 4, 5]]))


def test_a_folder_is_loaded_as_it_was_saved(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    loaded, tokenizer = models.load(str(tmp_path), device="cpu")
    assert tokenizer.eos_token_id == 2
    assert loaded.dtype == torch.float32
    assert not loaded.training
    documents = random_documents(LENGTHS)
    assert torch.equal(logits_of(loaded, documents), logits_of(tiny_model, documents))


@pytest.mark.parametrize("family", ALL_FAMILIES)  # with a tied head and without
def test_a_model_is_saved_alike_whether_its_projections_are_joined_or_not(family, tmp_path):
    model = make_model(family)
    for name in ("apart", "joined"):
        folder.save_model(tmp_path / name, model, make_tokenizer())
        join(model, torch.device("cpu"))
    files = [tmp_path / name / "model.safetensors" for name in ("apart", "joined")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with safe_open(files[1], "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not model.config.tie_word_embeddings  # noqa: SIM118


def test_a_gguf_file_becomes_a_plain_model_that_can_be_trained_and_saved(tmp_path):
    path = os.environ.get("KIT_GGUF")
    if not path:
        pytest.skip(
            "real weights do not ship with the kit: set KIT_GGUF to a GGUF file of a Qwen2, Llama or Gemma 3 "
            "model"
        )
    model, tokenizer = models.load(path, device="cpu")
    ids = tokenizer("one two three four", add_special_tokens=False).input_ids
    document = Document(torch.tensor(ids, dtype=torch.int32), 1)
    hidden_states(model, PackedBatch.build([document])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.parameters())
    folder.save_model(tmp_path / "saved", model, tokenizer)
    again, _ = models.load(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(logits_of(again, [document]), logits_of(model, [document]))


def test_the_shipped_tiny_model_loads_by_name_and_ties_its_head():
    model, _ = models.load("tiny", device="cpu")
    assert head_weight(model) is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "nothing is there"),
        ("nowhere.gguf", "nothing is there"),
        ("runs/valley_demo/999", "nothing is there"),  # two slashes: no hub id
        ("no-such-owner/no-such-model", "neither a local folder nor a model the hub gave us"),
    ],
)
def test_a_model_that_is_not_there_says_what_to_pass(name, message):
    with pytest.raises(ValueError, match=message):
        models.load(name, device="cpu")


def test_a_model_that_the_hub_does_not_give_is_refused_in_one_line_that_names_the_shipped_ones():
    with pytest.raises(ValueError, match="the kit ships tiny and tinier") as refused:
        models.load("tyni", device="cpu")
    assert "\n" not in str(refused.value)


def test_a_runs_folder_is_refused_with_the_model_that_the_run_made(tmp_path):
    run = tmp_path / "my run"
    shutil.copytree(TINY, run / "model")
    (run / "config.json").write_text('{"model": "tiny", "instruction": ""}')
    for read in (models.load, models.load_without_weights, load_config):
        with pytest.raises(ValueError, match=f"^{run} is a run; pass .*: --model '{run}/model'$"):
            read(str(run))
        read(f"{run}/model")
    shutil.copytree(TINY, run, dirs_exist_ok=True)  # a model, whatever else lies in its folder
    load_config(str(run))


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # transformers fails, or makes an empty tokenizer
def test_a_folder_without_a_tokenizer_is_refused_in_one_line(family, tmp_path):
    make_model(family).save_pretrained(tmp_path)
    for tokenizer in (None, make_tokenizer()):  # then with a config of the tokenizer alone
        if tokenizer:
            tokenizer.save_pretrained(tmp_path)
            (tmp_path / "tokenizer.json").unlink()
        with pytest.raises(ValueError, match=r"holds no tokenizer \(tokenizer.json\); copy .* base model$"):
            models.load(str(tmp_path), device="cpu")
        with pytest.raises(ValueError, match="holds no tokenizer"):
            models.load_without_weights(str(tmp_path))


def test_attention_dropout_is_refused_not_ignored():
    model = make_model("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.train()
    with pytest.raises(ValueError, match=r"attention dropout is 0.1"):
        logits_of(model, random_documents([3]))


def test_without_weights_a_model_has_its_vocabulary_and_the_ends_that_its_files_name(tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    model, tokenizer = models.load_without_weights(str(tmp_path))
    assert model.get_input_embeddings().weight.is_meta and tokenizer.eos_token_id == 2
    assert (len(model.get_input_embeddings().weight), model.generation_config.eos_token_id) == (67, 2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert models.load_without_weights(str(tmp_path))[0].generation_config.eos_token_id == [2, 5]
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    model, tokenizer = models.load_without_weights(str(adapters))
    assert model.generation_config.eos_token_id == [2, 5] and tokenizer.eos_token_id == 2
