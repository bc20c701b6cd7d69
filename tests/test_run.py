import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from children import ROOT

from kit.command import clean_up_if_refused
from kit.config import parse
from kit.disk import scratch_beside
from kit.lock import LOCK, held, release, share
from kit.run import RunFolder, make_next_folder, recipe_name


@dataclass(frozen=True)
class Config:
    lr: float = 1.0
    num_slots: int = 16
    seeds: int = 1
    sizes: str = "16,64"
    arms: str = "long"
    resume: bool = False
    out: str = ""


pytestmark = pytest.mark.usefixtures("fresh_directory")


def test_runs_are_numbered_under_the_recipes_name_and_resume_takes_the_newest():
    assert recipe_name(Config) == "test_run"
    for number in ("001", "002", "003"):
        assert str(RunFolder.open(Config()).path) == f"runs/test_run/{number}"
    for begun in ("001", "002"):
        (Path("runs/test_run") / begun / "metrics.jsonl").touch()
    assert str(RunFolder.open(Config(resume=True)).path) == "runs/test_run/002"  # 003 has not begun
    assert str(make_next_folder(Path("runs/test_run"))) == "runs/test_run/004"


def test_the_tenth_hundred_of_runs_comes_after_the_ninth():
    for number in ("998", "999", "1000"):
        (Path("runs/test_run") / number).mkdir(parents=True)
    assert str(make_next_folder(Path("runs/test_run"))) == "runs/test_run/1001"


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


@pytest.mark.parametrize("out", ["notes.txt", "notes.txt/mine", ""])
def test_a_file_in_the_way_of_a_run_folder_is_named_with_what_to_pass(out):
    Path("notes.txt").touch()
    Path("runs").touch()
    with pytest.raises(
        ValueError, match=rf"{out or 'runs.test_run'} cannot be a run folder \(.*pass an --out"
    ):
        RunFolder.open(Config(out=out))


def test_a_run_that_may_be_shared_goes_on_with_the_same_settings_and_grows_while_nobody_shares_it():
    run = RunFolder.open(Config(out="here"), join=True)
    run.unlock()
    again = RunFolder.open(Config(out="here", num_slots=4), join=True)  # without resume
    assert run.is_new and not again.is_new
    with pytest.raises(ValueError, match=r"other settings: lr was 1.0, is 2.0; pass the same"):
        RunFolder.open(Config(2.0, out="here"), join=True)

    grown = Config(seeds=2, resume=True, out="here")
    with pytest.raises(ValueError, match="seeds was 1, is 2"):  # resume has to say so
        RunFolder.open(replace(grown, resume=False), may_grow=["seeds"], join=True)
    RunFolder.open(grown, may_grow=["seeds"], join=True)
    share(run.path)
    with pytest.raises(ValueError, match="seeds was 2, is 3; wait until the others there end"):
        RunFolder.open(replace(grown, seeds=3), may_grow=["seeds"], join=True)
    scratch = scratch_beside(run.path / "report.html")  # of another process
    scratch.touch()
    RunFolder.open(replace(grown, num_slots=8), join=True)
    assert scratch.exists() and json.loads(Path("here/config.json").read_text())["num_slots"] == 16


@pytest.mark.parametrize("name", ["model", "checkpoints", "metrics.jsonl"])
def test_what_a_run_has_left_without_its_settings_is_not_taken_for_a_new_one(name):
    run = RunFolder.open(Config(out="here"))
    (run.path / name).mkdir()
    (run.path / "config.json").unlink()
    with pytest.raises(ValueError, match=f"here holds {name} but no config.json.* pass another --out"):
        RunFolder.open(Config(out="here"))
    assert not (run.path / "config.json").exists()


def test_a_run_is_not_resumed_with_other_settings():
    RunFolder.open(Config(out="here"))
    with pytest.raises(ValueError, match=r"lr was 1.0, is 2.0"):
        RunFolder.open(replace(Config(lr=2.0), out="here", resume=True))


def test_what_is_asked_during_training_stays_the_same():
    @dataclass(frozen=True)
    class Watched(Config):
        eval_every: int = 2
        eval_questions: int = 50

    RunFolder.open(Watched(out="here"))
    RunFolder.open(Watched(out="here", eval_every=4, resume=True))
    with pytest.raises(ValueError, match=r"eval_questions was 50, is 10"):
        RunFolder.open(Watched(out="here", eval_questions=10, resume=True))


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


OPEN = """
import json, sys
from dataclasses import dataclass
from kit.run import RunFolder

@dataclass(frozen=True)
class Config:
    resume: bool = False
    out: str = ""

print("ready", flush=True)
sys.stdin.readline()  # until all are ready
try:
    times, *settings = json.loads(sys.argv[1])
    print(*[RunFolder.open(Config(*settings)).path for _ in range(times)], flush=True)
except ValueError as error:
    print(error, flush=True)
sys.stdin.read()
"""


def open_at_once(count, *settings, times=1):
    """Open run folders in several processes at once. Return what each printed, by pid."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OPEN, json.dumps([times, *settings])]
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(count)]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    found = {process.pid: process.stdout.readline().strip() for process in processes}
    for process in processes:
        process.kill()
        process.communicate()
    return found


def test_runs_that_start_at_the_same_moment_get_a_number_each():
    found = open_at_once(4, times=25)
    assert sorted(" ".join(found.values()).split()) == [f"runs/notebook/{i:03}" for i in range(1, 101)]


@pytest.mark.parametrize("resume", [False, True])
def test_of_several_runs_in_one_folder_one_goes_on_and_the_others_name_it(resume):
    if resume:
        RunFolder.open(Config(out="here"))
        (Path("here") / "config.json").write_text("{}")
        release(Path("here"))
    found = open_at_once(4, resume, "here")
    (winner,) = [pid for pid, said in found.items() if said == "here"]
    others = [said for pid, said in found.items() if pid != winner]
    assert [f"here is in use by process {winner} on " in said for said in others] == [True] * 3
    again = open_at_once(1, True, "here")  # its death has set the folder free
    assert [*again.values()] == ["here"]


def test_a_start_that_is_refused_gives_the_folder_back():
    RunFolder.open(Config(out="here"))
    release(Path("here"))
    with pytest.raises(ValueError, match="already holds a run"):
        RunFolder.open(Config(out="here"))
    with pytest.raises(ValueError, match=r"lr was 1.0, is 2.0"):
        RunFolder.open(Config(lr=2.0, out="here", resume=True))
    assert [path.name for path in Path("here").iterdir()] == ["config.json"]


@pytest.mark.parametrize("content", ["", '{"lr": 1', "[1]", "\0\0"])
def test_a_damaged_config_is_named(content):
    RunFolder.open(Config(out="here"))
    (Path("here") / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"here/config\.json (is damaged|holds a list).*restore it"):
        RunFolder.open(Config(out="here", resume=True))


def test_what_a_kill_has_left_half_written_goes_when_the_run_is_opened_again():
    run = RunFolder.open(Config(out="here"))
    (run.path / "checkpoints").mkdir()
    for path in (run.path / "config.json", run.path / "checkpoints" / "step_0000001"):
        scratch_beside(path).mkdir()
    RunFolder.open(Config(out="here", resume=True))
    assert sorted(path.name for path in run.path.rglob("*")) == [LOCK, "checkpoints", "config.json"]


def test_when_a_recipes_main_ends_its_folder_is_unlocked_unless_the_process_held_it_before(tmp_path):
    @clean_up_if_refused
    def main(config):
        run = RunFolder.open(config)
        assert (run.path / ".lock").exists()

    main(Config(out=str(tmp_path / "run")))
    assert not (tmp_path / "run" / ".lock").exists()
    with held(tmp_path / "other"):
        main(Config(out=str(tmp_path / "other")))
        assert (tmp_path / "other" / ".lock").exists()
