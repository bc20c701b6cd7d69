import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from children import ROOT, call, train_unbroken_and_killed
from conftest import ALL_FAMILIES, FAMILIES, make_model, random_documents
from peft import PeftModel
from safetensors.torch import load_file
from test_nf4 import allocated, held_tensors
from test_train_loop import LENGTHS, Config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from kit import models
from kit.data.chat import PLAIN_TEMPLATE, ChatFormat
from kit.data.toy import make_tokenizer
from kit.generate.sampler import generate
from kit.generate.sampling import SamplingParams
from kit.memory.live_bytes import LiveBytes
from kit.models import qlora
from kit.models.backbone import head_weight, hidden_states, next_token_logits
from kit.models.folder import load_weights, save_model
from kit.models.merge import merge
from kit.models.nf4 import NF4Linear, quantise_decoder, simulate_quantised_decoder
from kit.packing import Document, PackedBatch
from kit.run import RunFolder
from kit.train import checkpoint
from kit.train.loop import TrainingPlan, train
from kit.train.savings import Savings
from kit.train.step import TrainingStep


def make_base(family, dtype=torch.float32):
    """conftest's model, with biases that are not zero."""
    model = make_model(family, dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.uniform_(parameter, -1, 1, generator=torch.Generator().manual_seed(0))
    return model


def make_qlora(family="llama", dtype=torch.float32, *, rank=3, alpha=5, base="", seed=0):
    model = make_base(family, dtype)
    quantise_decoder(model, "cpu")
    qlora.add_adapters(model, base=base, rank=rank, alpha=alpha, seed=seed)
    return model


def take_steps(model, steps, *, lr=3e-2, recompute=False, training_step=None):
    """Take optimizer steps over two packs, and return the losses."""
    training_step = training_step or TrainingStep(
        model, Savings(recompute=recompute), lr=lr, max_grad_norm=1.0
    )
    documents = random_documents(LENGTHS)
    batches = [PackedBatch.build(documents[:4]), PackedBatch.build(documents[4:])]
    model.train()
    return [training_step(batches)[0].item() for _ in range(steps)]


def logits_of(model):
    batch = PackedBatch.build(random_documents(LENGTHS))
    with torch.no_grad():
        return next_token_logits(model.eval(), hidden_states(model, batch))


def adapter_tensors(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if "lora_" in name}


def rms(x) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls_and_only_adapters_change(family, dtype, checkpointing):
    model = make_qlora(family, dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = take_steps(model, 25, recompute=checkpointing)
    assert losses[-1] < 0.8 * losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("lora_" not in name), name
        assert tensor.dtype == before[name].dtype
    gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert gradients == {name for name in before if "lora_" in name}  # the head's weight got none
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_linear_layer_of_the_decoder_has_an_adapter_of_the_rank_asked_for(family):
    c, rank = ALL_FAMILIES[family], 3
    hidden, inner = c.hidden_size, c.intermediate_size
    D = getattr(c, "head_dim", None) or hidden // c.num_attention_heads
    q, kv = c.num_attention_heads * D, c.num_key_value_heads * D
    attention = [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden)]
    shapes = [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]
    formula = c.num_hidden_layers * sum(rank * (into + out) for into, out in shapes)
    model = make_qlora(family, rank=rank)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == formula
    assert type(model.get_output_embeddings()) is nn.Linear
    assert isinstance(model, type(make_model(family)))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_gradients_of_the_adapters_are_those_of_a_dense_model_with_the_same_weights(family):
    """Truth: float64, every layer written out as W x + (alpha / rank) B A x."""
    model = make_qlora(family, rank=3, alpha=5)
    take_steps(model, 3)  # B is no longer zero
    plain, tensors = dense_twin(model, torch.float64)
    batch = PackedBatch.build(random_documents(LENGTHS))
    # not the sum of squares, which the last norm keeps nearly constant: its gradient would be mostly rounding
    # error
    shape = (len(batch.input_ids), model.config.hidden_size)
    d_hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def gradients(model, tensors):
        hidden = hidden_states(model, batch)
        return torch.autograd.grad(hidden, tensors, d_hidden.to(hidden.dtype))

    truth = gradients(plain, tensors)
    torchs = gradients(*dense_twin(model, torch.float32))
    ours = gradients(model, [p for p in model.parameters() if p.requires_grad])
    errors = [[(a - b).flatten() for a, b in zip(x, truth, strict=True)] for x in (ours, torchs)]
    error, bar = (rms(torch.cat(each)) for each in errors)
    assert error <= 2 * bar


def dense_twin(model, dtype):
    """Return the same model with weights written out in `dtype`, and its adapters' tensors in order."""
    twin = AutoModelForCausalLM.from_config(
        copy.deepcopy(model.config), attn_implementation="kit", dtype=dtype
    ).eval()
    twin.requires_grad_(False)
    tensors = []
    left = {k: v for k, v in model.state_dict().items() if "base_layer" not in k and "lora_" not in k}
    twin.load_state_dict(left, strict=False)
    for path, layer in model.named_modules():
        if isinstance(getattr(layer, "base_layer", None), NF4Linear):
            base = layer.base_layer
            pair = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            a, b = (weight.detach().to(dtype).requires_grad_() for weight in pair)
            tensors += [a, b]
            bias = None if base.bias is None else base.bias.to(dtype)
            scaling = layer.lora_alpha["default"] / layer.r["default"]
            twin.set_submodule(path, Written(base.dequantise().to(dtype), a, b, scaling, bias))
    return twin, tensors


class Written(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = parts

    def forward(self, x):
        weight, a, b, scaling, bias = self.parts
        return nn.functional.linear(x, weight + scaling * (b @ a), bias)


def test_adapters_start_at_the_base_and_their_seed_is_theirs_alone():
    base = make_base("qwen2")
    quantise_decoder(base, "cpu")
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again, other = make_qlora("qwen2"), make_qlora("qwen2"), make_qlora("qwen2", seed=1)
    assert torch.equal(logits_of(first), logits_of(base))
    pairs = zip(adapter_tensors(first).values(), adapter_tensors(again).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    first_a, other_a = (m.model.layers[0].mlp.up_proj.lora_A["default"].weight for m in (first, other))
    assert not torch.equal(first_a, other_a)
    assert 0.9 * 32**-0.5 < first_a.max() <= 32**-0.5
    torch.manual_seed(7)
    qlora.add_adapters(base, base="")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_adapters_the_model_is_its_base_and_after_it_the_policy_again(family):
    base = make_base(family)
    quantise_decoder(base, "cpu")
    model = make_qlora(family)
    take_steps(model, 3)
    policy = logits_of(model)
    with pytest.raises(RuntimeError, match="out of the block"), qlora.without_adapters(model):
        with qlora.without_adapters(model):
            assert torch.equal(logits_of(model), logits_of(base))
        assert torch.equal(logits_of(model), logits_of(base))
        raise RuntimeError("out of the block")
    assert torch.equal(logits_of(model), policy)
    assert not torch.equal(policy, logits_of(base))
    assert take_steps(model, 1)  # gradients flow again


def test_the_sampler_draws_from_the_adapted_model_and_training_goes_on_after_it():
    model, alone = make_qlora(), make_qlora()
    take_steps(model, 3)
    take_steps(alone, 3)
    prompts = [d.ids.tolist() for d in random_documents([5, 9, 3])]
    params = SamplingParams(0.0, max_new_tokens=6)
    completions = generate(model, prompts, params, eos_token_id=2, num_slots=2, seed=0)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([*prompt, *completion.ids], dtype=torch.int32)
        batch = PackedBatch.build([Document(ids, len(prompt))])
        with torch.no_grad():
            logits = next_token_logits(model.eval(), hidden_states(model, batch))
        assert logits[len(prompt) - 1 : -1].argmax(1).tolist() == completion.ids
    assert take_steps(model, 2) == take_steps(alone, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_is_the_unmerged_one_to_rounding(tmp_path, family):
    model = make_qlora(family, rank=3, alpha=5)
    take_steps(model, 10)
    twin, _ = dense_twin(model, torch.float64)
    truth, unmerged = logits_of(twin), logits_of(model)
    merge(model, model.dtype)
    save(tmp_path / "plain", model)
    loaded, _ = models.load(str(tmp_path / "plain"), device="cpu")
    assert {type(m) for m in loaded.modules()} == {type(m) for m in make_model(family).modules()}
    assert loaded.dtype == torch.float32
    bar = rms(unmerged - truth)
    assert 0 < bar < 1e-4 * rms(truth)
    assert rms(logits_of(loaded) - truth) <= 2 * bar
    assert torch.equal(logits_of(loaded), logits_of(model))  # in place: what was written is what is left
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation="eager")
    document = random_documents([23])[0]
    expected = next_token_logits(loaded, hidden_states(loaded, PackedBatch.build([document])))
    torch.testing.assert_close(plain(document.ids.long()[None]).logits[0], expected, atol=1e-4, rtol=1e-4)
    assert not list((tmp_path / "plain").glob("adapter*"))


def test_merging_rounds_once_and_to_the_dtype_it_is_given():
    model = make_qlora("qwen2", torch.bfloat16)
    take_steps(model, 10)
    layer = model.model.layers[1].mlp.down_proj
    a, b = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
    exact = layer.base_layer.dequantise().double() + 5 / 3 * b @ a
    merged = {}
    for dtype in (torch.bfloat16, torch.float32):
        twin = copy.deepcopy(model)
        merge(twin, dtype)
        assert {p.dtype for p in twin.parameters()} == {dtype}
        assert all(p.requires_grad for p in twin.parameters())
        merged[dtype] = twin.model.layers[1].mlp.down_proj.weight.detach()
    assert torch.equal(merged[torch.bfloat16], merged[torch.float32].bfloat16())
    eps = torch.finfo(torch.float32).eps
    assert (merged[torch.float32] - exact).abs().max() < 4 * eps * exact.abs().max()


def save(path, model) -> Path:
    save_model(path, model, make_tokenizer())
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_the_adapters_that_are_written(tmp_path, family):
    model = make_qlora(family, rank=3, alpha=5, base="some/model")
    take_steps(model, 3)
    folder = save(tmp_path / "adapters", model)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"
    assert not list(folder.glob("model*"))
    base = make_base(family)
    quantise_decoder(base, "cpu")
    theirs = PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits_of(theirs.base_model.model), logits_of(model))
    names = {"base_model.model." + name.replace(".default", "") for name in adapter_tensors(model)}
    assert load_file(folder / "adapter_model.safetensors").keys() == names


def test_a_folder_of_adapters_is_loaded_with_its_base_and_can_be_trained_on(tmp_path):
    base = tmp_path / "base"
    save(base, make_model("llama"))
    model, tokenizer = qlora.load(str(base), rank=3, alpha=5, device="cpu")
    losses = take_steps(model, 3)
    ChatFormat(tokenizer, model, template="plain")
    save_model(tmp_path / "adapters", model, tokenizer)
    loaded, again = models.load(str(tmp_path / "adapters"), device="cpu")
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == PLAIN_TEMPLATE  # that of the run, not the base's
    assert take_steps(loaded, 1)[0] < losses[0]
    with pytest.raises(ValueError, match="has adapters already"):
        qlora.load(str(tmp_path / "adapters"), device="cpu")


@pytest.mark.parametrize("name", ["base", "./base", "~/base"])
def test_a_base_in_a_folder_is_recorded_by_its_whole_path_and_adapters_there_are_refused(
    tmp_path, monkeypatch, name
):
    save(tmp_path / "base", make_model("llama"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    model, tokenizer = qlora.load(name, rank=3, device="cpu")
    assert model.peft_config["default"].base_model_name_or_path == str((tmp_path / "base").resolve())
    save_model(tmp_path / "base", model, tokenizer)
    with pytest.raises(ValueError, match="has adapters already"):
        qlora.load(name, device="cpu")


def test_the_shipped_model_is_quantised_and_adapted_by_name():
    model, _ = qlora.load("tiny", device="cpu")
    assert model.peft_config["default"].base_model_name_or_path == "tiny"
    assert (model.peft_config["default"].r, model.peft_config["default"].lora_alpha) == (16, 32)
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 3 * 7
    plain, _ = models.load("tiny", device="cpu")
    full = plain.model.layers[0].mlp.up_proj.weight
    error = rms(model.model.layers[0].mlp.up_proj.base_layer.dequantise() - full) / rms(full)
    assert 0.05 < error < 0.12  # NF4 of a normal distribution in blocks of 64: 0.09


def test_a_gguf_file_is_dequantised_and_then_quantised():
    path = os.environ.get("KIT_GGUF")
    if not path:
        pytest.skip(
            "real weights do not ship with the kit: set KIT_GGUF to a GGUF file of a Qwen2, Llama or Gemma 3 "
            "model"
        )
    model, _ = qlora.load(path, device="cpu")
    assert model.peft_config["default"].base_model_name_or_path == str(Path(path).resolve())
    plain, _ = models.load(path, device="cpu")
    expected = NF4Linear.quantise(plain.model.layers[0].mlp.up_proj, "cpu")
    assert torch.equal(model.model.layers[0].mlp.up_proj.base_layer.weight, expected.weight)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 4}, "r is 3 there and 4 here"),
        ({"alpha": 6}, "lora_alpha is 5 there and 6 here"),
        ({"base": "other"}, "base_model_name_or_path is '' there and 'other' here"),
    ],
)
def test_a_checkpoint_of_other_adapters_is_refused_by_name(tmp_path, changed, message):
    path = save(tmp_path / "adapters", make_qlora())
    with pytest.raises(ValueError, match=message):
        load_weights(path, make_qlora(**changed))
    full = save(tmp_path / "full", make_model("llama"))
    with pytest.raises(ValueError, match="checkpoint of another model"):
        load_weights(full, make_qlora())
    with pytest.raises(ValueError, match="checkpoint of another model"):
        load_weights(path, make_model("llama"))


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(ValueError, match="rank is 0"):
        make_qlora(rank=0)
    with pytest.raises(ValueError, match="has no NF4 layer to adapt"):
        qlora.add_adapters(make_model("llama"), base="plain")
    with pytest.raises(ValueError, match="has no plain layer to adapt; pass nf4=True"):
        quantise_decoder(model := make_model("llama"), "cpu")
        qlora.add_adapters(model, base="nf4", nf4=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])  # untied and tied head
def test_a_checkpoint_gives_back_adapters_and_optimizer_bit_for_bit(tmp_path, family, dtype):
    def make():
        model = make_qlora(family, dtype)
        return model, TrainingStep(model, Savings(recompute=False), lr=1e-2, max_grad_norm=1.0, seed=3)

    model, training_step = make()
    take_steps(model, 2, training_step=training_step)
    path = checkpoint.save(tmp_path, model, make_tokenizer(), training_step.optimizer, 2)
    take_steps(model, 2, training_step=training_step)
    other, other_step = make()
    assert checkpoint.load(path, other, other_step.optimizer) == 2
    take_steps(other, 2, training_step=other_step)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not list(path.glob("model*"))


def run_training(out, *, resume=False):
    documents = random_documents(LENGTHS)
    plan = TrainingPlan.make(list(map(len, documents)), row_tokens=32, batch_traces=2, epochs=9, max_steps=10)
    run = RunFolder.open(Config(str(out), resume))
    return train(
        make_qlora(), make_tokenizer(), documents, plan, run, lr=1e-2, warmup_ratio=0.1, checkpoint_every=5
    )


def start(out, resume):
    return call(__file__, "run_training", out, resume=resume)


@pytest.mark.slow
def test_killed_by_sigkill_and_resumed_it_ends_bit_equal_to_an_unbroken_run(tmp_path):
    train_unbroken_and_killed(start, tmp_path, lines=6, newest_checkpoint="step_0000005")
    file = Path("model") / "adapter_model.safetensors"
    whole, again = (load_file(tmp_path / name / file) for name in ("whole", "broken"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    assert [p.name for p in (tmp_path / "whole" / "model").glob("*.safetensors")] == [file.name]


def test_the_head_and_the_embedding_are_not_quantised_cast_or_copied(tiny_model):
    weight = head_weight(tiny_model)
    quantise_decoder(tiny_model, "cpu")
    qlora.add_adapters(tiny_model, base="")
    assert head_weight(tiny_model) is weight
    assert not weight.requires_grad


def test_adapters_on_fake_tensors_hold_and_allocate_what_real_ones_do(tiny_model):
    def run_of(model, T=65):
        layer = model.train().model.layers[0].mlp
        tensors = [p for p in layer.parameters() if p.requires_grad]
        x, d_out = torch.ones(1, T, 32, requires_grad=True), torch.ones(1, T, 32)

        def run():
            out = layer(x)
            return out, torch.autograd.grad(out, [x, *tensors], d_out)

        return run

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = type(tiny_model)(tiny_model.config)
        simulate_quantised_decoder(fake)
        qlora.add_adapters(fake, base="", rank=3)
        run = run_of(fake)
        with LiveBytes() as counted:
            kept = run()  # noqa: F841
    quantise_decoder(tiny_model, "cpu")
    qlora.add_adapters(tiny_model, base="", rank=3)
    run = run_of(tiny_model)
    run()
    assert (counted.peak, counted.now) == allocated(run)
    assert held_tensors(fake) == held_tensors(tiny_model)


@pytest.mark.slow
def test_importing_what_nf4_needs_does_not_ask_for_a_download():
    """On some CPUs bitsandbytes warns of a kernel that it could not download."""
    command = [sys.executable, "-c", "import kit.models.qlora"]
    child = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert child.returncode == 0 and "Failed to load CPU" not in child.stderr, child.stderr
