"""Results of the checks. Each is printed and written as soon as it is known, so that a stopped run keeps it.

A check is a function of a Results and a Card. It calls `results.check` for a claim that holds or not,
`results.figure` for a measurement, and raises Skip with the reason for anything that it leaves out.
`results.case` guards each piece of work: an error in one case is that case's result, and the next case runs.
"""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kit.journal import Journal
from kit.machine import GIB, return_memory

PASS, FAIL, FIGURE, NOT_RUN = "pass", "FAIL", "figure", "not run"


class CardLost(Exception):
    """A CUDA error that stays with the process: nothing more can run on the card."""


class Skip(Exception):
    """The reason why the rest of a case does not run."""


@dataclass(frozen=True)
class Card:
    """The device under test, and how much to ask of it."""

    device: torch.device
    quick: bool  # fewer cases
    cap_gb: float = 0.0  # GiB of the card that the checks may believe in; 0 = all of it
    arch: str = ""  # compile for this architecture instead of the card's own, "sm89"; "" = the card's own
    models: tuple[str, ...] = ()  # names of those to train

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def small(self) -> bool:
        """Whether this is a rehearsal on a CPU, with tiny shapes."""
        return not self.is_cuda

    @property
    def name(self) -> str:
        """The card's name as torch has it; "" on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.is_cuda else ""

    @property
    def facts(self) -> dict[str, str]:
        """What a recipe looks a measurement up by; none if the code of another architecture was measured."""
        return {} if self.arch else {"gpu": self.name, "torch": torch.__version__}

    @property
    def gib(self) -> float:
        """Memory of the card that the checks count with, in GiB; 0 on a CPU."""
        if not self.is_cuda:
            return 0.0
        whole = torch.cuda.get_device_properties(self.device).total_memory / GIB
        return min(self.cap_gb or whole, whole)

    def need_rtx_30(self, why: str) -> None:
        """Raise Skip on a card older than RTX 30 (compute capability 8.0). why: what it lacks."""
        if self.is_cuda and torch.cuda.get_device_capability(self.device) < (8, 0):
            capability = "{}.{}".format(*torch.cuda.get_device_capability(self.device))
            raise Skip(f"compute capability {capability}: {why}")

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Return to the driver everything that no tensor uses."""
        return_memory(self.device)

    def is_lost(self) -> bool:
        """Return whether a CUDA error has made the card unusable for this process."""
        if not self.is_cuda:
            return False
        try:
            torch.cuda.synchronize(self.device)
            torch.ones(4, device=self.device).sum().item()
        except torch.OutOfMemoryError:
            return False
        except RuntimeError:
            return True
        return False


class Results:
    """One row per result. path: the JSON lines file; None = print only. seconds: the whole run's budget."""

    def __init__(self, card: Card, path: Path | None = None, *, seconds: float = math.inf):
        self.card, self.seconds = card, seconds
        self.journal = Journal(path) if path else None
        self.rows: list[dict] = []
        self.start = time.perf_counter()
        self.section = ""

    def left(self) -> float:
        """Return the seconds of the budget that are left."""
        return self.seconds - (time.perf_counter() - self.start)

    def add(self, status: str, name: str, text: str = "", **numbers) -> None:
        at = round(time.perf_counter() - self.start, 1)
        row = {"section": self.section, "name": name, "status": status, "text": text, "at": at, **numbers}
        self.rows.append(row)
        print(f"{at:5.0f} s  {status:<8}{self.section:<8}{name}" + (f": {text}" if text else ""), flush=True)
        if self.journal is not None:
            self.journal.append(row)

    def check(self, name: str, holds: bool, text: str = "", **numbers) -> None:
        """Record a claim of the kit, which passes or fails."""
        self.add(PASS if holds else FAIL, name, text, **numbers)

    def figure(self, name: str, text: str, **numbers) -> None:
        """Record a measurement, which is neither right nor wrong."""
        self.add(FIGURE, name, text, **numbers)

    def not_run(self, name: str, why: str) -> None:
        self.add(NOT_RUN, name, why)

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Run one case: an exception fails this case alone. Raises CardLost if the card cannot go on."""
        try:
            yield
            self.card.synchronize()
        except CardLost:
            raise
        except Skip as reason:
            self.not_run(name, str(reason))
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
            self.add(FAIL, name, one_line(error), where=where)
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            error.__traceback__ = None
            self.card.free()
            if self.card.is_lost():
                raise CardLost(name) from None

    def run(
        self, name: str, check: Callable, *arguments, seconds: float, gib: float = 0.0, **options
    ) -> None:
        """Run check(self, card, name, ...) as one case, if it is within what `need` allows."""
        with self.case(name):
            self.need(seconds=seconds, gib=gib)
            check(self, self.card, name, *arguments, **options)

    def need(self, *, seconds: float = 0.0, gib: float = 0.0) -> None:
        """Raise Skip if the card has less memory or the budget less time. Both are estimates for a card."""
        if not self.card.is_cuda:
            seconds = gib = 0.0
        if self.card.gib < gib:
            raise Skip(f"about {gib:.2f} GiB are needed and the card has {self.card.gib:.2f}")
        left = self.left()
        if left < seconds:
            text = f"{max(left, 0):.0f} s left, about {seconds:.0f} s needed"
            raise Skip(f"{text}; pass --seconds 0 for no limit")

    def count(self, status: str) -> int:
        return sum(row["status"] == status for row in self.rows)

    def table(self) -> str:
        """Return the counts per section, then every failure and everything that did not run."""
        lines = [f"{'section':<10}{PASS:>8}{FAIL:>8}{NOT_RUN:>10}{FIGURE + 's':>10}"]
        for section in dict.fromkeys(row["section"] for row in self.rows):
            own = [row["status"] for row in self.rows if row["section"] == section]
            passed, failed, left_out, figures = map(own.count, (PASS, FAIL, NOT_RUN, FIGURE))
            lines.append(f"{section:<10}{passed:>8}{failed:>8}{left_out:>10}{figures:>10}")
        for status in (FAIL, NOT_RUN):
            rows = [row for row in self.rows if row["status"] == status]
            lines += [f"{status:<8}{row['section']} {row['name']}: {row['text']}" for row in rows]
        return "\n".join(lines)


def one_line(error: BaseException) -> str:
    """Return an exception as one line of at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
