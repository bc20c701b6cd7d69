"""What the checks of a card find: every result is printed and written the moment it is known, so that a stopped run keeps it.

A check is a function of a Results and a Card. It calls `results.check` for a claim that holds or not, `results.figure` for a
measurement, and `results.not_run` with the reason for anything it leaves out. `results.case` guards each piece of work: an
error in one case is that case's result, and the next case runs.
"""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kit.machine import GIB, return_memory
from kit.run import Journal

PASS, FAIL, FIGURE, NOT_RUN = "pass", "FAIL", "figure", "not run"


class CardLost(Exception):
    """A CUDA error that stays with the process: nothing more can run on the card."""


@dataclass(frozen=True)
class Card:
    """The device under test, and how much to ask of it."""

    device: torch.device
    small: bool  # tiny shapes, as on a CPU
    quick: bool  # fewer cases
    cap_gb: float = 0.0  # GiB of the card that the checks may believe in; 0 = all of it
    arch: str = ""  # compile for this architecture instead of the card's own, "sm89"; "" = the card's own

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        """The card's name as torch has it; "" on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.is_cuda else ""

    @property
    def gib(self) -> float:
        """Memory of the card that the checks count with, in GiB; 0 on a CPU."""
        if not self.is_cuda:
            return 0.0
        whole = torch.cuda.get_device_properties(self.device).total_memory / GIB
        return min(self.cap_gb or whole, whole)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Return to the driver everything that no tensor uses."""
        return_memory(self.device)

    def is_lost(self) -> bool:
        """Whether a CUDA error has made the card unusable for this process."""
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
    """One row per result. path: the JSON lines file; None = print only. seconds: the time budget of the whole run."""

    def __init__(self, card: Card, path: Path | None = None, *, seconds: float = math.inf):
        self.card, self.seconds = card, seconds
        self.journal = Journal(path) if path else None
        self.rows: list[dict] = []
        self.start = time.perf_counter()
        self.section = ""

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.seconds - (time.perf_counter() - self.start)

    def add(self, status: str, name: str, text: str = "", **numbers) -> None:
        at = round(time.perf_counter() - self.start, 1)
        row = {"section": self.section, "name": name, "status": status, "text": text, "at": at, **numbers}
        self.rows.append(row)
        print(f"{at:5.0f} s  {status:<8}{self.section:<8}{name}" + (f": {text}" if text else ""), flush=True)
        if self.journal is not None:
            self.journal.append(row)

    def check(self, name: str, holds: bool, text: str = "", **numbers) -> None:
        """A claim of the kit: it passes or fails."""
        self.add(PASS if holds else FAIL, name, text, **numbers)

    def figure(self, name: str, text: str, **numbers) -> None:
        """A measurement, which is neither right nor wrong."""
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
        except Exception as error:
            frames = [
                f"{Path(frame.filename).name}:{frame.lineno}"
                for frame in traceback.extract_tb(error.__traceback__)
            ]
            self.add(FAIL, name, one_line(error), where=frames[-4:])
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            error.__traceback__ = None
            self.card.free()
            if self.card.is_lost():
                raise CardLost(name) from None

    def has_time(self, name: str, seconds: float) -> bool:
        """Whether so many seconds are left; if not, the case is recorded as not run."""
        if self.left() >= seconds:
            return True
        self.not_run(
            name,
            f"{max(self.left(), 0):.0f} s left, about {seconds:.0f} s needed; pass --seconds 0 for no limit",
        )
        return False

    def count(self, status: str) -> int:
        return sum(row["status"] == status for row in self.rows)

    def table(self) -> str:
        """Counts per section, then every failure and everything that did not run."""
        lines = [f"{'section':<10}{PASS:>8}{FAIL:>8}{NOT_RUN:>10}{FIGURE + 's':>10}"]
        for section in dict.fromkeys(row["section"] for row in self.rows):
            own = [row["status"] for row in self.rows if row["section"] == section]
            lines.append(
                f"{section:<10}{own.count(PASS):>8}{own.count(FAIL):>8}{own.count(NOT_RUN):>10}{own.count(FIGURE):>10}"
            )
        for status in (FAIL, NOT_RUN):
            lines += [
                f"{status:<8}{row['section']} {row['name']}: {row['text']}"
                for row in self.rows
                if row["status"] == status
            ]
        return "\n".join(lines)


def one_line(error: BaseException) -> str:
    """An exception as one line of at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
