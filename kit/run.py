"""The folder of a run: config.json, metrics.jsonl, samples, checkpoints, model, report; how it is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

CONFIG = "config.json"
UNSTORED = {"resume", "out", "plan", "json"}
# settings that do not change what a run computes, or only what it computes last, or only the last bits
FREE_TO_CHANGE = UNSTORED | {
    "baseline", "workers", "gpus", "rl_steps", "num_slots", "desktop_gb", "card", "trace_tokens",
    "response_tokens", "recompute", "tile_tokens", "offload_inputs", "logit_rows", "offload_optimizer",
    "offload_gradients", "eval_every", "eval_questions",
}  # fmt: skip

BEFORE, AFTER, SAMPLES = "before", "after", "samples"  # folders of samples in a run
DURING = "during"  # the folder of samples drawn while it was trained; DURING.jsonl: their figures by step
BEGUN = ("metrics.jsonl", "checkpoints", "model", "cells")  # what a run writes once it has begun to train
# what it writes before
PREPARED = (
    CONFIG, "drop_counts.json", "prompts.jsonl", "data", "study.json", "memory.json", "rollouts.jsonl",
    BEFORE, AFTER, SAMPLES, DURING, f"{DURING}.jsonl",
)  # fmt: skip


class RunFolder:
    """A folder that belongs to one run with one set of settings."""

    newest: RunFolder | None = None  # the last one that this process opened

    def __init__(self, path: Path, *, is_new: bool = False, is_created: bool = False):
        self.path, self.is_new, self.is_created = path, is_new, is_created
        self.before = {child.name for child in path.glob("*")} - {CONFIG}
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
        settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in UNSTORED}
        if config.resume:
            path, before = stored_settings(recipe_name(type(config)), config.out)
            defaults = {field.name: field.default for field in dataclasses.fields(config)}
            before = {name: before.get(name, defaults[name]) for name in settings} | before  # new settings
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
        else:
            path = Path(config.out) if config.out else next_folder(Path("runs") / recipe_name(type(config)))
            if (path / CONFIG).exists():
                raise ValueError(
                    f"{path} already holds a run; pass --resume to continue it, or another --out"
                )

        is_created = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / CONFIG, settings)
        cls.newest = cls(path, is_new=not config.resume, is_created=is_created)
        return cls.newest

    @property
    def has_begun(self) -> bool:
        """Whether the run has trained or measured anything."""
        return has_begun(self.path)

    def discard_if_new(self) -> None:
        """Remove a new run that has not begun, so that the corrected command may have its folder.

        In a folder that was there before, all that was in it stays.
        """
        if self.is_new and not self.has_begun:
            self.is_new = False
            for made in (self.path / name for name in PREPARED if name not in self.before):
                shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
            if self.is_created:
                shutil.rmtree(self.path, ignore_errors=True)


def has_begun(path: Path) -> bool:
    """Return whether the run in a folder has trained or measured anything."""
    samples = (file for stage in (BEFORE, AFTER, SAMPLES, DURING) for file in (path / stage).glob("*.jsonl"))
    return any((path / name).exists() for name in BEGUN) or any(map(_holds_samples, samples))


def _holds_samples(path: Path) -> bool:
    """Return whether a file of samples holds more than its first line, which is a header."""
    with path.open("rb") as lines:
        return len(list(islice(lines, 2))) > 1


def stored_settings(recipe: str, out: str) -> tuple[Path, dict]:
    """Return (the folder of the run to resume, the settings in its config.json).

    out: the folder; "" = the newest run under runs/RECIPE that has begun. Raises ValueError if there is none.
    """
    parent = Path("runs") / recipe
    if out:
        path, where = Path(out), f"{out} holds no run"
    else:
        begun = [child for child in _numbered(parent) if has_begun(child)]
        path, where = (begun[-1] if begun else parent), f"no run under {parent} has begun"
    if not (path / CONFIG).is_file():
        raise ValueError(f"--resume was given but {where}; drop --resume, or pass the --out of the run")
    return path, json.loads((path / CONFIG).read_text(encoding="utf-8"))


def _has_grown(before: int | str, now: int | str) -> bool:
    """Return whether a number is larger now, or a comma-separated list longer.

    Numbers of a list may be added anywhere, names only at its end.
    """
    if not isinstance(before, str):
        return before < now
    had, has = before.split(","), now.split(",")
    return set(had) < set(has) if had[0].isdigit() else has[: len(had)] == had


def recipe_name(config_class: type) -> str:
    """Return the file name, without .py, of the recipe that a Config belongs to."""
    return Path(getattr(sys.modules[config_class.__module__], "__file__", "notebook")).stem


def next_folder(parent: Path) -> Path:
    """Return the next free numbered folder under parent, 001 first."""
    return parent / f"{max((int(child.name) for child in _numbered(parent)), default=0) + 1:03d}"


def _numbered(parent: Path) -> list[Path]:
    """Return the numbered folders under parent, in their order."""
    numbered = (child for child in parent.glob("[0-9]*") if child.name.isdigit())
    return sorted(numbered, key=lambda child: int(child.name))


def kept_traces(run: Path) -> int:
    """Return on how many traces a run is trained; 0 if that is not known."""
    counts = run / "drop_counts.json"
    return json.loads(counts.read_text(encoding="utf-8")).get("kept", 0) if counts.is_file() else 0


def write_json(path: Path, value) -> None:
    """Write the file whole or not at all: a kill leaves the old file or the new one."""
    _replace(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def digest(*parts: str) -> str:
    """Return a 128-bit hash of the parts, as hex."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(json.dumps(part).encode())  # quoted, so that ("ab", "c") and ("a", "bc") differ
    return state.hexdigest()


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
