"""`python -m kit.report RUN` writes the report that belongs to the run, whatever kind it is."""

import json

import pytest
from sample_rows import outcome

from kit.command import guard
from kit.report.__main__ import main, write_report
from kit.run import Journal
from kit.valley.finished import write_study
from kit.valley.study import Study


def begun(path, **config):
    """Write the folder of a run that has measured nothing yet."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model": "tiny", **config}))
    return path


def test_a_study_gets_a_studys_report(tmp_path):
    study = Study(models=(("tiny", ("full",)),), sizes=(8_000, 16_000))
    write_study(begun(tmp_path / "study", group_size=8), study.cells(), [])
    assert "0 of 2 cells are done" in write_report(tmp_path / "study").read_text()


def test_reinforcement_learning_gets_its_own_report_even_before_its_first_step(tmp_path):
    page = write_report(begun(tmp_path / "rl", group_size=8)).read_text()
    assert "tiny, reinforcement learning" in page and "No step is finished yet." in page


def test_fine_tuning_and_evaluation_get_theirs(tmp_path):
    run = begun(tmp_path / "run")
    Journal(run / "metrics.jsonl").append({"step": 1, "loss": 2.5, "tokens": 10, "seconds": 1.0})
    page = write_report(run).read_text()
    assert "before and after long chains of thought" in page and "loss 2.500 at the first step" in page


def test_a_folder_without_a_run_is_one_line_and_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        guard(main, [str(tmp_path)])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("error: ") and "pass a run folder" in said and said.count("\n") == 1


STEP = {"step": 1, "loss": 2.5, "tokens": 10, "seconds": 1.0, "reward_mean": 0.5}
STEP |= {"length": 9.0, "rollout_seconds": 1.0, "update_seconds": 1.0}
ROLLOUT = {"step": 1, "sample": 0, "question": "q", "reward": 1.0, "tokens": 3, "finished": True, "text": "5"}


def kinds_of_runs(folder):
    fine_tuning, learning, study = (begun(folder / name) for name in ("tuning", "rl", "study"))
    (learning / "config.json").write_text('{"group_size": 8}')
    cell, *_ = Study(models=(("tiny", ("full",)),), sizes=(8_000,)).cells()
    write_study(study, [cell], [])
    done = outcome(cell.name)
    return [
        (fine_tuning, "metrics.jsonl", STEP, ("step", "loss", "tokens", "seconds")),
        (learning, "metrics.jsonl", STEP, ("step", "reward_mean", "rollout_seconds", "update_seconds")),
        (learning, "rollouts.jsonl", ROLLOUT, ("step", "reward", "tokens", "finished", "text")),
        (study, "jobs.jsonl", done, ("job", "status", "seconds", "error", "tail", "log")),
        (study / "cells" / cell.name, "metrics.jsonl", STEP, ("step", "seconds")),
    ]


@pytest.mark.slow
def test_a_row_without_a_field_that_a_report_needs_is_named_in_every_log(tmp_path):
    for run, name, row, fields in kinds_of_runs(tmp_path):
        run.mkdir(parents=True, exist_ok=True)
        for field in fields:
            (run / name).write_text(json.dumps({key: row[key] for key in row if key != field}) + "\n")
            folder = tmp_path / run.relative_to(tmp_path).parts[0]
            message = rf"{name}:1 is not an? \w+: it has no `{field}`; delete that line"
            with pytest.raises(ValueError, match=message):
                write_report(folder)
        (run / name).write_text(json.dumps(row) + "\n")
        write_report(folder)


def test_the_steps_of_two_trainings_in_one_log_are_counted_once_and_named(tmp_path, capsys):
    run = begun(tmp_path / "run")
    for _ in range(2):
        Journal(run / "metrics.jsonl").append(STEP)
    assert "1 steps, 10 tokens" in write_report(run).read_text()
    assert "metrics.jsonl: 1 of its rows (the first: line 2) have the step of" in capsys.readouterr().err
