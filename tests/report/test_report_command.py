"""`python -m kit.report RUN` writes the report that belongs to the run, whatever kind it is."""

import json

import pytest

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
