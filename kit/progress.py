"""Show how far a long loop is: on a terminal as a bar; elsewhere (a log file, a pipe) as a line per minute.

    progress = Progress("training", "steps", total=449)
    for step in progress.over(range(449)):
        progress.text = f"loss {train(step):.3f}"

A thread shows it, so that a line comes even while a single step takes many minutes. If one loop runs inside
another, such as the rollout in a step of GRPO, a log gets one line for both. The last line comes when the
outermost loop ends.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

LINE_EVERY = 60.0  # seconds between two lines in a log
REFRESH_EVERY = 1.0  # seconds between two updates of the text beside a bar
Item = TypeVar("Item")
_running: list[Progress] = []  # the outermost loop first
_drawing = threading.Lock()  # held while bars are drawn


class Progress:
    """How far one loop is. It is shown in `over`, or for as long as it is used as a context.

    what, unit: such as "training" and "steps". total: None = unknown. done: steps of an earlier run that this
    one resumes. text: what else is known now, such as the loss; a subclass may compute it when it is shown.
    """

    text = ""

    def __init__(self, what: str, unit: str, total: int | None = None, done: int = 0):
        self.what, self.unit, self.total, self.done = what, unit, total, done
        self.resumed_at = self.in_last_line = done
        self.bar = None
        self.ended = threading.Event()

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; each counts as done when the next is asked for.

        A loop that breaks or raises drops this generator, which ends the display.
        """
        with self:
            for item in items:
                yield item
                self.update()

    def update(self, text: str = "") -> None:
        """Count one more step as done. text: "" = as before."""
        self.done += 1
        if text:
            self.text = text
        if self.bar is not None:
            self.bar.set_postfix_str(self.text, refresh=False)
            self.bar.update()

    def __enter__(self):
        _flush()  # what was printed before comes first in a log of both streams
        self.start = time.perf_counter()
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            count = {"total": self.total, "initial": self.done, "unit": f" {self.unit}"}
            self.bar = tqdm(desc=self.what, leave=None, smoothing=0, **count)  # None: an inner bar is cleared
        _running.append(self)
        if _running == [self]:
            self.thread = threading.Thread(target=self._show_until_the_end, daemon=True, name="progress")
            self.thread.start()
        return self

    def __exit__(self, *_):
        with _drawing:  # or the thread would draw a bar again that has ended
            _running.remove(self)
            if self.bar is not None:
                self.bar.set_postfix_str(self.text, refresh=False)
                self.bar.close()
        if not _running:
            self.ended.set()
            self.thread.join()
            if self.bar is None and self.total != 0:
                _log(self.line())

    def _show_until_the_end(self) -> None:
        while not self.ended.wait(REFRESH_EVERY if self.bar is not None else LINE_EVERY):
            show()

    @property
    def seconds(self) -> float:
        """Wall time since the loop began."""
        return time.perf_counter() - self.start

    def line(self, rest: str = "") -> str:
        """Describe how far the loop is. rest: what is still to come."""
        total = "" if self.total is None else f" of {self.total:,}"
        text = f"; {self.text}" if self.text else ""
        resumed = f" (resumed at {self.resumed_at:,})" if self.resumed_at else ""
        count = f"{self.done:,}{total} {self.unit}{resumed}"
        return f"{self.what}: {count} in {_clock(self.seconds)}{rest}{text}"

    def rest(self) -> str:
        """Describe the time left, if it can be known, and whether a step has ended since the last line."""
        left = ""
        if self.total is not None and self.done > self.resumed_at:
            each = self.seconds / (self.done - self.resumed_at)
            left = f", about {_clock(each * (self.total - self.done))} left"
        waiting = ", the next is still running" if self.done == self.in_last_line else ""
        self.in_last_line = self.done
        return left + waiting


def show() -> None:
    """Update the text beside every bar, or write one line about all loops that are running."""
    with _drawing:
        loops = list(_running)
        for loop in loops:
            if loop.bar is not None:
                loop.bar.set_postfix_str(loop.text)
    if lines := [loop.line(loop.rest()) for loop in loops if loop.bar is None]:
        _log(" | ".join(lines))


def print_line(line: str) -> None:
    """Print a line at once, above the bars if there are any."""
    bar = next((loop.bar for loop in _running), None)
    if bar is None:
        _print_whole(line, sys.stdout)
    else:
        bar.write(line)
    _flush()


def _flush() -> None:
    if sys.stdout is not None:  # it was closed: >&-
        sys.stdout.flush()


def _log(line: str) -> None:
    _flush()
    _print_whole(line, sys.stderr)


def _print_whole(line: str, file) -> None:
    """Print a line in one write: what another thread writes or flushes meanwhile comes before or after it."""
    print(f"{line}\n", end="", file=file, flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
