"""Watching a run: what a tracker gets, what happens without one, and when the report is written."""

import json
import math
import sqlite3
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from kit import watch as watching
from kit.command import clean_up_if_refused
from kit.run import RunFolder
from kit.watch import Tracker, WatchSettings, flat, make_tracker, watch

ROW = {"step": 1, "loss": 0.5, "compiles": True, "peak_gib": None, "norm": math.inf}


@dataclass(frozen=True)
class Config(WatchSettings):
    lr: float = 1.0


pytestmark = pytest.mark.usefixtures("fresh_directory")


def write_page(path: Path, *, goes_on: bool) -> Path:
    assert goes_on
    (path / "report.html").write_text("so far")
    return path / "report.html"


def run_steps(steps, *, log="", resume=False, out="run"):
    @clean_up_if_refused
    def main(config):
        run = RunFolder.open(config)
        run.metrics = watch(run, config, write_page)
        for step in steps:
            run.metrics.append({"step": step, "loss": 1 / step, "peak_gib": None})

    main(Config(log=log, resume=resume, out=out))
    return Path(out)


def test_numbers_of_a_row_are_sent_under_their_names_and_nothing_else():
    assert flat(ROW) == {"loss": 0.5}
    assert flat({"held_out_loss": None, "toy": {"accuracy": 0.25, "interval": None}}) == {
        "toy/accuracy": 0.25
    }


def test_without_a_tracker_nothing_is_imported_and_the_rows_are_the_same():
    packages = {"tensorboard", "trackio", "wandb"}
    before = packages & {name.partition(".")[0] for name in sys.modules}
    run = run_steps([1, 2])
    assert packages & {name.partition(".")[0] for name in sys.modules} == before
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": step, "loss": 1 / step, "peak_gib": None} for step in (1, 2)]
    assert make_tracker("", run).service is None


@pytest.mark.parametrize("name", ["trackio", "tensorboard", "wandb"])
def test_a_missing_package_is_one_line_with_the_command_and_leaves_no_run(name, monkeypatch):
    if find_spec(name):
        pytest.skip(f"{name} is installed")
    Path(name).mkdir()  # a folder of that name in the working directory is not the package
    monkeypatch.syspath_prepend(Path.cwd())
    with pytest.raises(
        ValueError, match=f"needs {name}, which is not installed; run .* -m pip install {name}$"
    ):
        run_steps([1], log=name)
    assert not Path("run").exists()
    with pytest.raises(ValueError, match="log is 'mlflow' but must be trackio, tensorboard or wandb"):
        Config(log="mlflow")


def test_a_tracker_that_cannot_start_is_a_mistake_before_anything_runs(monkeypatch):
    monkeypatch.setattr(watching, "find_spec", lambda name: type("Spec", (), {"origin": "there"}))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--log wandb could not start: ModuleNotFoundError"):
        run_steps([1], log="wandb")
    assert not Path("run").exists()


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(capsys):
    class Full:
        def log(self, step, figures):
            raise OSError(28, "disk full")

    tracker = Tracker("full", Full())
    for step in (1, 2, 3):
        tracker.log(step, ROW)
    tracker.close()
    said = capsys.readouterr().out
    assert said.count("full failed and is left out from here on: OSError(28, 'disk full')") == 1


def test_tensorboard_gets_every_step_and_a_resumed_run_replaces_those_it_repeats():
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_steps([1, 2, 3], log="tensorboard")
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(rows[0])  # as after a kill: the checkpoint is of step 1
    time.sleep(1.1)  # the names of its files are seconds
    run_steps([2, 3, 4], log="tensorboard", resume=True)
    found = EventAccumulator(str(run / "tensorboard")).Reload()
    assert found.Tags()["scalars"] == ["loss"]
    assert [(event.step, round(event.value, 4)) for event in found.Scalars("loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.3333),
        (4, 0.25),
    ]


def test_trackio_gets_every_step_under_the_names_of_recipe_and_run(tmp_path, monkeypatch):
    if not find_spec("trackio"):
        pytest.skip("trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    run_steps([1, 2], log="trackio", out="runs/mine/007")
    with closing(sqlite3.connect(tmp_path / "trackio" / "mine.db")) as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert [(name, step, json.loads(row)) for name, step, row in rows] == [
        ("007", 1, {"loss": 1.0}),
        ("007", 2, {"loss": 0.5}),
    ]


def test_the_report_of_a_run_that_goes_on_is_written_at_most_once_a_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: now[0])
    written = []

    def slow_page(path, *, goes_on):
        written.append((now[0], goes_on))
        now[0] += 5
        return path / "report.html"

    run = RunFolder.open(Config(out="run"))
    run.metrics = watch(run, Config(), slow_page)
    for step in range(1, 40):
        now[0] += 10
        run.metrics.append({"step": step})
    assert written == [(60.0, True), (315.0, True)]  # 5 s of writing are 2 % of 250
    assert capsys.readouterr().out.count("loaded again as the run goes on: file://") == 1


def test_a_report_that_cannot_be_written_does_not_end_the_run(monkeypatch, capsys):
    monkeypatch.setattr(watching, "REPORT_EVERY", 0.0)

    def fails(path, *, goes_on):
        raise OSError(28, "disk full")

    run = RunFolder.open(Config(out="run"))
    run.metrics = watch(run, Config(), fails)
    run.metrics.append({"step": 1})
    run.metrics.append({"step": 2})
    assert capsys.readouterr().out.count("could not be written, and is at the end: ") == 1
    assert [row["step"] for row in run.metrics.read()] == [1, 2]
