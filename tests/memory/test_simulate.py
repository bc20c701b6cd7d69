import contextlib
import gc
import json
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, make_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

from kit.generate.sampling import SamplingParams
from kit.machine import CONTEXT, GIB
from kit.memory import live_bytes
from kit.memory.live_bytes import Ledger
from kit.memory.phases import SAMPLER, MeasuredRun
from kit.memory.simulate import fake_batch, measure, plan
from kit.models.attention import REGISTERED
from kit.models.loading import load_config
from kit.models.nf4 import quantise_decoder, simulate_quantised_decoder
from kit.models.qlora import add_adapters
from kit.models.shipped import CONFIGS
from kit.packing import PackedBatch
from kit.train.offload import host_empty
from kit.train.savings import Savings

LEAN = {
    "optimizer": "adamw8bit",
    "tile_tokens": 100,
    "update_in_backward": True,
    "logit_rows": 70,
    "offload_inputs": True,
}
ON_HOST = LEAN | {"update_in_backward": False, "offload_optimizer": True, "offload_gradients": True}
PARAMETERS = {  # as published with the models
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768, "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688, "google/gemma-3-1b-it": 999_885_952,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400, "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "Qwen/Qwen3-0.6B": 596_049_920, "Qwen/Qwen3-1.7B": 1_720_574_976, "Qwen/Qwen3-4B": 4_022_468_096,
    "google/gemma-3-270m-it": 268_098_176,
}  # fmt: skip
SMALL = {  # large enough that one owner does not drown in the others, small enough for seconds
    "vocab_size": 4_000,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def real_batch(row_tokens: int) -> PackedBatch:
    """Return a row with the same shapes as fake_batch's that a real step can compute."""
    cu_seqlens = torch.tensor([0, row_tokens], dtype=torch.int32)
    return replace(fake_batch(row_tokens), position_ids=torch.arange(row_tokens), cu_seqlens=cu_seqlens)


def test_the_allocator_has_a_share_of_the_peak_and_room_to_grow_on_three_streams():
    small = plan("tiny", row_tokens=32)
    assert small.total - CONTEXT - small.peak == 64 * 2**20 > 3 * 20 * 2**20
    large = replace(small, peak=10 * GIB)
    assert large.total - CONTEXT == round(1.06 * large.peak)


@pytest.fixture
def small_model(tmp_path):
    """A folder that holds a config and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))
    return str(tmp_path)


@pytest.mark.parametrize("model", PARAMETERS)
def test_the_configs_that_ship_have_the_models_own_number_of_parameters(model):
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(load_config(model))
    assert sum(parameter.numel() for parameter in made.parameters()) == PARAMETERS[model]
    assert {path.stem.replace("--", "/", 1) for path in CONFIGS.glob("*.json")} == set(PARAMETERS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "savings",
    [
        {"optimizer": "adamw8bit"},
        LEAN,
        {**LEAN, "head_update": "blocked", "offload_optimizer": True},
        ON_HOST,
    ],
    ids=str,
)
@pytest.mark.parametrize("family", [*FAMILIES, "smollm3"])
@pytest.mark.filterwarnings("ignore:transformers computes the layers of a smollm3")
def test_a_planned_step_holds_the_bytes_of_a_real_one(family, savings):
    """The same ledger over fake tensors and over real ones on this CPU."""
    if family == "smollm3" and "tile_tokens" in savings:
        savings = savings | {"tile_tokens": 0}
    peaks, hosts, owners = [], [], []
    for fake in (True, False):
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
            config = load_small(family)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="kit", dtype=torch.float32)
            batch = fake_batch(300) if fake else real_batch(300)
            gc.collect()
            ledger = measure(model, Savings(**savings), batch)
        peaks.append(ledger.peak)
        hosts.append(ledger.host_peak)
        owners.append(ledger.owners)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01) and hosts[0] == hosts[1]
    assert owners[0].keys() == owners[1].keys()
    assert (hosts[0] > 0) == ("offload_inputs" in savings)


WIDE = pytest.mark.filterwarnings("ignore:heads are 288 wide")


@WIDE
@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 2), ("gemma3_text", 1)])
def test_the_plan_counts_the_scores_that_torch_computes_whole_for_heads_wider_than_256(family, kv_heads):
    """No fused attention of torch takes them on a card if they share keys. Here it is told to use none."""
    wide = SMALL | {"num_hidden_layers": 2, "head_dim": 288, "num_key_value_heads": kv_heads}
    config, peaks = AutoConfig.for_model(family, **wide, sliding_window=128, pad_token_id=0), {}
    for fake in (True, False):
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else sdpa_kernel(SDPBackend.MATH):
            how = {"attn_implementation": REGISTERED["kit" if fake else "torch"], "dtype": torch.bfloat16}
            model = AutoModelForCausalLM.from_config(config, **how)
            batch = fake_batch(500) if fake else real_batch(500)
            gc.collect()
            ledger = measure(model, Savings(optimizer="adamw8bit"), batch)
        peaks[fake] = ledger.peak
    assert peaks[True] == pytest.approx(peaks[False], rel=0.01)
    assert (
        ledger.owners[live_bytes.LAYER] > 2 * 4 * 4 * 500**2
    )  # scores of 4 heads in fp32, and their gradient


@WIDE
def test_prompts_read_by_wide_heads_see_no_more_than_one_prompt(tmp_path):
    model = AutoConfig.for_model("llama", **SMALL | {"num_hidden_layers": 1, "head_dim": 288})
    (tmp_path / "config.json").write_text(model.to_json_string())
    sizes = {"params": SamplingParams(max_new_tokens=8), "prompt_tokens": 1024, "num_slots": 1}
    run = MeasuredRun(model=str(tmp_path), **sizes)
    one, four = (run.at(slots).owners[SAMPLER] for slots in (1, 4))
    scores = 4 * 4 * 1024**2
    assert scores < one < four < one + 3 * scores


def test_a_planned_step_of_two_rows_holds_the_bytes_of_a_real_one_and_more_than_a_step_of_one():
    """The second row's loss finds the gradients of the first: half the peak if a model is mostly head."""
    peaks = {}
    for rows, fake in [(1, True), (2, True), (2, False), (3, True)]:
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
            config = AutoConfig.for_model("llama", **SMALL | {"vocab_size": 20_000})
            model = AutoModelForCausalLM.from_config(config, attn_implementation="kit", dtype=torch.float32)
            batch = fake_batch(200) if fake else real_batch(200)
            peaks[rows, fake] = measure(model, Savings(optimizer="adamw8bit"), batch, rows=rows).peak
    assert peaks[2, True] == pytest.approx(peaks[2, False], rel=0.01)
    assert peaks[2, True] > 1.1 * peaks[1, True] and peaks[3, True] == peaks[2, True]


@pytest.mark.parametrize("offload", [False, True])
def test_the_plan_counts_two_bytes_per_exact_weight_beside_the_optimizer_states(small_model, offload):
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(load_config(small_model))
    sizes = [parameter.numel() for parameter in made.parameters()]
    plain, exact = (
        plan(small_model, row_tokens=100, savings=Savings(exact_weights=exact, offload_optimizer=offload))
        for exact in (False, True)
    )
    whole, slabs = 2 * sum(sizes), 2 * 2 * max(sizes)
    rounding = 512 * len(sizes)  # of the allocator, per tensor
    assert exact.host - plain.host == whole * offload
    assert exact.peak - plain.peak == pytest.approx(slabs if offload else whole, abs=rounding)
    assert exact.owners["optimizer"] - plain.owners["optimizer"] == exact.peak - plain.peak


@pytest.mark.slow
def test_a_planned_step_of_135m_parameters_holds_the_bytes_of_a_real_one():
    """SmolLM2-135M's shape, random weights, all savings on."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    savings, peaks = Savings(**LEAN | {"tile_tokens": 24, "logit_rows": 16}), []
    for fake in (True, False):
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
            with torch.device("meta") if not fake else contextlib.nullcontext():
                model = AutoModelForCausalLM.from_config(
                    config, attn_implementation="kit", dtype=torch.bfloat16
                )
            batch = fake_batch(64) if fake else real_batch(64)
            if not fake:  # zeros do: no byte depends on a value
                model = model.to_empty(device="cpu")
                model.model.rotary_emb = type(model.model.rotary_emb)(config)
                for parameter in model.parameters():
                    parameter.detach().zero_()
                model.tie_weights()
            assert sum(p.numel() for p in model.parameters()) == 134_515_008
            peaks.append(measure(model, savings, batch).peak)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


def load_small(family):
    kind = "gemma3_text" if family == "gemma3" else family
    gemma = {"num_key_value_heads": 1, "head_dim": 64, "sliding_window": 100}
    return AutoConfig.for_model(kind, pad_token_id=0, **SMALL | (gemma if family == "gemma3" else {}))


def test_a_planned_qlora_step_holds_the_bytes_of_a_real_one():
    peaks = []
    for fake in (True, False):
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
            model = AutoModelForCausalLM.from_config(
                load_small("llama"), attn_implementation="kit", dtype=torch.float32
            )
            simulate_quantised_decoder(model) if fake else quantise_decoder(model, "cpu")
            add_adapters(model, base="", rank=4)
            batch = fake_batch(300) if fake else real_batch(300)
            ledger = measure(model, Savings(optimizer="adamw8bit", tile_tokens=100), batch)
        peaks.append(ledger.peak)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


@pytest.mark.slow
def test_the_plan_of_a_supported_model_names_its_owners():
    model, savings = "Qwen/Qwen2.5-0.5B-Instruct", Savings(optimizer="adamw8bit", tile_tokens=2048)
    found = plan(model, row_tokens=4096, savings=savings)
    assert found.owners[live_bytes.WEIGHTS] == pytest.approx(2 * PARAMETERS[model], rel=0.001)
    assert found.owners[live_bytes.OPTIMIZER] == pytest.approx((4 + 8 / 256) * PARAMETERS[model], rel=0.001)
    assert sum(n for owner, n in found.owners.items() if owner != live_bytes.HOST) == found.peak
    text = str(found)
    assert "one row per step" in text and "in CPU memory 0.00 GiB" in text
    assert "(simulated)" in text and found.when in text
    assert found.as_json()["fits_gb"] == [6, 8, 12, 16, 24]


def test_wide_activations_are_not_mistaken_for_the_gradient_of_a_frozen_head(tmp_path):
    """1,024 tokens of 768 numbers are more than half the head's 3,000 rows of 256."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL, "vocab_size": 3_000}))
    found = plan(str(tmp_path), row_tokens=1_024, qlora_rank=4)
    assert found.owners[live_bytes.LAYER] > 0 and live_bytes.HEAD not in found.owners


def test_the_ledger_counts_storages_once_until_the_last_view_is_gone():
    model = make_model("llama")
    ledger = Ledger(model)
    weights = ledger.now
    assert weights >= sum(p.nbytes for p in model.parameters())
    with ledger:
        x = torch.zeros(1000)
        view = x[10:].view(2, -1)
        assert ledger.now == weights + 4096  # 4,000 bytes in units of 512
        del x
        assert ledger.now == weights + 4096
        del view
        held = host_empty(5000, for_card=False)
        assert ledger.now == weights and ledger.host_peak == 5120  # beside what the card holds
        del held
        assert ledger.now == weights
    assert ledger.now == weights and ledger.peak == weights + 4096
    ledger.close()


def test_a_model_without_a_config_at_hand_is_refused_with_the_ways_to_give_one():
    ways = r"(?s)model is nobody/nothing and no config.*config.json.*google/gemma-3-1b-it"
    with pytest.raises(ValueError, match=ways):
        load_config("nobody/nothing")
