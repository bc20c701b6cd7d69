"""The folder of a run: config.json, metrics.jsonl, samples, checkpoints, model, report; how it is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# settings that do not change what a run computes, or only what it computes last
UNSTORED = {"resume", "out", "baseline", "workers", "gpus", "rl_steps"}
FREE_TO_CHANGE = UNSTORED | {"num_slots"}  # it changes the last bits at most


class RunFolder:
    """A folder that belongs to one run with one set of settings."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics = Journal(path / "metrics.jsonl")

    @classmethod
    def open(cls, config, *, may_grow: Sequence[str] = ()) -> RunFolder:
        """Return the run folder of a config, with its config.json written.

        config: a recipe's Config. If its `out` is "", the folder is the next free number under runs/RECIPE,
        or with `resume` the newest one there. may_grow: settings that may grow in a resumed run: a number
        gets larger, a list gets more numbers, or more names at its end. Raises ValueError if the folder
        already holds a run, if there is nothing to resume, and if a resumed run's settings differ, naming
        them.
        """
        path = Path(config.out)
        if not config.out:
            path = next_folder(Path("runs") / recipe_name(config), newest=config.resume)
        settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in UNSTORED}
        stored = path / "config.json"
        if config.resume:
            if not stored.is_file():
                raise ValueError(
                    f"--resume was given but {path} holds no run; drop --resume, or pass the --out of the run"
                )
            before = json.loads(stored.read_text(encoding="utf-8"))
            grown = {k for k in may_grow if k in before and _has_grown(before[k], settings[k])}
            fixed = sorted({*before, *settings} - FREE_TO_CHANGE - grown)
            pairs = {k: (before.get(k), settings.get(k)) for k in fixed}
            changed = "; ".join(
                f"{k} was {old!r}, is {new!r}" for k, (old, new) in pairs.items() if old != new
            )
            if changed:
                raise ValueError(
                    f"{path} was started with other settings: {changed}; pass the same, or another --out"
                )
            if grown:
                write_json(stored, settings)
        elif stored.exists():
            raise ValueError(f"{path} already holds a run; pass --resume to continue it, or another --out")
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_json(stored, settings)
        return cls(path)


def _has_grown(before: int | str, now: int | str) -> bool:
    """Return whether a number is larger now, or a comma-separated list longer.

    Numbers of a list may be added anywhere, names only at its end.
    """
    if not isinstance(before, str):
        return before < now
    had, has = before.split(","), now.split(",")
    return set(had) < set(has) if had[0].isdigit() else has[: len(had)] == had


def recipe_name(config) -> str:
    """Return the file name, without .py, of the recipe that this Config belongs to."""
    return Path(getattr(sys.modules[type(config).__module__], "__file__", "notebook")).stem


def next_folder(parent: Path, *, newest: bool = False) -> Path:
    """Return the next free numbered folder under parent, 001 first; with newest, the highest that exists."""
    numbers = [int(child.name) for child in parent.glob("[0-9]*") if child.name.isdigit()]
    if newest and numbers:
        return parent / f"{max(numbers):03d}"
    return parent / f"{max(numbers, default=0) + 1:03d}"


def write_json(path: Path, value) -> None:
    """Write the file whole or not at all: a kill leaves the old file or the new one."""
    _replace(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def digest(*parts: str) -> str:
    """Return a 128-bit hash of the parts, as hex."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(json.dumps(part).encode())  # quoted, so that ("ab", "c") and ("a", "bc") differ
    return state.hexdigest()


BEFORE, AFTER, SAMPLES = "before", "after", "samples"  # folders of samples in a run


class Journal:
    """Rows of a file, which are only appended. Opening it cuts off a line that a kill left half-written."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            content = self.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                _replace(self.path, whole)

    def append(self, row: dict) -> None:
        """Write one row to the operating system at once, so that killing the process does not lose it.

        NaN and inf become text.
        """
        finite = {key: _finite(value) for key, value in row.items()}
        line = json.dumps(finite, ensure_ascii=False, allow_nan=False)
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")

    def read(self) -> list[dict]:
        """Return all rows, oldest first; none if the file does not exist.

        Raises ValueError naming a line that is not JSON.
        """
        if not self.path.exists():
            return []
        rows = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").split("\n"), 1):
            try:
                rows += [json.loads(line)] if line else []
            except json.JSONDecodeError as error:
                where = f"{self.path}:{number}"
                raise ValueError(f"{where} is not JSON ({error}); delete that line to continue") from error
        return rows

    def keep(self, wanted: Callable[[dict], bool]) -> None:
        """Drop the rows that are not wanted, such as steps after the checkpoint that a run resumes from."""
        rows = self.read()
        if not all(wanted(row) for row in rows):
            replace_rows(self.path, [row for row in rows if wanted(row)])


def replace_rows(path: Path, rows: list[dict]) -> None:
    """Write a file of these rows, whole or not at all."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _replace(path, "".join(lines).encode("utf-8", errors="backslashreplace"))


def _finite(value):
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_bytes(content)
    scratch.replace(path)
