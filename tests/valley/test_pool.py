"""Runs of a class are pooled: one study whose curves go over everybody's seeds."""

import json

import pytest
from children import run_recipe
from test_finished import make_study

from kit.command import guard
from kit.report.__main__ import main
from kit.run import read_json
from kit.valley.finished import StudyResults
from kit.valley.pool import pool
from kit.valley.study import Study

LEVELS = {("full", "long"): (0.2, 0.6)}


def students_run(path, seed, *, level=0.5, **settings):
    study = Study(models=(("tiny", ("full",)),), sizes=(16, 64), first_seed=seed)
    make_study(path, study, LEVELS, base=level)
    (path / "config.json").write_text(json.dumps({"seed": seed, "seeds": 1, "sizes": "16,64", **settings}))
    for name in ("model", "checkpoints"):
        (path / "cells" / f"tiny-full-16-seed{seed}" / name).mkdir()
    return path


def test_a_class_is_one_study_with_everybodys_seed_and_their_samples(tmp_path):
    runs = [students_run(tmp_path / f"student{seed}", seed) for seed in (3, 11, 4)]
    pool(runs, tmp_path / "class")
    together = StudyResults.read(tmp_path / "class")
    assert sorted({found.cell.seed for found in together.finished}) == [3, 4, 11]
    (curve,) = together.curves("tiny")
    assert [sorted(point.shares) for point in (curve.base, *curve.points)] == [[3, 4, 11]] * 3
    for run in runs:
        for found in StudyResults.read(run).finished:
            assert found in together.finished
    assert read_json(tmp_path / "class" / "config.json") == {"seed": 3, "seeds": 3, "sizes": "16,64"}


def test_models_and_checkpoints_stay_where_they_are(tmp_path):
    pool([students_run(tmp_path / f"student{seed}", seed) for seed in (0, 1)], tmp_path / "class")
    assert {path.name for path in (tmp_path / "class" / "cells" / "tiny-full-16-seed0").iterdir()} == {
        "after",
        "metrics.jsonl",
    }


def test_the_command_writes_the_report_of_the_class(tmp_path, capsys):
    runs = [str(students_run(tmp_path / f"student{seed}", seed)) for seed in (0, 1)]
    guard(main, ["--pool", str(tmp_path / "class"), *runs])
    page = (tmp_path / "class" / "report.html").read_text()
    assert "4 of 4 cells are done" in page and "intervals over questions and seeds" in page
    assert capsys.readouterr().out == f"{tmp_path / 'class' / 'report.html'}\n"


def refusal(folder, *runs):
    with pytest.raises(ValueError) as refused:
        pool(runs, folder)
    return str(refused.value)


def test_two_students_with_one_seed_are_refused(tmp_path):
    runs = [students_run(tmp_path / name, 5) for name in ("ada", "bob")]
    said = refusal(tmp_path / "class", *runs)
    assert str(runs[0]) in said and str(runs[1]) in said and "both have seed 5" in said
    assert not (tmp_path / "class").exists()


def test_runs_with_other_settings_are_refused_with_both_values(tmp_path):
    runs = students_run(tmp_path / "ada", 0), students_run(tmp_path / "bob", 1, lr=0.5)
    said = refusal(tmp_path / "class", *runs)
    assert "lr None and 0.5" in said and "seeds" not in said


def test_a_folder_that_holds_something_is_refused(tmp_path):
    run = students_run(tmp_path / "ada", 0)
    assert "is not empty" in refusal(run, run)


def test_several_runs_without_a_folder_for_them_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        guard(main, [str(students_run(tmp_path / f"student{seed}", seed)) for seed in (0, 1)])
    assert "--pool FOLDER" in capsys.readouterr().err


@pytest.mark.slow
def test_two_demos_of_other_seeds_draw_other_traces_and_pool(tmp_path):
    flags = "--models tinier --arms long --sizes 4 --seeds 1 --num_questions 3 --num_samples 1 --epochs 1"
    for seed in ("3", "8"):
        words = [*flags.split(), "--max_new_tokens", "16", "--seed", seed, "--out", str(tmp_path / seed)]
        run_recipe("valley_demo", *words, cwd=tmp_path)
    traces = [(tmp_path / seed / "data" / f"traces-seed{seed}.jsonl").read_text() for seed in ("3", "8")]
    assert traces[0] != traces[1]
    pool([tmp_path / "3", tmp_path / "8"], tmp_path / "class")
    found = StudyResults.read(tmp_path / "class")
    assert [done.cell.seed for done in found.finished] == [3, 8, 3, 8]
    (curve,) = found.curves("tinier")
    assert sorted(curve.points[0].shares) == [3, 8]
