import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kit.config import parse
from kit.run import RunFolder, next_folder, recipe_name


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
    assert recipe_name(Config) == "test_run"
    for number in ("001", "002", "003"):
        assert str(RunFolder.open(Config()).path) == f"runs/test_run/{number}"
    for begun in ("001", "002"):
        (Path("runs/test_run") / begun / "metrics.jsonl").touch()
    assert str(RunFolder.open(Config(resume=True)).path) == "runs/test_run/002"  # 003 has not begun
    assert str(next_folder(Path("runs/test_run"))) == "runs/test_run/004"


def test_the_tenth_hundred_of_runs_comes_after_the_ninth():
    for number in ("998", "999", "1000"):
        (Path("runs/test_run") / number).mkdir(parents=True)
    assert str(next_folder(Path("runs/test_run"))) == "runs/test_run/1001"


def test_resume_alone_takes_the_settings_of_the_run_and_flags_come_on_top():
    RunFolder.open(parse(Config, ["--lr", "3", "--arms", "long,short", "--out", "here"]))
    again = parse(Config, ["--resume", "--out", "here", "--num_slots", "4"])
    assert again == Config(3.0, 4, arms="long,short", resume=True, out="here")
    assert RunFolder.open(again).path == Path("here")


def test_bare_resume_takes_the_newest_run_that_has_begun_with_its_settings():
    for lr in ("3", "4", "5"):
        RunFolder.open(parse(Config, ["--lr", lr]))
    Path("runs/test_run/002/model").mkdir()
    assert parse(Config, ["--resume"]) == Config(4.0, resume=True, out="runs/test_run/002")


def test_a_start_that_is_refused_leaves_no_folder_and_one_that_has_begun_stays():
    run = RunFolder.open(Config())
    run.discard_if_new()
    assert not run.path.exists()
    run = RunFolder.open(Config())
    run.metrics.append({"step": 1})
    run.discard_if_new()
    assert (run.path / "config.json").is_file()


@pytest.mark.parametrize("names", [[], ["notes.txt", "prompts.jsonl"]], ids=str)
def test_a_folder_that_was_there_before_a_refused_start_stays_with_all_that_is_in_it(names):
    Path("mine").mkdir()
    for name in names:
        (Path("mine") / name).touch()
    RunFolder.open(Config(out="mine")).discard_if_new()
    assert sorted(path.name for path in Path("mine").iterdir()) == names


def test_what_a_refused_start_wrote_into_its_new_folder_goes_with_it():
    run = RunFolder.open(Config())
    (run.path / "data").mkdir()
    (run.path / "data" / "traces.jsonl").touch()
    run.discard_if_new()
    assert not run.path.exists()


def test_a_resumed_run_that_is_refused_keeps_its_settings():
    RunFolder.open(Config(out="here"))
    RunFolder.open(Config(out="here", resume=True)).discard_if_new()
    assert Path("here/config.json").is_file()


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
    assert json.loads((run.path / "config.json").read_text())["num_slots"] == 8  # for the next one


@pytest.mark.parametrize(
    ("out", "where"), [("", "no run under runs/test_run has begun"), ("nowhere", "nowhere holds no run")]
)
def test_resuming_nothing_says_so(out, where):
    with pytest.raises(ValueError, match=f"--resume was given but {where}; drop --resume"):
        RunFolder.open(Config(resume=True, out=out))
    with pytest.raises(ValueError, match=where):
        parse(Config, ["--resume", *(["--out", out] if out else [])])


def test_a_setting_that_came_after_the_run_is_at_its_default():
    run = RunFolder.open(Config(out="here"))
    (run.path / "config.json").write_text(json.dumps({"lr": 1.0, "num_slots": 16}))
    assert RunFolder.open(parse(Config, ["--resume", "--out", "here"])).path == run.path
    with pytest.raises(ValueError, match="seeds was 1, is 2"):
        RunFolder.open(parse(Config, ["--resume", "--out", "here", "--seeds", "2"]))


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
