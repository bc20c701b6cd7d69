"""Adapters that peft alone trained and saved: the kit computes what peft does, or refuses them."""

import json
import os
import warnings

import pytest
import torch
from conftest import random_documents
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kit import models
from kit.generate.sampler import generate
from kit.generate.sampling import SamplingParams
from kit.models.backbone import hidden_states, next_token_logits
from kit.models.shipped import TINY
from kit.packing import PackedBatch

LENGTHS = [9, 1, 23, 4]
RANK, ALPHA = 3, 7  # the scaling 7/3 is no power of two


def plain_base(dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(TINY, attn_implementation="eager", dtype=dtype)


def documents():
    return random_documents(LENGTHS, vocab_size=plain_base().config.vocab_size)


def train_with_peft(folder, *, base=str(TINY), config=None, steps=2, **settings):
    """Write a folder with peft after a few large steps, so that A and B are far from zero."""
    model = plain_base()
    torch.manual_seed(0)
    settings = {
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.5,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
    } | settings
    adapted = get_peft_model(model, config or LoraConfig(**settings, task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=3.0)
    ids = documents()[2].ids.long()[None]
    for _ in range(steps):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for each in adapted.peft_config.values():
        each.base_model_name_or_path = base
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


@torch.no_grad()
def with_peft(folder, dtype):
    """Compute each document's logits on its own with peft's model in `dtype`."""
    adapted = PeftModel.from_pretrained(plain_base(), str(folder)).to(dtype).eval()
    return torch.cat([adapted(document.ids.long()[None]).logits[0] for document in documents()])


@torch.no_grad()
def logits_of(model):
    return next_token_logits(model, hidden_states(model, PackedBatch.build(documents())))


def rms(x):
    return x.double().square().mean().sqrt()


KINDS = [  # of adapters, as peft is asked for them
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"target_modules": "all-linear", "rank_pattern": {"up_proj": 5}},
    {"modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_logits_are_pefts_own(tmp_path, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns that the tied head and embedding separate: intended here
        folder = train_with_peft(tmp_path / "theirs", **settings)
        truth, torchs = with_peft(folder, torch.float64), with_peft(folder, torch.float32)
        model, _ = models.load(str(folder), device="cpu")
    base, _ = models.load("tiny", device="cpu")
    assert rms(logits_of(model) - truth) <= 2 * rms(torchs - truth) < 1e-4 * rms(truth)
    assert rms(logits_of(base) - truth) > 0.1 * rms(truth)  # the adapters are what is tested


def test_loading_draws_nothing_from_the_global_generator(tmp_path):
    folder = train_with_peft(tmp_path / "theirs")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    models.load(str(folder), device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_and_refusing_warn_of_nothing_that_a_user_could_mend(tmp_path):
    folder = train_with_peft(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.load(str(folder), device="cpu")
        change_tensors(lambda tensors, name: tensors.pop(name))(folder)
        with pytest.raises(ValueError, match="the file lacks"):
            models.load(str(folder), device="cpu")


def test_the_base_keeps_the_dtype_that_was_asked_for_and_the_adapters_peft_gives_them(tmp_path):
    folder = train_with_peft(tmp_path / "theirs")
    model, _ = models.load(str(folder), device="cpu", dtype=torch.bfloat16)
    theirs = PeftModel.from_pretrained(plain_base(torch.bfloat16), str(folder)).get_base_model()
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        name: tensor.dtype for name, tensor in theirs.state_dict().items()
    }
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_the_sampler_draws_from_adapted_layers(tmp_path):
    """Greedy, against peft's logits position by position."""
    folder = train_with_peft(tmp_path / "theirs")
    model, _ = models.load(str(folder), device="cpu")
    prompt = documents()[0].ids.tolist()
    params = SamplingParams(temperature=0, max_new_tokens=12)
    (response,) = generate(model, [prompt], params, num_slots=1, seed=0, eos_token_id=())
    adapted = PeftModel.from_pretrained(plain_base(), str(folder)).eval()
    ids = torch.tensor([prompt + response.ids])
    with torch.no_grad():
        logits = adapted(ids).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == response.ids


def test_a_tokenizer_beside_the_adapters_is_the_one_that_counts(tmp_path):
    folder = train_with_peft(tmp_path / "theirs")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert models.load(str(folder), device="cpu")[1].chat_template == tokenizer.chat_template
    tokenizer.chat_template = "{{ messages[0].content }}!"
    tokenizer.save_pretrained(folder)
    assert models.load(str(folder), device="cpu")[1].chat_template == "{{ messages[0].content }}!"


def test_a_base_is_found_from_the_working_directory_as_peft_finds_it(tmp_path, monkeypatch):
    os.symlink(TINY, tmp_path / "base")
    folder = train_with_peft(tmp_path / "theirs", base="base")
    monkeypatch.chdir(tmp_path)
    models.load("./theirs", device="cpu")
    monkeypatch.chdir("/")
    with pytest.raises(
        ValueError, match=r"theirs holds adapters of base, which cannot be loaded; write where the base is"
    ):
        models.load(str(folder), device="cpu")


def change_config(**fields):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def pickle_weights(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def change_tensors(change):
    def rewrite(folder):
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors, next(iter(tensors)))
        save_file(tensors, file)

    return rewrite


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pickle_weights, r"a pickle, which can run any code.*load them with peft and write them again"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "holds no weights"),
        (change_config(base_model_name_or_path=None), "name no base; write the hub id or the folder"),
        (
            change_config(base_model_name_or_path="/no/such/base"),
            "/no/such/base, which cannot be loaded; write where the base is",
        ),
        (change_config(base_model_name_or_path="no-such/base"), "of no-such/base, which cannot be loaded"),
        (
            change_config(revision="v2", base_model_name_or_path="a/b"),
            "hf download a/b --revision v2 --local-dir DIR",
        ),
        (change_config(init_lora_weights="pissa"), "init_lora_weights 'pissa', which is more than LoRA"),
        (change_config(layer_replication=[[0, 2], [1, 3]]), "layer_replication"),
        (change_config(target_modules=["c_attn"]), "do not fit"),
        (change_config(r=RANK + 1), "do not fit"),
        (change_tensors(lambda tensors, name: tensors.pop(name)), "the file lacks"),
        (change_tensors(lambda tensors, name: tensors.update(other=torch.zeros(2))), r"\['other'\] besides"),
    ],
)
def test_what_would_be_another_model_is_refused_with_the_next_step(tmp_path, change, message):
    folder = train_with_peft(tmp_path / "theirs")
    change(folder)
    with pytest.raises(ValueError, match=message):
        models.load(str(folder), device="cpu")


def test_adapters_of_adapters_are_refused(tmp_path):
    first = train_with_peft(tmp_path / "first")
    second = train_with_peft(tmp_path / "second", base=str(first))
    with pytest.raises(ValueError, match="is adapters itself; merge those first"):
        models.load(str(second), device="cpu")


def test_adapters_of_the_head_are_refused_since_the_sampler_reads_its_weight(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tied embedding, as above
        folder = train_with_peft(tmp_path / "theirs", target_modules=["q_proj", "lm_head"])
        with pytest.raises(ValueError, match=r"adapters of the head.*merge_and_unload"):
            models.load(str(folder), device="cpu")


def test_other_kinds_of_adapters_are_refused_by_name(tmp_path):
    config = IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    folder = train_with_peft(tmp_path / "theirs", config=config)
    with pytest.raises(ValueError, match="IA3 adapters but the kit knows LoRA"):
        models.load(str(folder), device="cpu")


def test_training_on_them_is_refused(tmp_path):
    folder = train_with_peft(tmp_path / "theirs")
    with pytest.raises(ValueError, match="can be evaluated but not trained further"):
        models.load_to_train(str(folder), device="cpu")
