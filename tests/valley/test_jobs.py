"""Real processes of small recipes: what fails is told, the rest goes on, what is killed resumes, no process outlives a sweep."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kit.valley.jobs import DONE, FAILED, TAIL, Job, places, read_outcomes, reason, run_jobs

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
import os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True)
class Config:
    text: str = ""  # anything
    wait_for: str = ""  # a file; "" = nothing
    fail: str = ""  # message, signal or exit
    switch: bool = True  # a switch
    smoke: bool = False  # nothing
    resume: bool = False  # go on
    out: str = ""  # folder

SMOKE = {}

def main(config):
    out = Path(config.out)
    (out / "config.json").write_text("{}")
    with (out.parent / "starts").open("a") as file:
        file.write(f"{out.name} {config.resume} {config.switch} {config.text!r} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
    for i in range(30):
        print(f"line {i}", flush=True)
    while config.wait_for and not Path(config.wait_for).exists():
        (out / "alive").write_text(str(time.time()))
        time.sleep(0.01)
    if config.fail == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    if config.fail == "exit":
        raise SystemExit("no GPU is here.\\nTwo ways out")
    if config.fail and not config.resume:
        raise ValueError(config.fail)
"""


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "small_recipe.py"
    file.write_text(RECIPE)
    return file


def job(recipe, name, *, needs=(), problem="", **settings):
    return Job(name, recipe, settings, recipe.parent / "runs" / name, tuple(needs), problem=problem)


def run(jobs, path, slots=({},)):
    return {outcome.job: outcome for outcome in run_jobs(jobs, path, slots)}


def starts(recipe):
    return (recipe.parent / "runs" / "starts").read_text().splitlines()


def test_a_failure_is_told_with_its_reason_and_the_end_of_its_log_and_the_others_go_on(recipe, tmp_path):
    jobs = [
        job(recipe, "bad", fail="rows are\nlonger than 7"), job(recipe, "killed", fail="signal"),
        job(recipe, "left", fail="exit"), job(recipe, "needs-bad", needs=["bad"]),
        job(recipe, "too-large", problem="it needs 99 GiB"), job(recipe, "good", switch=False, text="--odd= name"),
    ]  # fmt: skip
    found = run(jobs, tmp_path)
    assert {name: outcome.status for name, outcome in found.items()} == {
        "bad": FAILED, "killed": FAILED, "left": FAILED, "needs-bad": FAILED, "too-large": FAILED, "good": DONE,
    }  # fmt: skip
    assert found["bad"].error == "ValueError: rows are longer than 7"
    assert len(found["bad"].tail) == TAIL and found["bad"].tail[-1] == "longer than 7"
    assert found["killed"].error.startswith("ended by SIGKILL")
    assert found["left"].error.endswith("no GPU is here. Two ways out")
    assert found["needs-bad"].error == "not started: it needs bad, which failed"
    assert found["too-large"].error == "not started: it needs 99 GiB"
    assert Path(found["good"].log).read_text().count("line") == 30
    assert [line.split()[0] for line in starts(recipe)] == ["bad", "killed", "left", "good"]
    assert "False '--odd= name'" in starts(recipe)[-1]  # settings arrive whatever they hold
    assert read_outcomes(tmp_path) == found


def test_a_resumed_sweep_starts_only_what_is_not_done_and_what_needs_it(recipe, tmp_path):
    jobs = [job(recipe, "good"), job(recipe, "bad", fail="once"), job(recipe, "after", needs=["bad"])]
    assert run(jobs, tmp_path)["after"].status == FAILED
    again = run(jobs, tmp_path)
    assert {name: outcome.status for name, outcome in again.items()} == {"bad": DONE, "after": DONE}
    assert [line.split()[:2] for line in starts(recipe)] == [
        ["good", "False"], ["bad", "False"], ["bad", "True"], ["after", "False"],
    ]  # fmt: skip
    assert {outcome.status for outcome in read_outcomes(tmp_path).values()} == {DONE}
    assert run(jobs, tmp_path) == {}


def test_as_many_run_at_once_as_there_are_places_each_on_its_own_card(recipe, tmp_path):
    runs = tmp_path / "runs"
    jobs = [
        job(recipe, "a", wait_for=str(runs / "b" / "config.json")), job(recipe, "b", wait_for=str(runs / "a" / "config.json")),
        job(recipe, "c", needs=["a", "b"]),
    ]  # fmt: skip
    assert {outcome.status for outcome in run(jobs, tmp_path, places("cuda", "0, 3", 1)).values()} == {DONE}
    assert {line.split()[-1] for line in starts(recipe)[:2]} == {"0", "3"}
    assert starts(recipe)[2].startswith("c ")


def test_places_are_cards_or_processes_and_never_both(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert places("cuda", "", 1) == [{}] and len(places("cuda", "0,1,2", 1)) == 3
    assert places("cpu", "", 1) == [{}] and len(places("cpu", "", 2)) == 2
    assert int(places("cpu", "", 2)[0]["OMP_NUM_THREADS"]) == max(1, os.cpu_count() // 2)
    for arguments, message in (
        (("cuda", "", 2), "workers is 2"),
        (("cpu", "0", 1), "gpus is '0'"),
        (("cpu", "", 0), "workers is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            places(*arguments)


SWEEP = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_jobs import job, run
recipe = Path({recipe!r})
run([job(recipe, "first"), job(recipe, "second", wait_for={wait!r})], recipe.parent)
"""


def test_a_sweep_that_is_killed_takes_its_run_with_it_and_goes_on_inside_it(recipe, tmp_path):
    code = SWEEP.format(tests=str(Path(__file__).parent), recipe=str(recipe), wait=str(tmp_path / "go"))
    sweep = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    )
    alive = tmp_path / "runs" / "second" / "alive"
    while not alive.exists():
        assert sweep.poll() is None
        time.sleep(0.01)
    sweep.send_signal(signal.SIGKILL)
    assert sweep.wait() == -signal.SIGKILL
    before = None
    for _ in range(200):  # the orphan sees the end of its input; until then it goes on writing
        before, seen = alive.read_text(), before
        if before == seen:
            break
        time.sleep(0.1)
    time.sleep(0.3)
    assert alive.read_text() == before, "the run outlived its sweep"
    assert list(read_outcomes(tmp_path)) == ["first"]
    (tmp_path / "go").touch()
    again = run([job(recipe, "first"), job(recipe, "second", wait_for=str(tmp_path / "go"))], tmp_path)
    assert {name: outcome.status for name, outcome in again.items()} == {"second": DONE}
    assert [line.split()[:2] for line in starts(recipe)] == [
        ["first", "False"],
        ["second", "False"],
        ["second", "True"],
    ]


def test_leaving_a_sweep_early_ends_its_processes(recipe, tmp_path):
    jobs = [job(recipe, "first"), job(recipe, "second", wait_for=str(tmp_path / "never"))]
    outcomes = run_jobs(jobs, tmp_path, [{}, {}])
    assert next(outcomes).job == "first"
    alive = tmp_path / "runs" / "second" / "alive"
    while not alive.exists():
        time.sleep(0.01)
    outcomes.close()
    before = alive.read_text()
    time.sleep(0.3)
    assert alive.read_text() == before
    assert [json.loads(line)["job"] for line in (tmp_path / "jobs.jsonl").read_text().splitlines()] == [
        "first"
    ]


@pytest.mark.parametrize(
    ("status", "lines", "expected"),
    [
        (1, ["Traceback (most recent call last):", "  x = 1", "torch.OutOfMemoryError: CUDA out of", " memory"],
         "torch.OutOfMemoryError: CUDA out of memory"),
        (2, ["settings", "error: there is no --modle"], "error: there is no --modle"),
        (1, ["KeyError: 'a'", "During handling of the above exception, another exception occurred:", "ValueError: b", "ok"],
         "ValueError: b ok"),
        (1, ["one", "two", "three", "four"], "two three four"),
        (7, [], "it ended with status 7 and said nothing"),
        (-signal.SIGTERM, ["ValueError: x"], "ended by SIGTERM"),
    ],
)  # fmt: skip
def test_the_reason_is_the_message_a_log_ends_with(status, lines, expected):
    assert reason(status, lines) == expected
