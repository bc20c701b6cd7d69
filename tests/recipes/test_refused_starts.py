"""A start that is refused late leaves nothing behind, and the corrected settings may have the same folder."""

import importlib
import json

import pytest
from transformers import AutoConfig

from kit.config import parse

FINE_TUNING = "--num_traces 8 --max_steps 1 --num_questions 1 --num_samples 1 --max_new_tokens 8"
GRPO = (
    "--steps 1 --batch_prompts 2 --minibatch_prompts 2 --group_size 2 --max_new_tokens 8 --eval_tokens 8 "
    "--num_questions 1 --num_samples 1"
)
NO_MODEL = ("--model=./absent", "model is ./absent but nothing is there")
BAD_QUESTIONS = ("--benchmarks=mine=bad.jsonl", "bad.jsonl:2")
TOO_LONG = ("--max_new_tokens=5000", "pass max_new_tokens <= ")
# recipe -> flags that are right, and (a flag that is not, what is said of it)
CASES = {
    "gemma3_1b_8k": (
        FINE_TUNING,
        NO_MODEL,
        BAD_QUESTIONS,
        TOO_LONG,  # is found when the header of the samples is written
        ("--traces=unusable.jsonl", "unusable.jsonl"),
        ("--chat_template=absent.jinja", "there is no such file"),
        ("--baseline=absent", "baseline is absent but no run is there"),
    ),
    "evaluate": ("--num_questions 1 --num_samples 1 --max_new_tokens 8", NO_MODEL, BAD_QUESTIONS, TOO_LONG),
    "grpo_qwen2_5_0_5b": (
        GRPO,
        NO_MODEL,
        BAD_QUESTIONS,
        ("--prompts=unusable.jsonl", "unusable.jsonl"),
        ("--max_new_tokens=5000", "row_tokens is "),
    ),
    "train_tiny_base": (
        "--num_traces 8 --num_problems 1 --num_long_traces 1 --num_layers 1",
        ("--hidden_size=97", "hidden_size is 97 but num_heads is 4"),
        ("--row_tokens=16", "row_tokens"),
        ("--batch_traces=0", "batch_traces is 0 but must be >= 1"),
    ),
    "valley_demo": (
        "--sizes 4 --arms long --num_questions 1 --num_samples 1 --epochs 1 --max_new_tokens 8",
        ("--models=tinny", "models is 'tinny' but there is no folder tinny; pass .* tiny, tinier"),
        ("--arms=long,long", "each once"),
    ),
    "valley_sweep": (
        "--sizes 4 --num_questions 1 --num_samples 1 --max_steps 1 --max_new_tokens 8",
        ("--models=tiny,./absent", "model is ./absent but nothing is there"),
        ("--rl_flags=--lr=-1", "lr is -1.0 but must be"),
        ('--rl_flags=--preset "', "rl_flags"),
        BAD_QUESTIONS,
    ),
}


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("gemma3_1b_8k", ["--traces=absent.jsonl"]),
        ("gemma3_1b_8k", ["--short_traces=absent.jsonl", "--long_share=0.5"]),
        ("grpo_qwen2_5_0_5b", ["--prompts=absent.jsonl"]),
        ("valley_sweep", ["--traces=absent.jsonl"]),
        ("valley_sweep", ["--short_traces=absent.jsonl", "--arms=mixed"]),
    ],
)
def test_a_file_to_learn_from_that_is_missing_is_named_before_benchmarks_are_fetched(name, flags):
    recipe = importlib.import_module(f"kit.recipes.{name}")
    flags = ["--smoke", *flags, "--benchmarks=math500=nowhere.jsonl"]
    with pytest.raises(ValueError, match=r"no file absent\.jsonl here"):
        recipe.main(parse(recipe.Config, flags, smoke=recipe.SMOKE))


@pytest.mark.parametrize("plan", [[], ["--plan"]], ids=["run", "plan"])
@pytest.mark.parametrize("name", ["gemma3_1b_8k", "grpo_qwen2_5_0_5b"])
def test_tiles_of_layers_that_transformers_computes_are_refused_before_anything_is_loaded(
    name, plan, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    AutoConfig.for_model("olmo2").save_pretrained(tmp_path / "model")  # without weights and tokenizer
    recipe = importlib.import_module(f"kit.recipes.{name}")
    flags = ["--smoke", "--model=model", "--recompute", "--tile_tokens=64", "--out=run", *plan]
    with pytest.raises(ValueError, match=r"tile_tokens is 64 but transformers .* a olmo2 model"):
        recipe.main(parse(recipe.Config, flags, smoke=recipe.SMOKE))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_corrected_settings_run_in_the_folder_that_a_refused_start_was_given(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unusable.jsonl").write_text('{"problem": "1+1", "trace": "no box"}\n')
    (tmp_path / "bad.jsonl").write_text('{"problem": "1+1", "answer": 2}\n{"problem": "1+2"}\n')
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    recipe = importlib.import_module(f"kit.recipes.{name}")
    right, *refusals = CASES[name]

    def main(*flags: str) -> None:
        presets = getattr(recipe, "PRESETS", None)
        recipe.main(
            parse(recipe.Config, ["--smoke", *right.split(), *flags], smoke=recipe.SMOKE, presets=presets)
        )

    for flag, said in refusals:
        for out in ("new", "mine"):
            with pytest.raises(ValueError, match=said):
                main(f"--out={out}", flag)
            left = sorted(path.name for path in tmp_path.glob(f"{out}/*"))
            assert left == (["notes.txt"] if out == "mine" else []), flag
    main("--out=mine")
    assert (tmp_path / "mine" / "notes.txt").is_file()
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["smoke"] is True


@pytest.mark.parametrize("name", ["qwen2_5_0_5b_8k", "llama3_2_1b_8k"])
def test_the_same_experiment_on_another_model_has_the_same_main(name):
    assert importlib.import_module(f"kit.recipes.{name}").main.__module__ == "kit.recipes.gemma3_1b_8k"
