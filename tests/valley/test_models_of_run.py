"""Which models a folder stands for."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from kit.valley.models_of_run import Found, models_of, settings_of_model, side_by_side
from kit.valley.study import Cell


def write(path, **value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_a_name_stands_for_itself_unless_it_is_a_runs_folder(tmp_path):
    write(tmp_path / "model" / "config.json", model_type="llama")
    for name in ("tiny", "google/gemma-3-1b-it", str(tmp_path / "model"), str(tmp_path)):
        assert models_of(name) == [Found(name, name)]
        assert settings_of_model(name) == {}


def test_a_fine_tuning_run_stands_for_both_sides(tmp_path):
    run = tmp_path / "001"
    write(run / "config.json", model="org/base", instruction="Think.", chat_template="plain")
    with pytest.raises(ValueError, match=r"001 has no model/ yet"):
        models_of(str(run))
    write(run / "model" / "config.json", model_type="llama")
    write(run / "drop_counts.json", kept=1_234)
    made = str(run / "model")
    before, after = models_of(
        str(run)
    )  # the base is asked as it was measured; a trained model has its template
    assert before == Found("org/base", "org/base, before", "Think.", "plain")
    assert after == Found(made, "base, after 1,234 traces", "Think.", "")
    assert models_of(made) == [Found(made, made, "Think.", "")]
    assert settings_of_model(made)["instruction"] == "Think."
    (run / "checkpoints" / "step_3").mkdir(parents=True)
    assert settings_of_model(str(run / "checkpoints" / "step_3"))["instruction"] == "Think."


def test_models_of_several_runs_are_told_apart_by_the_name_that_was_typed(tmp_path):
    runs = [str(tmp_path / name / "001") for name in "abc"]
    for run, instruction in zip(runs, ["Think.", "Think.", ""], strict=True):
        write(Path(run) / "config.json", model="org/base", instruction=instruction)
        write(Path(run) / "model" / "config.json", model_type="llama")
        write(Path(run) / "drop_counts.json", kept=24)
    a, b, c = runs
    found = side_by_side([a, b, a, "tiny"])  # one base, which both runs asked in the same way
    after = "base, after 24 traces"
    titles = ["org/base, before", f"{after} ({a})", f"{after} ({b})", "tiny"]
    assert [model.title for model in found] == titles
    assert [model.name for model in found] == ["org/base", f"{a}/model", f"{b}/model", "tiny"]
    before = [model for model in side_by_side([b, c]) if model.name == "org/base"]
    assert [(model.title, model.instruction) for model in before] == [
        (f"org/base, before ({b})", "Think."),
        (f"org/base, before ({c})", ""),
    ]
    assert side_by_side([a]) == models_of(a)


def test_a_study_stands_for_its_base_models_and_all_that_are_trained_with_the_first_seed(tmp_path):
    cells = [
        Cell("tiny", "full", size, seed, arm=arm)
        for seed in (2, 3)
        for size, arm in ((16, "long"), (64, "long"), (64, "short"))
    ]
    write(tmp_path / "study.json", cells=[asdict(cell) for cell in cells])
    write(tmp_path / "cells" / "tiny-full-0-seed2" / "config.json", model="tiny", instruction="Add.")
    for cell in cells:
        if cell.arm != "short":
            write(tmp_path / "cells" / cell.name / "model" / "config.json", model_type="llama")
    found = models_of(str(tmp_path))
    assert [model.title for model in found] == [
        "tiny, base model",
        "tiny, 16 long traces",
        "tiny, 64 long traces",
    ]
    assert found[0].instruction == "Add."
    assert [model.name for model in found][:2] == [
        "tiny",
        str(tmp_path / "cells" / "tiny-full-16-seed2" / "model"),
    ]
