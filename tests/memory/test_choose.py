import json
from dataclasses import replace

import pytest
from test_closed_form import small_heads  # noqa: F401  a fixture
from test_simulate import SMALL

from kit.machine import GIB
from kit.memory import choose as fitting
from kit.memory.choose import choose, ladder_steps, rows_of, suggest_savings, switches
from kit.memory.simulate import plan
from kit.models.loading import load_config
from kit.train.savings import Savings

T = 1024


def make_model(folder, **settings) -> str:
    """A folder that holds a config and nothing else."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL, **settings}))
    return str(folder)


@pytest.fixture
def small_model(tmp_path):
    return make_model(tmp_path, num_hidden_layers=2)


def total(model, savings, rows=1):
    return plan(model, row_tokens=T, savings=savings, rows=rows_of(savings, rows)).total / GIB


@pytest.mark.parametrize("rows", [1, 2])
def test_a_card_with_room_for_the_first_settings_gets_them(small_model, rows):
    first = ladder_steps(load_config(small_model))[0]
    found = choose(small_model, row_tokens=T, gpu_gb=total(small_model, first, rows) + 1e-6, rows=rows)
    assert found.savings == first and found.rows == rows
    assert switches(found, 1.0) == vars(first)


@pytest.mark.slow
def test_no_switch_that_was_chosen_can_be_left_out(small_model):
    """For a card that the third rung fits, and for one that only the leanest does."""
    ladder = ladder_steps(load_config(small_model))
    for place in (2, len(ladder) - 1):
        gpu_gb = total(small_model, ladder[place], 2) + 1e-6
        found = choose(small_model, row_tokens=T, gpu_gb=gpu_gb, rows=2)
        assert found.fits(gpu_gb)
        for name, off in vars(Savings()).items():
            without = {**vars(found.savings), name: off}
            if name in ("optimizer", "recompute") or vars(found.savings)[name] == off:
                continue
            if name == "update_in_backward" and found.savings.head_update == "blocked":
                continue
            assert total(small_model, Savings(**without), 2) > gpu_gb, (gpu_gb, found.savings, name)


def test_tiles_are_the_widest_that_fit(tmp_path, monkeypatch):
    """A narrow tile launches many small kernels."""
    small_model = make_model(tmp_path, num_hidden_layers=1, intermediate_size=4_096, vocab_size=300)
    monkeypatch.setattr(fitting, "LADDER", ({"optimizer": "adamw8bit"}, {"tile_tokens": 64}))
    monkeypatch.setattr(fitting, "WIDER_TILES", (512, 256))
    for tile_tokens in (64, 256, 512):
        gpu_gb = total(small_model, Savings(optimizer="adamw8bit", tile_tokens=tile_tokens)) + 1e-6
        assert choose(small_model, row_tokens=T, gpu_gb=gpu_gb).savings.tile_tokens == tile_tokens


@pytest.mark.usefixtures("small_heads")
def test_the_blocked_head_is_chosen_where_it_decides_whether_a_model_fits(tmp_path):
    model = make_model(tmp_path, vocab_size=60_000, num_hidden_layers=2)  # mostly head
    ladder = ladder_steps(load_config(model))
    place = next(i for i, savings in enumerate(ladder) if savings.head_update == "blocked")
    whole, blocked = (total(model, savings) for savings in ladder[place - 1 : place + 1])
    found = choose(model, row_tokens=T, gpu_gb=(whole + blocked) / 2)
    assert blocked < whole and found.savings.head_update == "blocked" and not found.savings.offload_optimizer
    settings = switches(found, 1.0)
    assert (settings["batch_traces"], settings["max_grad_norm"], settings["max_tensor_norm"]) == (1, 0.0, 0.0)
    Savings(**vars(found.savings)).check_clipping(settings["max_grad_norm"], settings["max_tensor_norm"])
    lean = replace(found, savings=replace(found.savings, head_update="whole"))
    assert switches(lean, 0.7)["max_tensor_norm"] == 0.7 and switches(lean, 0.7)["max_grad_norm"] == 0.0


def test_a_head_of_its_own_has_no_blocks_to_choose(tmp_path):
    model = make_model(tmp_path, tie_word_embeddings=False, num_hidden_layers=2)
    ladder = ladder_steps(load_config(model))
    assert all(savings.head_update == "whole" for savings in ladder) and ladder[-1].offload_optimizer
    gpu_gb = total(model, ladder[-1]) + 1e-6
    assert choose(model, row_tokens=T, gpu_gb=gpu_gb).fits(gpu_gb)


def test_adapters_choose_among_what_saves_them_something(small_model):
    ladder = ladder_steps(load_config(small_model), 16)
    assert len(ladder) > 2 and not any(
        s.update_in_backward or s.offload_optimizer or s.head_update == "blocked" for s in ladder
    )


def test_what_would_save_more_is_listed_cheapest_first_until_nothing_is_left():
    model = "google/gemma-3-1b-it"
    found = replace(plan("tiny", row_tokens=64), model=model, row_tokens=16_384, rows=2)
    lines = suggest_savings(found).splitlines()
    assert lines[0].startswith("  for less, cheapest first")
    flags = [line.split("  ")[2] for line in lines[1:]]
    assert flags == ["--update_in_backward", "--logit_rows 512", "--tile_tokens 2048", "--offload_inputs",
                     "--head_update blocked", "--offload_optimizer"]  # fmt: skip
    sizes = [float(line.split(" GiB, ")[0].split()[-1]) for line in lines[1:]]
    assert sizes == sorted(sizes, reverse=True)
    seconds = [float(line.split(" GiB, ")[1].split()[0]) for line in lines[2:]]
    assert seconds == sorted(seconds) and seconds[0] > 0 and "one row per step" in lines[1]
    dear = replace(found, savings=Savings(recompute=False, optimizer="adamw"))
    assert suggest_savings(dear).splitlines()[1].startswith(
        "    --recompute "
    ) and "--optimizer adamw8bit" in suggest_savings(dear)
    assert suggest_savings(replace(found, savings=ladder_steps(load_config(model))[-1])) == ""
