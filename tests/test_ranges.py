"""Every setting says what it may be, and no Config with anything else can be made."""

import importlib
import importlib.util
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import children
import pytest
from children import ROOT

from kit.config import Checked, flags_of, parse
from kit.data.responses import VERIFY
from kit.generate.sampling import SamplingParams
from kit.memory.settings import TrainingPlanSettings
from kit.models.attention import CHOICES
from kit.ranges import Range
from kit.rl.settings import Settings
from kit.run import RunFolder
from kit.train.optimizer import OPTIMIZERS
from kit.train.savings import Savings
from kit.valley.runs import LOWEST, MOST
from kit.valley.study import ARMS

RECIPES = {path.stem: importlib.import_module(f"kit.recipes.{path.stem}") for path in children.RECIPES}
CONFIGS = {name: recipe.Config for name, recipe in RECIPES.items()} | {
    kind.__name__: kind for kind in (Savings, Settings, TrainingPlanSettings, SamplingParams)
}
# texts that are no choice: what they name is looked up where they are used
FREE = {
    "model", "models", "chat_template", "instruction", "traces", "short_traces", "columns", "cache_dir",
    "benchmarks", "baseline", "out",
    "json", "card", "compare", "prompts", "levels", "rl_flags", "reward", "as_", "kernel", "problems",
    "question", "beside", "titles", "gold", "benchmark", "server",
}  # fmt: skip


def numbers_of(name: str) -> list:
    return [flag for flag in flags_of(CONFIGS[name]) if flag.kind in (int, float)]


def without_range(kind: type) -> list[str]:
    flags = [flag for flag in flags_of(kind) if flag.kind is not bool and flag.name not in FREE]
    return [flag.name for flag in flags if flag.range is None]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_and_every_choice_says_what_it_may_be(name):
    assert without_range(CONFIGS[name]) == [] and issubclass(CONFIGS[name], Checked)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed (macOS)")
def test_every_number_and_every_choice_of_the_benches_says_what_it_may_be(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "bench"))
    for path in sorted((ROOT / "recipes" / "bench").glob("*.py")):
        if "class Config" in path.read_text():
            bench = importlib.import_module(path.stem)
            assert without_range(bench.Config) == [] and issubclass(bench.Config, Checked), path.name
            bench.Config(**getattr(bench, "SMOKE", {}))


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_sets_by_itself_is_allowed(name):
    recipe = RECIPES[name]
    recipe.Config()
    for settings in ("SMOKE", "QUICK"):
        recipe.Config(**getattr(recipe, settings, {}))
    for settings in getattr(recipe, "PRESETS", {}).values():
        recipe.Config(**settings)


def test_the_words_of_a_choice_are_those_that_the_code_behind_it_knows():
    known = {
        "attention": CHOICES,
        "optimizer": OPTIMIZERS,
        "verify": [word for word in VERIFY if isinstance(word, str)],
        "arms": ARMS,
        "only": RECIPES["check_card"].SECTIONS,
        "rl_sizes": (LOWEST, MOST),
    }
    for name, kind in CONFIGS.items():
        presets = getattr(RECIPES.get(name), "PRESETS", ())
        for flag in flags_of(kind):
            wanted = presets if flag.name == "preset" else known.get(flag.name)
            if wanted:
                assert sorted(flag.range.words) == sorted(wanted), (name, flag.name)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_number_below_its_range_or_not_finite_is_refused_as_a_flag_and_in_python(name):
    for flag in numbers_of(name):
        for value in (-1, *(map(float, ("nan", "inf", "-inf")) if flag.kind is float else ())):
            said = rf"^{flag.name} is {re.escape(str(flag.kind(value)))} but must be "
            with pytest.raises(ValueError, match=said):
                parse(CONFIGS[name], [f"{flag.word}={value}"])
            with pytest.raises(ValueError, match=said):
                CONFIGS[name](**{flag.name: flag.kind(value)})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_value_of_another_type_is_refused_in_python(name):
    for flag in numbers_of(name):
        for value in ("1", None, True, *((1.5,) if flag.kind is int else ())):
            with pytest.raises(ValueError, match=rf"^{flag.name} is {value!r} but must be a (whole )?number"):
                CONFIGS[name](**{flag.name: value})


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ("gemma3_1b_8k", "--temperature 1e-320", r"is 1e-320 but must be 0 or in 0\.001\.\.1000 "),
        ("gemma3_1b_8k", "--temperature 1e300", r"temperature is 1e\+300 but must be "),
        ("gemma3_1b_8k", "--warmup_ratio 5", r"but must be in 0\.\.1 \(share of the steps; 0 = none\)$"),
        ("gemma3_1b_8k", "--lr 5", r"lr is 5\.0 but must be > 0 and <= 1 \(peak learning rate\)$"),
        ("gemma3_1b_8k", "--lr 0", r"lr is 0\.0 but must be > 0 and <= 1"),
        ("gemma3_1b_8k", "--beta2 1", r"beta2 is 1\.0 but must be >= 0 and < 1"),
        ("gemma3_1b_8k", "--optimizer adam8bit", "must be auto, adamw or adamw8bit; did you mean adamw8bit"),
        ("gemma3_1b_8k", "--device=", "device is '' but must be cuda or cpu"),
        ("gemma3_1b_8k", "--preset evning", "but must be paper or evening; did you mean evening"),
        ("gemma3_1b_8k", "--gpu_gb -12", "gpu_gb is '-12' but must be auto or a number in "),
        ("gemma3_1b_8k", "--gpu_gb nan", "gpu_gb is 'nan' but must be auto or a number in "),
        ("grpo_qwen2_5_0_5b", "--normaliser token", "must be tokens or sequences; did you mean tokens"),
        ("grpo_qwen2_5_0_5b", "--steps 0", "steps is 0 but must be >= 1 .rollouts; "),
        ("grpo_qwen2_5_0_5b", "--clip_low 1.5", r"clip_low is 1\.5 but must be in 0\.\.1"),
        ("valley_sweep", "--sizes 99999999999", r"'99999999999' but must be a whole number in 1\.\.10000000"),
        ("valley_sweep", "--sizes 8000,16e3", "'8000,16e3' but '16e3' in it must be a whole number in "),
        ("valley_sweep", "--rl_sizes 0,lowst", "must be lowest, most or .*; did you mean lowest"),
        ("valley_sweep", "--gpus 0,-1", "'-1' in it must be a whole number in "),
        ("valley_demo", "--sizes ,", "sizes is ',' but must be a whole number in "),
        ("valley_demo", "--arms long,shrt", "'shrt' in it must be long, .* or fixed; did you mean short"),
        ("valley_demo", "--num_samples 0", r"num_samples is 0 but must be in 1\.\.10000"),
        ("check_card", "--only speed,truht", "'truht' in it must be truth, .*; did you mean truth"),
        ("train_tiny_base", "--batch_traces 0", "batch_traces is 0 but must be >= 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_and_what_would_be_right_are_one_line(recipe, flags, message):
    module = RECIPES[recipe]
    with pytest.raises(ValueError, match=message) as refused:
        parse(module.Config, flags.split(" "), presets=getattr(module, "PRESETS", None))
    assert "\n" not in str(refused.value)


@dataclass(frozen=True)
class Config(Checked):
    lr: float = 1.0  # peak [> 0, <= 1]
    seeds: int = 1  # of packs [1..5]
    sizes: str = "16,64"  # [1..100, ...]
    arm: str = ""  # [long | short]
    share: float = 0.5
    quiet: bool = False
    resume: bool = False
    out: str = ""


ALLOWED = [
    {"lr": 1}, {"seeds": 1}, {"seeds": 5}, {"sizes": "1, 100,"}, {"arm": ""}, {"share": -9},
]  # fmt: skip
REFUSED = [
    {"lr": 0}, {"lr": 1.0001}, {"seeds": 0}, {"seeds": 6}, {"sizes": "1,101"}, {"sizes": "1.5"},
    {"sizes": ""}, {"arm": "Long"}, {"share": math.nan}, {"share": math.inf}, {"quiet": 1},
    {"out": Path("x")},
]  # fmt: skip


def test_the_ends_of_a_range_belong_to_it_unless_it_says_otherwise():
    for allowed in ALLOWED:
        Config(**allowed)
    for refused in REFUSED:
        said = f"^{next(iter(refused))} is .* but .*must be"
        with pytest.raises(ValueError, match=said):
            Config(**refused)
        with pytest.raises(ValueError, match=said):
            replace(Config(), **refused)


@pytest.mark.parametrize("text", ["> = 0", "1..", "0-1", "> 0 <= 1", "0..1 | > x", ""])
def test_brackets_that_cannot_be_read_are_a_mistake_of_the_recipe(text):
    with pytest.raises(TypeError, match="is not a range"):
        Range(text)


def test_what_a_run_stored_is_checked_when_it_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RunFolder.open(Config(out="here"))
    stored = json.loads(Path("here/config.json").read_text())
    for wrong, message in (
        ({"seeds": -1}, "seeds is -1 but must be in 1..5"),
        ({"lr": "1"}, "lr is '1' but"),
    ):
        Path("here/config.json").write_text(json.dumps(stored | wrong))
        with pytest.raises(ValueError, match=rf"^here cannot be resumed, since in its settings {message}"):
            parse(Config, ["--resume", "--out", "here"])


def test_help_shows_the_ranges(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # so that no line is wrapped
    for name in ("gemma3_1b_8k", "grpo_qwen2_5_0_5b"):
        with pytest.raises(SystemExit):
            parse(CONFIGS[name], ["--help", "all"])
        shown = capsys.readouterr().out
        assert [flag.name for flag in flags_of(CONFIGS[name]) if flag.text not in shown] == []


def test_a_class_without_source_keeps_the_ranges_of_the_class_that_it_extends():
    """As in an interpreter or a notebook."""
    program = (
        "from dataclasses import dataclass\nfrom kit.recipes import gemma3_1b_8k\n@dataclass(frozen=True)\n"
        "class Mine(gemma3_1b_8k.Config):\n  epochs: int = 2\n  extra: float = 1.0\n"
        "assert Mine().epochs == 2\nMine(epochs=0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ValueError: epochs is 0 but must be in 1..1000 (passes over the traces)" in done.stderr
