"""LoRA on weights as they are: peft's gradients, the same bits after a resume, a merge, a plan in bytes."""

import contextlib
import json

import ask
import gemma3_1b_8k
import grpo_qwen2_5_0_5b
import pytest
import torch
from conftest import FAMILIES, random_documents
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from test_qlora import adapter_tensors, logits_of, make_base, make_qlora, rms, save, take_steps
from test_simulate import SMALL, load_small, real_batch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from kit import models
from kit.config import parse
from kit.memory import live_bytes
from kit.memory.flops import Sizes
from kit.memory.hours import training_speed
from kit.memory.simulate import fake_batch, measure, plan
from kit.models import qlora
from kit.models.backbone import hidden_states
from kit.models.folder import adapter_ranks, base_kind
from kit.models.loading import load_config
from kit.models.merge import merge
from kit.models.nf4 import NF4Linear
from kit.packing import PackedBatch
from kit.train import checkpoint
from kit.train.savings import Savings
from kit.train.step import TrainingStep

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS = [9, 1, 23, 4]


def make_lora(family="llama", dtype=torch.float32, *, rank=3, alpha=5, base="", seed=0):
    model = make_base(family, dtype)
    qlora.add_adapters(model, base=base, rank=rank, alpha=alpha, seed=seed, nf4=False)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_pefts_own_model(family):
    """Truth: peft on transformers' own layers in float64, each document alone."""
    model = make_lora(family)
    take_steps(model, 3)  # B is no longer zero
    stored = adapter_tensors(model)
    assert len(stored) == 2 * len(PROJECTIONS) * model.config.num_hidden_layers
    documents = random_documents(LENGTHS)
    d_hidden = torch.randn(sum(LENGTHS), model.config.hidden_size, generator=torch.Generator().manual_seed(0))

    def theirs(dtype):
        config = LoraConfig(r=3, lora_alpha=5, target_modules=PROJECTIONS)
        adapted = get_peft_model(make_base(family), config).to(dtype).eval()
        inner = adapted.get_base_model()
        inner.set_attn_implementation("eager")
        named = {name: tensor for name, tensor in inner.named_parameters() if "lora_" in name}
        assert named.keys() == stored.keys()
        with torch.no_grad():
            for name, tensor in named.items():
                tensor.copy_(stored[name])
        hidden = torch.cat(
            [inner.model(document.ids.long()[None]).last_hidden_state[0] for document in documents]
        )
        return torch.autograd.grad(hidden, [named[name] for name in stored], d_hidden.to(dtype))

    hidden = hidden_states(model.eval(), PackedBatch.build(documents))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == stored.keys()
    ours = torch.autograd.grad(hidden, list(trained.values()), d_hidden)
    truth, torchs = theirs(torch.float64), theirs(torch.float32)
    error, bar = (
        rms(torch.cat([(a - b).flatten() for a, b in zip(x, truth, strict=True)])) for x in (ours, torchs)
    )
    assert bar > 0 and error <= 2 * bar


def test_adapters_are_those_of_qlora_and_what_they_are_on_is_not_rounded():
    plain, nf4 = make_lora("qwen2"), make_qlora("qwen2")
    for name, tensor in adapter_tensors(nf4).items():
        assert torch.equal(adapter_tensors(plain)[name], tensor), name
    assert torch.equal(logits_of(plain), logits_of(make_base("qwen2")))
    assert not torch.equal(logits_of(nf4), logits_of(plain))
    assert type(plain.get_output_embeddings()) is nn.Linear


def test_only_adapters_change_in_the_dtype_of_the_weights():
    model = make_lora("gemma3", torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = take_steps(model, 5)
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("lora_" not in name), name
        assert tensor.dtype == torch.bfloat16


def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path):
    def run_of(model):
        return TrainingStep(model, Savings(), lr=3e-2, max_grad_norm=1.0)

    unbroken, broken = make_lora(), make_lora()
    take_steps(unbroken, 5, training_step=run_of(unbroken))
    first = run_of(broken)
    take_steps(broken, 2, training_step=first)
    _, tokenizer = models.load("tiny", device="cpu")
    checkpoint.save(tmp_path, broken, tokenizer, first.optimizer, 2, "a run")
    again = make_lora()
    step = run_of(again)
    assert checkpoint.resume(tmp_path, again, step.optimizer, run="a run", num_steps=5) == 2
    take_steps(again, 3, training_step=step)
    for name, tensor in adapter_tensors(unbroken).items():
        assert torch.equal(adapter_tensors(again)[name], tensor), name


def test_a_folder_records_its_base_is_trained_further_and_merges(tmp_path):
    save(tmp_path / "base", make_base("llama"))
    model, tokenizer = models.load_to_train(str(tmp_path / "base"), lora_rank=3, device="cpu")
    losses = take_steps(model, 3)
    folder = tmp_path / "adapters"
    models.folder.save_model(folder, model, tokenizer)
    assert base_kind(folder) == "plain" and adapter_ranks(str(folder)) == {"qlora_rank": 0, "lora_rank": 3}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118

    loaded, _ = models.load(str(folder), device="cpu")
    expected = logits_of(model)
    assert torch.equal(logits_of(loaded), expected)
    assert not any(isinstance(module, NF4Linear) for module in loaded.modules())
    further, _ = models.load_to_train(str(folder), device="cpu")
    assert take_steps(further, 1)[0] < losses[0]
    with qlora.without_adapters(loaded):
        base = logits_of(loaded)
    assert torch.equal(base, logits_of(make_base("llama")))

    merge(loaded, torch.float32)
    models.folder.save_model(tmp_path / "merged", loaded, tokenizer)
    merged, _ = models.load(str(tmp_path / "merged"), device="cpu")
    assert rms(logits_of(merged) - expected) < 1e-5 * rms(expected - base)


def test_both_kinds_at_once_are_refused_and_todays_flag_stays_valid():
    config = parse(gemma3_1b_8k.Config, ["--lora_rank", "8"], smoke=gemma3_1b_8k.SMOKE)
    assert config.ranks == {"qlora_rank": 0, "lora_rank": 8}
    assert parse(gemma3_1b_8k.Config, ["--qlora_rank", "8"]).ranks == {"qlora_rank": 8, "lora_rank": 0}
    with pytest.raises(
        ValueError, match=r"qlora_rank is 4 and lora_rank 8, .* pass --qlora_rank .* or --lora"
    ):
        parse(gemma3_1b_8k.Config, ["--lora_rank", "8", "--qlora_rank", "4"])
    with pytest.raises(ValueError, match="qlora_rank is 4 and lora_rank 8; pass one"):
        models.load_to_train("tiny", qlora_rank=4, lora_rank=8, device="cpu")


MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
LEAN = Savings(optimizer="adamw8bit", tile_tokens=512)


@pytest.mark.slow
def test_the_plan_holds_the_weights_in_16_bits_and_the_rest_as_for_qlora(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL, "vocab_size": 3_000}))
    model, sizes = str(tmp_path), Sizes.of(load_config(str(tmp_path)))
    ranks = {"lora_rank": 4}, {"qlora_rank": 4}
    found, nf4 = (plan(model, row_tokens=1024, savings=LEAN, **rank) for rank in ranks)
    weights = 2 * (sizes.weights + sizes.adapters(4))
    assert found.owners[live_bytes.WEIGHTS] == pytest.approx(weights, rel=0.01)
    assert found.owners[live_bytes.OPTIMIZER] == nf4.owners[live_bytes.OPTIMIZER]
    saved = (2 - 4.127 / 8) * sizes.linears
    assert found.owners[live_bytes.WEIGHTS] - nf4.owners[live_bytes.WEIGHTS] == pytest.approx(saved, rel=0.03)
    assert "LoRA of rank 4 in 16 bits, 1,024 tokens" in str(found)


@pytest.mark.slow
def test_a_planned_step_holds_the_bytes_of_a_real_one():
    peaks = []
    for fake in (True, False):
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
            model = AutoModelForCausalLM.from_config(
                load_small("llama"), attn_implementation="kit", dtype=torch.float32
            )
            qlora.add_adapters(model, base="", rank=4, nf4=False)
            batch = fake_batch(300) if fake else real_batch(300)
            peaks.append(measure(model, Savings(tile_tokens=100), batch, rows=2).peak)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


def test_no_speed_that_was_measured_with_qlora_is_taken_for_lora(tmp_path, monkeypatch):
    row = {"qlora_rank": 16, "savings": {}, "tokens_per_second": 1.0}
    monkeypatch.setattr("kit.memory.hours._measured", lambda *_: [(tmp_path, row)])
    monkeypatch.setattr("kit.memory.hours.Speed.measured", lambda *_: "measured")
    found = [training_speed(MODEL, LEAN, 16, 1024, nf4=nf4, card="3060") for nf4 in (True, False)]
    assert found[0] == "measured" and found[1] != "measured"


@pytest.mark.parametrize("kind", ["qlora_rank", "lora_rank"])
def test_recipes_that_take_a_folder_of_adapters_know_which_they_are(kind, tmp_path):
    model, tokenizer = models.load_to_train("tiny", device="cpu", **{kind: 4})
    models.folder.save_model(tmp_path, model, tokenizer)
    assert adapter_ranks(str(tmp_path))[kind] == 4
    small, large = (ask.needed(name, 64, on_card=True) for name in (str(tmp_path), "tiny"))
    assert 0 < small <= large * (1 if kind == "qlora_rank" else 1.5)
    config = grpo_qwen2_5_0_5b.Config(model=str(tmp_path), device="cpu", kl_coef=0.01)
    with pytest.raises(
        ValueError, match=r"kl_coef is 0\.01 but .* trained already: .* pass --kl_coef 0, or start"
    ):
        grpo_qwen2_5_0_5b.main(config)
