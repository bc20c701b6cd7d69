"""The GRPO recipe's memory plan: --gpu_gb, and the look at the card before anything is loaded."""

import json
import re
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from children import run_recipe

from kit.config import parse, part_of
from kit.machine import CONTEXT, GIB
from kit.memory.hours import TEXT_BYTES
from kit.models.shipped import CONFIGS, TINY
from kit.run import RunFolder
from kit.train.savings import Savings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Write the shipped model's config with one layer to a folder. A plan reads nothing else."""
    folder = tmp_path_factory.mktemp("one_layer")
    config = json.loads((TINY / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    return str(folder)


def small(model):
    return ["--model", model, "--row_tokens", "256", "--max_new_tokens", "64", "--desktop_gb", "0"]


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import grpo_qwen2_5_0_5b

    return grpo_qwen2_5_0_5b


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [["--qlora_rank", "4"]])
def test_the_plan_for_a_card_prints_flags_that_give_the_same_plan_again(adapters, model, tmp_path):
    flags = ["--plan", *small(model), *adapters]
    done = run_recipe("grpo_qwen2_5_0_5b", *flags, "--gpu_gb", "0.75", "--json", "chosen.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = re.search(r"for a card of 0.75 GB: (.*)", done.stdout)[1]
    assert re.search(r"--optimizer adamw8bit .*--num_slots [1-9]\d*$", printed)
    again = run_recipe("grpo_qwen2_5_0_5b", *flags, *printed.split(), "--json", "again.json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    chosen, again = (json.loads((tmp_path / name).read_text()) for name in ("chosen.json", "again.json"))
    assert chosen == again and chosen["total"] <= 0.75 * GIB
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_card_too_small_is_refused_before_any_download_or_folder(model, tmp_path):
    done = run_recipe("grpo_qwen2_5_0_5b", "--gpu_gb", "0.5", *small(model), cwd=tmp_path)
    assert done.returncode == 2
    assert f"gpu_gb is 0.5 but {model}, full fine-tuning, 256 tokens per row" in done.stderr
    assert "needs 0." in done.stderr
    assert "largest owners are " in done.stderr and not (tmp_path / "runs").exists()


def test_no_more_answers_at_once_are_chosen_than_a_rollout_has(recipe, model):
    config = parse(
        recipe.Config, [*small(model), "--gpu_gb", "24", "--batch_prompts", "3", "--group_size", "2"]
    )
    chosen, planned = recipe.plan_memory(config)
    assert chosen.num_slots == planned.num_slots == 6
    # the fastest settings: nothing else changes
    assert replace(chosen, num_slots=config.num_slots, optimizer="auto") == config


def test_savings_that_a_mini_batch_of_several_rows_cannot_have_are_refused_with_the_flags(recipe):
    with pytest.raises(ValueError, match=r"update_in_backward is on .* pass --no_update_in_backward"):
        parse(recipe.Config, ["--update_in_backward"])
    with pytest.raises(ValueError, match="group_size is 1"):
        parse(recipe.Config, ["--group_size", "1"])
    with pytest.raises(ValueError, match="logit_rows is -1"):
        parse(recipe.Config, ["--logit_rows", "-1"])


def test_the_settings_chosen_for_a_card_are_those_that_are_trained_with(recipe, model):
    config = parse(recipe.Config, [*small(model), "--gpu_gb", "0.75"])
    chosen, planned = recipe.plan_memory(config)
    assert part_of(chosen, Savings) == planned.update.savings != part_of(config, Savings)


@pytest.mark.parametrize("flags", [[], ["--gpu_gb", "24", "--batch_prompts", "2", "--group_size", "2"]])
def test_a_card_with_too_little_free_memory_is_refused_before_anything_is_loaded(
    recipe, model, flags, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "one without measurements")
    config = parse(recipe.Config, [*small(model), *flags, "--benchmarks", "toy"])
    needed = recipe.plan_memory(config)[1].larger.total - CONTEXT
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (needed - 1, 8 * GIB))
    with pytest.raises(
        ValueError,
        match=r"the plan needs .* of the card's 8.00 GiB are free; its largest owners are .*--gpu_gb",
    ):
        recipe.main(config)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (needed, 8 * GIB))
    monkeypatch.setattr(
        recipe.RunFolder,
        "open",
        lambda config, **_: (_ for _ in ()).throw(InterruptedError("training would begin")),
    )
    with pytest.raises(InterruptedError):
        recipe.main(config)


def qwen(size, folder, **others):
    """Write a fine-tuned model's config to a folder, as a sweep leaves it with the weights."""
    folder.mkdir()
    stored = json.loads((CONFIGS / f"Qwen--Qwen2.5-{size}-Instruct.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | others))
    return str(folder)


@pytest.mark.parametrize(("size", "levels"), [("0.5B", "1-4"), ("1.5B", "3-5"), ("3B", "3-5")])
def test_the_default_prompts_are_the_levels_that_the_paper_gave_a_model_of_this_size(
    size, levels, recipe, tmp_path, capsys
):
    assert recipe.Config().prompts == recipe.Config().levels == ""
    adapters = tmp_path / "adapters"  # trained by the sweep on this base
    adapters.mkdir()
    base = f"Qwen/Qwen2.5-{size}-Instruct"
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    for name in (base, qwen(size, tmp_path / "tuned"), str(adapters)):
        found = recipe.default_prompts(recipe.Config(model=name))
        assert found == f"hkust-nlp/SimpleRL-Zoo-Data:simplelr_qwen_level{levels.replace('-', 'to')}"
        assert f"MATH levels {levels}: the model has {size[0]}" in capsys.readouterr().out


def test_a_model_just_above_half_a_billion_weights_is_a_larger_one(recipe, tmp_path):
    larger = qwen("0.5B", tmp_path / "larger", num_hidden_layers=25)
    assert recipe.default_prompts(recipe.Config(model=larger)).endswith("level3to5")


def test_the_levels_asked_for_are_those_of_the_default_prompts_or_refused_with_what_there_is(
    recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(recipe.paper, "SIMPLERL", str(tmp_path / "zoo"))
    for levels in ("1to4", "3to5"):
        folder = tmp_path / "zoo" / f"simplelr_qwen_level{levels}"
        folder.mkdir(parents=True)
        row = {"problem": levels, "answer": 1, "level": 4}
        (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "zoo" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")

    run = RunFolder(tmp_path / "run", is_new=True)
    run.path.mkdir()

    def problems(**settings):
        config = recipe.Config(model="tiny", **settings)
        chosen = replace(config, prompts=recipe.default_prompts(config))
        return [question.problem for question in recipe.read_questions(chosen, run)]

    assert problems() == problems(levels="1-4") == ["1to4"] and problems(levels="3-5") == ["3to5"]
    assert "MATH levels 3-5: as asked for" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"'simplelr_qwen_level2to3'; .* simplelr_qwen_level1to4, simplelr_"):
        problems(levels="2-3")


def test_the_plan_counts_the_text_of_the_groups_that_are_logged_and_no_other(recipe, model, tmp_path):
    written = tmp_path / "plan.json"
    flags = ["--steps", "3", "--batch_prompts", "16", "--group_size", "2", "--response_tokens", "50"]
    recipe.main(parse(recipe.Config, ["--plan", *small(model), *flags, f"--json={written}"]))
    estimate = json.loads(written.read_text())["estimate"]
    assert estimate["work"]["num_samples"] == 3 * 16 * 2
    assert estimate["disk"]["samples"] == 3 * 2 * 50 * TEXT_BYTES
