import json
from dataclasses import replace

import pytest
from closed_form import formula
from memory_table import ROWS, simulate
from test_simulate import LEAN, SMALL
from transformers import AutoConfig

from kit.memory.simulate import plan
from kit.models.loading import load_config
from kit.models.shipped import CONFIGS
from kit.train.savings import Savings

MODELS = sorted(path.stem.replace("--", "/", 1) for path in CONFIGS.glob("*.json"))
FAST = {"Qwen/Qwen2.5-0.5B-Instruct", "google/gemma-3-1b-it"}  # one without windows, one with them


@pytest.fixture
def small_heads(monkeypatch):
    """Blocks of the head, and slabs of optimizer and gradients, as small as the models of these tests."""
    for place in ("kit.kernels.linear_cross_entropy_blocks.BLOCK_BYTES", "closed_form.BLOCK_BYTES"):
        monkeypatch.setattr(place, 2**22)
    for place in ("optimizer.AdamW8bit.SLAB", "offload.PIECE", "weight_updates.PIECE"):
        monkeypatch.setattr(f"kit.train.{place}", 2**16)


def moved(tmp_path, V, T, layers, *both, rows=1):
    """Return (the change of the plan's peak between two settings, the formula's, the first peak)."""
    settings = SMALL | {"model_type": "llama", "vocab_size": V, "num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model = str(tmp_path)
    planned = [plan(model, row_tokens=T, savings=savings, rows=rows).peak for savings in both]
    expected = [sum(formula(load_config(model), T, savings, rows=rows).values()) for savings in both]
    return planned[1] - planned[0], expected[1] - expected[0], planned[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "V", "T", "layers"),  # sizes with which the saving's owner is a good part of the peak
    [
        ("tile_tokens", 0, 500, 2048, 2),
        ("offload_optimizer", False, 30_000, 256, 2),
        ("head_update", "whole", 30_000, 256, 2),
    ],
)
def test_dropping_a_saving_moves_the_plan_by_what_the_formula_says(
    name, value, V, T, layers, tmp_path, small_heads
):
    lean = Savings(**LEAN | {"tile_tokens": T // 4}, head_update="blocked", offload_optimizer=True)
    planned, expected, before = moved(tmp_path, V, T, layers, lean, replace(lean, **{name: value}))
    assert planned > 0.1 * before
    assert planned == pytest.approx(expected, rel=0.2)


def test_a_second_row_moves_the_formula_as_it_moves_the_plan(tmp_path):
    """Its loss finds the gradients of the first."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama", "vocab_size": 30_000}))
    model, savings = str(tmp_path), Savings(optimizer="adamw8bit")
    planned = [plan(model, row_tokens=256, savings=savings, rows=rows).peak for rows in (1, 2)]
    expected = [sum(formula(load_config(model), 256, savings, rows=rows).values()) for rows in (1, 2)]
    assert expected == pytest.approx(planned, rel=0.1)
    assert planned[1] > 1.1 * planned[0] and expected[1] > 1.1 * expected[0]


@pytest.mark.slow
@pytest.mark.parametrize(("V", "layers"), [(30_000, 2), (500, 12)])  # the peak is in the loss, in a layer
def test_gradients_in_cpu_memory_lower_the_plan_by_what_the_formula_says(V, layers, tmp_path, small_heads):
    kept = Savings(optimizer="adamw8bit", tile_tokens=128)
    away = replace(kept, offload_gradients=True)
    planned, expected, before = moved(tmp_path, V, 256, layers, kept, away, rows=2)
    assert planned < -0.1 * before
    assert planned == pytest.approx(expected, rel=0.2)


WHOLE = "meta-llama/Llama-3.2-1B-Instruct"  # has the fewest layers
LAYERS = 6  # a simulation takes as long as there are layers; the sixth is the first of Gemma without a window


@pytest.mark.parametrize(
    ("model", "qlora_rank"),
    [pytest.param(model, 0, marks=[] if model in FAST else pytest.mark.slow) for model in MODELS]
    + [(MODELS[0], 16)],
)
def test_the_plan_of_a_supported_model_agrees_with_the_formula(model, qlora_rank, tmp_path):
    """Plan 4,096 tokens in two tiles.

    One model is whole, the others have their first layers and the same share of their vocabulary.
    """
    if model != WHOLE:
        config = load_config(model).to_dict()
        vocab_size = config["vocab_size"] * LAYERS // config["num_hidden_layers"]
        first = {"layer_types": config["layer_types"][:LAYERS]} if config.get("layer_types") else {}
        first |= {"num_hidden_layers": LAYERS, "vocab_size": vocab_size}
        (tmp_path / "config.json").write_text(json.dumps(config | first))
        model = str(tmp_path)
    savings = Savings(
        optimizer="adamw8bit", tile_tokens=2048, update_in_backward=not qlora_rank, offload_inputs=True
    )
    found = plan(model, row_tokens=4096, savings=savings, qlora_rank=qlora_rank)
    expected = sum(formula(load_config(model), 4096, savings, qlora_rank).values())
    assert expected == pytest.approx(found.peak, rel=0.1)


@pytest.mark.filterwarnings("ignore:transformers computes the layers")
def test_the_memory_table_takes_a_model_whose_layers_have_no_tiles(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoConfig.for_model("smollm3", vocab_size=97, pad_token_id=0, **sizes).save_pretrained(tmp_path)
    assert simulate(str(tmp_path), "full", 64).savings == replace(ROWS["full"][0], tile_tokens=0)


@pytest.mark.slow
def test_every_figure_of_the_memory_table_agrees_with_the_formula():
    for name, (savings, qlora_rank) in ROWS.items():
        found = simulate(WHOLE, name, 16_384)
        expected = sum(formula(load_config(WHOLE), 16_384, savings, qlora_rank, rows=found.rows).values())
        assert replace(found, peak=expected).total == pytest.approx(found.total, rel=0.09)
