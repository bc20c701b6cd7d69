"""Real processes of small recipes: failures are reported, killed runs resume, no process outlives a study."""

import json
import os
import platform
import re
import signal
import threading
import time
from dataclasses import asdict
from multiprocessing import forkserver
from pathlib import Path

import pytest
from children import call, wait, wait_until_still

from kit.journal import Journal
from kit.valley.claims import LEASE, claiming
from kit.valley.jobs import (
    DONE,
    FAILED,
    KEEP_FREED_MEMORY,
    LOG,
    TAIL,
    Job,
    Outcome,
    Worker,
    read_outcomes,
    reason,
    run_jobs,
    workers_of,
)

RECIPE = """
import os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
from kit.progress import Progress

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

def threads():
    return sys.modules["torch"].get_num_threads() if "torch" in sys.modules else "any"

def main(config):
    out = Path(config.out)
    (out / "config.json").write_text("{}")
    with (out.parent / "starts").open("a") as file:
        card = os.environ.get("CUDA_VISIBLE_DEVICES")
        file.write(f"{out.name} {config.resume} {config.switch} {config.text!r} {card}\\n")
    (out / "process").write_text(f"{os.getpid()} {threads()}")
    for i in range(30):
        print(f"line {i}", flush=True)
    while config.wait_for and not Path(config.wait_for).exists():
        (out / "alive").write_text(str(time.time()))
        time.sleep(0.01)
    if config.fail == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    if config.fail == "exit":
        raise SystemExit("no GPU is here.\\nTwo ways out")
    for step in Progress("training", "steps", 2).over(range(2)):
        if step == 1 and config.fail and not config.resume:
            raise ValueError(config.fail)
"""


@pytest.fixture(scope="module", autouse=True)
def server():
    """Start the process that children are forked from before a small recipe does, for tests/children.py."""
    forkserver.ensure_running()


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "small_recipe.py"
    file.write_text(RECIPE)
    return file


def job(recipe, name, *, needs=(), problem="", **settings):
    return Job(name, recipe.stem, settings, recipe.parent / "runs" / name, tuple(needs), problem=problem)


ONE = (Worker(),)


def run(jobs, path, workers=ONE, lease=LEASE):
    with claiming(path, lease) as claims:
        return {outcome.job: outcome for outcome in run_jobs(jobs, path, workers, claims)}


def starts(recipe):
    return (recipe.parent / "runs" / "starts").read_text().splitlines()


def test_a_failure_is_reported_with_its_reason_and_the_end_of_its_log_and_the_others_go_on(
    recipe, tmp_path, capfd
):
    jobs = [
        job(recipe, "bad", fail="rows are\nlonger than 7"),
        job(recipe, "killed", fail="signal"),
        job(recipe, "left", fail="exit"),
        job(recipe, "needs-bad", needs=["bad"]),
        job(recipe, "too-large", problem="it needs 99 GiB"),
        job(recipe, "good", switch=False, text="--odd= name"),
    ]
    found = run(jobs, tmp_path)
    assert {name: outcome.status for name, outcome in found.items()} == {
        "bad": FAILED,
        "killed": FAILED,
        "left": FAILED,
        "needs-bad": FAILED,
        "too-large": FAILED,
        "good": DONE,
    }
    assert found["bad"].error == "rows are longer than 7"
    assert len(found["bad"].tail) == TAIL and found["bad"].tail[-1] == "longer than 7"
    assert found["killed"].error.startswith("ended by SIGKILL")
    assert found["left"].error.endswith("no GPU is here. Two ways out")
    assert found["needs-bad"].error == "not started: it needs bad, which failed"
    assert found["too-large"].error == "not started: it needs 99 GiB"
    good, bad = (Path(found[name].log).read_text() for name in ("good", "bad"))
    assert good.count("line") == 30 and "line 29\ntraining: 2 of 2 steps in 0:" in good
    assert "line 29\ntraining: 1 of 2 steps in 0:" in bad.split("error: ")[0] and "\r" not in good + bad
    assert re.search(r"^study: 6 of 6 runs in \d:\d\d:\d\d\n\Z", capfd.readouterr().err, re.MULTILINE)
    assert [line.split()[0] for line in starts(recipe)] == ["bad", "killed", "left", "good"]
    assert "False '--odd= name'" in starts(recipe)[-1]  # settings arrive whatever they hold
    assert read_outcomes(tmp_path) == found


def test_a_resumed_study_starts_only_what_is_not_done_and_what_needs_it(recipe, tmp_path):
    jobs = [job(recipe, "good"), job(recipe, "bad", fail="once"), job(recipe, "after", needs=["bad"])]
    assert run(jobs, tmp_path)["after"].status == FAILED
    again = run(jobs, tmp_path)
    assert {name: outcome.status for name, outcome in again.items()} == {"bad": DONE, "after": DONE}
    assert [line.split()[:2] for line in starts(recipe)] == [
        ["good", "False"],
        ["bad", "False"],
        ["bad", "True"],
        ["after", "False"],
    ]
    assert {outcome.status for outcome in read_outcomes(tmp_path).values()} == {DONE}
    assert run(jobs, tmp_path) == {}


def test_a_failure_is_not_tried_again_by_those_who_join_while_the_one_who_saw_it_is_at_work(recipe, tmp_path):
    jobs = [job(recipe, "bad", fail="once"), job(recipe, "after", needs=["bad"])]
    with claiming(tmp_path) as claims:
        assert [outcome.status for outcome in run_jobs(jobs, tmp_path, ONE, claims)] == [FAILED, FAILED]
        assert run(jobs, tmp_path) == {}
    assert {name: outcome.status for name, outcome in run(jobs, tmp_path).items()} == {
        "bad": DONE,
        "after": DONE,
    }


def test_a_run_that_another_process_has_taken_over_is_killed_and_the_others_outcome_counts(recipe, tmp_path):
    alive, other = tmp_path / "runs" / "lost" / "alive", tmp_path / "processes" / "002"

    def take_over():
        while not alive.exists():
            time.sleep(0.01)
        other.mkdir()
        (other / "alive").write_text(json.dumps({"machine": "another"}))
        (alive.parent / "claim-2").write_text(other.name)
        before = None
        while before != (written := alive.read_text()):  # it goes on writing until it is killed
            before = written
            time.sleep(0.3)
        Journal(other / "jobs.jsonl").append(asdict(Outcome("lost", DONE)))

    thread = threading.Thread(target=take_over)
    thread.start()
    assert run([job(recipe, "lost", wait_for=str(tmp_path / "never"))], tmp_path) == {}
    thread.join()
    assert read_outcomes(tmp_path)["lost"].status == DONE


def test_what_needs_a_run_that_is_neither_here_nor_done_is_not_waited_for(recipe, tmp_path):
    found = run([job(recipe, "after", needs=["bad"])], tmp_path)
    assert found["after"].error == "not started: it needs bad, which failed"


def test_as_many_run_at_once_as_there_are_cards_each_on_its_own(recipe, tmp_path):
    runs = tmp_path / "runs"
    jobs = [
        job(recipe, "a", wait_for=str(runs / "b" / "config.json")),
        job(recipe, "b", wait_for=str(runs / "a" / "config.json")),
        job(recipe, "c", needs=["a", "b"]),
    ]
    outcomes = run(jobs, tmp_path, workers_of("cuda", "0, 3", 0))
    assert {outcome.status for outcome in outcomes.values()} == {DONE}
    assert {line.split()[-1] for line in starts(recipe)[:2]} == {"0", "3"}
    assert starts(recipe)[2].startswith("c ")


def test_every_run_on_a_cpu_has_a_process_and_one_thread_of_its_own(recipe, tmp_path):
    jobs = [job(recipe, name) for name in "abc"]
    assert {outcome.status for outcome in run(jobs, tmp_path, [Worker()] * 2).values()} == {DONE}
    found = [(tmp_path / "runs" / name / "process").read_text().split() for name in "abc"]
    assert {threads for _, threads in found} == {"1"}
    assert len({process for process, _ in found} - {str(os.getpid())}) == 3


def test_workers_are_cards_or_cores_and_never_both():
    assert workers_of("cuda", "", 0) == [Worker(True)] and len(workers_of("cuda", "0,1,2", 0)) == 3
    assert len(workers_of("cpu", "", 0)) == os.cpu_count() and len(workers_of("cpu", "", 2)) == 2
    for arguments, message in ((("cuda", "", 2), "workers is 2"), (("cpu", "0", 1), "gpus is '0'")):
        with pytest.raises(ValueError, match=message):
            workers_of(*arguments)


MEMORY = """
import json, os, resource
from dataclasses import dataclass
from pathlib import Path
import torch

@dataclass(frozen=True)
class Config:
    out: str = ""  # folder

SMOKE = {}

def main(config):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        torch.ones(2**22)  # a block of 16 MiB, used and freed
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    found = {"blocks": faults * resource.getpagesize() / 2**24, "environment": dict(os.environ)}
    (Path(config.out) / "found.json").write_text(json.dumps(found))
"""


def run_one(recipe, folder):
    os.environ["MALLOC_TOP_PAD_"] = str(2**27)
    before = dict(os.environ)
    run([Job("memory", recipe, {}, Path(folder))], Path(folder))
    assert dict(os.environ) == before


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="these settings are glibc's")
def test_freed_memory_stays_with_a_run_and_its_environment_is_that_of_the_study(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "memory_recipe.py").write_text(MEMORY)
    # in a process whose server has not been started
    wait(call(__file__, "run_one", "memory_recipe", str(tmp_path)))
    found = json.loads((tmp_path / "found.json").read_text())
    # of 40 that were used; a few, because a forked process copies what it touches
    assert found["blocks"] < 10
    assert found["environment"]["MALLOC_TOP_PAD_"] == str(2**27)
    assert not {*found["environment"]} & {*KEEP_FREED_MEMORY} - {"MALLOC_TOP_PAD_"}


def run_two(recipe, go):
    recipe = Path(recipe)
    run([job(recipe, "first"), job(recipe, "second", wait_for=go)], recipe.parent)


@pytest.mark.slow
def test_a_study_that_is_killed_takes_its_run_with_it_and_goes_on_inside_it(recipe, tmp_path):
    go, alive = tmp_path / "go", tmp_path / "runs" / "second" / "alive"
    study = call(__file__, "run_two", str(recipe), str(go))
    while not alive.exists():
        assert study.poll() is None, study.stderr
        time.sleep(0.01)
    study.kill()
    assert study.returncode == -signal.SIGKILL
    wait_until_still(alive)
    assert list(read_outcomes(tmp_path)) == ["first"]
    go.touch()
    again = run([job(recipe, "first"), job(recipe, "second", wait_for=str(go))], tmp_path)
    assert {name: outcome.status for name, outcome in again.items()} == {"second": DONE}
    assert [line.split()[:2] for line in starts(recipe)] == [
        ["first", "False"],
        ["second", "False"],
        ["second", "True"],
    ]


def test_leaving_a_study_early_ends_its_processes(recipe, tmp_path):
    jobs = [job(recipe, "first"), job(recipe, "second", wait_for=str(tmp_path / "never"))]
    alive = tmp_path / "runs" / "second" / "alive"
    with claiming(tmp_path) as claims:
        outcomes = run_jobs(jobs, tmp_path, [Worker()] * 2, claims)
        assert next(outcomes).job == "first"
        while not alive.exists():
            time.sleep(0.01)
        outcomes.close()
    before = alive.read_text()
    time.sleep(0.3)
    assert alive.read_text() == before
    assert list(read_outcomes(tmp_path)) == ["first"]


def test_a_run_that_has_written_nothing_when_a_study_is_left_is_ended_at_once(recipe, tmp_path, monkeypatch):
    never = job(recipe, "never", wait_for=str(tmp_path / "never"))
    with claiming(tmp_path) as claims:
        outcomes = run_jobs([job(recipe, "first"), never], tmp_path, [Worker()] * 2, claims)
        assert next(outcomes).job == "first"
        while not (never.folder / "alive").exists():
            time.sleep(0.01)
        monkeypatch.setattr("kit.valley.jobs._Running.has_begun", False)
        outcomes.close()
    assert "stopped" not in (never.folder / LOG).read_text()  # which a run says that is asked to save


@pytest.mark.parametrize(
    ("status", "lines", "expected"),
    [
        (
            1,
            [
                "Traceback (most recent call last):",
                "  x = 1",
                "torch.OutOfMemoryError: CUDA out of",
                " memory",
            ],
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        (2, ["settings", "error: there is no --modle"], "there is no --modle"),
        (
            1,
            [
                "KeyError: 'a'",
                "During handling of the above exception, another exception occurred:",
                "ValueError: b",
                "ok",
            ],
            "ValueError: b ok",
        ),
        (1, ["one", "two", "three", "four"], "two three four"),
        (7, [], "it ended with status 7 and printed nothing"),
        (-signal.SIGTERM, ["ValueError: x"], "ended by SIGTERM"),
    ],
)
def test_the_reason_is_the_message_a_log_ends_with(status, lines, expected):
    assert reason(status, lines) == expected
