"""Watch a run while it trains: its figures go to a tracker, and report.html is written again and again.

    run.metrics = watch(run, config, report.write_report)          after RunFolder.open

metrics.jsonl stays the record of the run: a tracker gets copies. One that fails is said and left out.
"""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from kit.config import RunSettings
from kit.journal import CONFIG, STEP, Journal
from kit.progress import print_line
from kit.ranks import here
from kit.run import RunFolder, digest, read_json

REPORT_EVERY = 60.0  # seconds, at least, between two reports of a run that goes on
REPORT_SHARE = 0.02  # of the time may go into them, at most


@dataclass(frozen=True)
class WatchSettings(RunSettings):
    # watching
    log: str = ""  # also send each step's figures there; "" = nowhere [trackio | tensorboard | wandb]


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, run: Path):
        from torch.utils.tensorboard import SummaryWriter

        folder, self.writer = run / "tensorboard", None
        self.write_from = partial(SummaryWriter, folder)
        print(f"log         to look at it: {sys.executable} -m tensorboard.main --logdir {folder}")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if self.writer is None:
            self.writer = self.write_from(purge_step=step)  # a resumed run repeats a few steps
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Service:
    """Trackio or Weights & Biases, which share their interface; both print where to look."""

    def __init__(self, name: str, run: Path):
        self.module, run = importlib.import_module(name), run.resolve()
        own = {"id": digest(str(run)), "dir": run} if name == "wandb" else {}
        settings = read_json(run / CONFIG)
        self.module.init(project=run.parent.name, name=run.name, config=settings, resume="allow", **own)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.module.log(dict(figures), step=step)

    def close(self) -> None:
        self.module.finish()


class Tracker:
    """Where a run's figures also go, if anywhere. One that fails ends itself, not the run that it watches."""

    def __init__(self, name: str = "", service: TensorBoard | Service | None = None):
        self.name, self.service = name, service

    def log(self, step: int, figures: Mapping[str, object]) -> None:
        self._try(lambda service: service.log(step, flat(figures)))

    def close(self) -> None:
        self._try(lambda service: service.close())

    def _try(self, call: Callable[[TensorBoard | Service], object]) -> None:
        try:
            if self.service is not None:
                call(self.service)
        except Exception as error:  # whatever its package raises; the run's own record is metrics.jsonl
            print_line(f"log         {self.name} failed and is left out from here on: {error!r}")
            self.service = None


def flat(figures: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers of a row, and of rows in it under names such as math500/accuracy; not the step."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in flat(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[name] = value
    found.pop("step", None)  # which trackers have besides
    return found


def check_tracker(name: str) -> None:
    """Raise ValueError with the pip command if the tracker's package is missing."""
    if name and not ((found := find_spec(name)) and found.origin):  # a folder of that name is no package
        raise ValueError(
            f"--log {name} needs {name}, which is not installed; run {sys.executable} -m pip install {name}"
        )


def make_tracker(name: str, run: Path) -> Tracker:
    """Return the tracker of a run. name: "" = none.

    Raises ValueError as check_tracker does, and if it cannot start, such as without a login.
    """
    check_tracker(name)
    if not name:
        return Tracker()
    try:
        return Tracker(name, TensorBoard(run) if name == "tensorboard" else Service(name, run))
    except Exception as error:  # whatever its package raises
        raise ValueError(f"--log {name} could not start: {error!r}; run without it, or mend that") from error


class WatchedMetrics(Journal):
    """The log of a run's steps. Each row also goes to the tracker, and now and then the report is written.

    write_report(path, goes_on=True): writes a page that loads itself again.
    """

    def __init__(self, run: Path, tracker: Tracker, write_report: Callable[..., Path]):
        super().__init__(run / "metrics.jsonl", STEP)
        self.run, self.tracker, self.write_report = run, tracker, write_report
        self.next_report, self.was_announced = time.monotonic() + REPORT_EVERY, False

    def append(self, row: dict) -> None:
        if not here().is_first:
            return
        super().append(row)
        self.tracker.log(row["step"], row)
        if time.monotonic() >= self.next_report:
            self._report()

    def _report(self) -> None:
        start = time.monotonic()
        try:
            page = self.write_report(self.run, goes_on=True)
        except (ValueError, OSError) as error:
            print_line(f"report      could not be written, and is at the end: {error}")
            self.next_report = math.inf
            return
        if not self.was_announced:
            print_line(f"report      so far, loaded again as the run goes on: {page.resolve().as_uri()}")
        self.was_announced, end = True, time.monotonic()
        self.next_report = end + max(REPORT_EVERY, (end - start) / REPORT_SHARE)


def watch(run: RunFolder, config: WatchSettings, write_report: Callable[..., Path]) -> WatchedMetrics:
    """Return what replaces run.metrics, and close the tracker when the recipe ends.

    Raises ValueError as make_tracker does.
    """
    tracker = make_tracker(config.log if here().is_first else "", run.path)
    run.at_end.append(tracker.close)
    return WatchedMetrics(run.path, tracker, write_report)
