import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kit.run import RunFolder, recipe_name


@dataclass(frozen=True)
class Config:
    lr: float = 1.0
    num_slots: int = 16
    seeds: int = 1
    sizes: str = "16,64"
    arms: str = "long"
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
    assert json.loads((run.path / "config.json").read_text()) == {
        "lr": 1.0, "num_slots": 16, "seeds": 1, "sizes": "16,64", "arms": "long",
    }  # fmt: skip


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
    assert RunFolder.open(Config(num_slots=8, out="here", resume=True), may_grow=("sizes",)).path == run.path
    assert json.loads((run.path / "config.json").read_text())["num_slots"] == 16  # what it was started with


@pytest.mark.parametrize("out", ["", "nowhere"])
def test_resuming_nothing_says_so(out):
    with pytest.raises(ValueError, match="holds no run; drop --resume"):
        RunFolder.open(Config(resume=True, out=out))


GROWS = "seeds", "sizes", "arms"


def test_a_resumed_run_may_have_more_of_what_may_grow_and_keeps_it():
    RunFolder.open(Config(out="here"))
    more = Config(out="here", resume=True, seeds=3, sizes="4,16,64,256", arms="long,short")
    with pytest.raises(
        ValueError,
        match="arms was 'long', is 'long,short'; seeds was 1, is 3; sizes was '16,64', is '4,16,64,256'",
    ):
        RunFolder.open(more)
    RunFolder.open(more, may_grow=GROWS)
    assert json.loads((Path("here") / "config.json").read_text())["sizes"] == "4,16,64,256"
    RunFolder.open(more)


@pytest.mark.parametrize(
    "less", [{"seeds": 0}, {"sizes": "16"}, {"sizes": "16,65"}, {"arms": "short,long"}, {"lr": 2.0}], ids=str
)
def test_what_may_grow_does_not_shrink_and_keeps_its_first_names(less):
    RunFolder.open(Config(out="here"))
    before = (Path("here") / "config.json").read_text()
    with pytest.raises(ValueError, match="other settings"):
        RunFolder.open(replace(Config(out="here", resume=True), **less), may_grow=GROWS)
    assert (Path("here") / "config.json").read_text() == before
