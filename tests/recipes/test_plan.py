"""What every recipe's --plan prints: the command that starts the run, and what differs from the paper."""

import shlex
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

import pytest
from children import run_recipe

from kit import paper
from kit.config import as_flags, parse, some_of
from kit.train.savings import Savings

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "gemma3_1b_8k": [
        "--row_tokens",
        "256",
        "--max_new_tokens",
        "64",
        "--no_shuffle",
        "--verify",
        "none",
        "--warmup_ratio",
        "1e-5",
    ],
    "evaluate": ["--max_new_tokens", "64", "--top_k", "3"],
    "grpo_qwen2_5_0_5b": ["--row_tokens", "256", "--max_new_tokens", "64"],
}


@pytest.fixture(params=SMALL)
def recipe(request, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    return import_module(request.param)


@pytest.mark.parametrize("flags", [["--preset", "evening", "--gpu_gb", "6"], ["--smoke"]])
def test_the_command_that_the_plan_prints_parses_to_the_settings_that_it_chose(recipe, flags, capsys):
    awkward = ["--model", "tiny", "--instruction", 'it\'s 5 $ "each"']
    choices = {"smoke": recipe.SMOKE, "presets": recipe.PRESETS}
    config = parse(recipe.Config, ["--plan", *SMALL[recipe.__name__], *awkward, *flags], **choices)
    recipe.main(config)
    printed = capsys.readouterr().out
    command = next(line for line in printed.splitlines() if line.startswith("start  "))
    words = shlex.split("--" + command.partition(" --")[2])  # behind how the program was started
    started = parse(recipe.Config, words, **choices)
    names = ["num_slots", *(field.name for field in fields(Savings))]
    chosen = {name: getattr(started, name) for name in names if hasattr(started, name)}
    if "--smoke" not in flags:
        assert chosen["num_slots"] > config.num_slots and chosen.get("optimizer", "adamw8bit") == "adamw8bit"
    assert started == replace(config.to_start(), **chosen)
    assert "(assumed)" in printed and "disk  " in printed and "the paper   " in printed


def test_what_is_typed_beside_gpu_gb_holds(recipe, capsys):
    typed = {"num_slots": 3, "tile_tokens": 128, "logit_rows": 0, "recompute": True, "optimizer": "auto"}
    typed = {name: value for name, value in typed.items() if hasattr(recipe.Config, name)}
    flags = ["--plan", "--gpu_gb", "6", "--model", "tiny", *as_flags(typed).split()]
    recipe.main(parse(recipe.Config, [*SMALL[recipe.__name__], *flags]))
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("start  "))
    started = parse(recipe.Config, shlex.split("--" + command.partition(" --")[2]))
    assert some_of(started, *typed) == typed


@pytest.mark.parametrize("card", [[], ["--gpu_gb", "6"]])
def test_a_plan_whose_command_would_be_refused_prints_and_writes_nothing(card, tmp_path, capsys):
    recipe = import_module("kit.recipes.gemma3_1b_8k")
    written = tmp_path / "plan.json"
    flags = ["--plan", "--model", "tiny", "--update_in_backward", "--batch_traces", "8", f"--json={written}"]
    with pytest.raises(ValueError, match="update_in_backward"):
        recipe.main(parse(recipe.Config, [*flags, *card]))
    assert not capsys.readouterr().out and not written.exists()


def test_smoke_is_the_same_tiny_run_on_a_cpu_with_every_preset(recipe):
    for preset in recipe.PRESETS:
        config = parse(
            recipe.Config, ["--smoke", "--preset", preset], smoke=recipe.SMOKE, presets=recipe.PRESETS
        )
        assert {name: getattr(config, name) for name in recipe.SMOKE} == recipe.SMOKE
        assert not config.gpu_gib


def test_auto_without_a_card_is_one_line(tmp_path):
    done = run_recipe("evaluate", "--plan", "--preset", "evening", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(
        "error: gpu_gb is auto but no NVIDIA GPU is here; pass a card's size to plan"
    )
    assert done.stderr.count("\n") == 1 and done.stderr.endswith(", or --gpu_gb '' to choose nothing\n")
    done = run_recipe(
        "evaluate", "--plan", "--preset", "evening", "--model", "tiny", "--gpu_gb", "", cwd=tmp_path
    )
    assert done.returncode == 0 and "start  " in done.stdout


def test_the_default_is_the_papers_setting_and_an_evening_says_what_differs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    recipe = import_module("gemma3_1b_8k")
    found = paper.deviations(recipe.Config(**recipe.PRESETS["evening"]))
    assert {
        "num_traces 1,000 (paper: one of 8,000, 16,000, 32,000, 64,000, 128,000, 220,000)",
        "epochs 2 (paper: 4)",
        "num_questions 200 (paper: all)",
    } < {*found}
    sweep = import_module("valley_sweep")
    assert "max_new_tokens 8,192 (paper: 16,384)" in paper.deviations(
        sweep.Config(**sweep.PRESETS["evening"])
    )
