import json
from dataclasses import dataclass, replace

import pytest

from kit.run import RunFolder, recipe_name


@dataclass(frozen=True)
class Config:
    lr: float = 1.0
    num_slots: int = 16
    resume: bool = False
    out: str = ""


@pytest.fixture(autouse=True)
def _in_a_fresh_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_runs_are_numbered_under_the_recipes_name_and_resume_takes_the_newest():
    assert recipe_name(Config()) == "test_run"
    assert str(RunFolder.open(Config()).path) == "runs/test_run/001"
    assert str(RunFolder.open(Config()).path) == "runs/test_run/002"
    assert str(RunFolder.open(Config(resume=True)).path) == "runs/test_run/002"


def test_the_settings_are_written_without_what_may_change():
    run = RunFolder.open(Config(out="here"))
    assert json.loads((run.path / "config.json").read_text()) == {"lr": 1.0, "num_slots": 16}


def test_a_folder_that_holds_a_run_is_not_overwritten():
    RunFolder.open(Config(out="here"))
    with pytest.raises(ValueError, match="already holds a run; pass --resume"):
        RunFolder.open(Config(out="here"))


def test_a_run_is_not_resumed_with_other_settings():
    RunFolder.open(Config(out="here"))
    with pytest.raises(ValueError, match=r"lr was 1.0, is 2.0"):
        RunFolder.open(replace(Config(lr=2.0), out="here", resume=True))


def test_fewer_answers_at_once_are_the_same_run():
    run = RunFolder.open(Config(out="here"))
    assert RunFolder.open(Config(num_slots=8, out="here", resume=True)).path == run.path


@pytest.mark.parametrize("out", ["", "nowhere"])
def test_resuming_nothing_says_so(out):
    with pytest.raises(ValueError, match="holds no run; drop --resume"):
        RunFolder.open(Config(resume=True, out=out))
