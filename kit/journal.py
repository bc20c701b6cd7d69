"""Logs: files of rows that are only appended. Each says what its rows must be."""

from __future__ import annotations

import codecs
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from kit.disk import sync_file, sync_folder, write_whole
from kit.lock import hold
from kit.ranks import here

CONFIG = "config.json"  # what makes a folder that of a run
NUMBER = (int, float)
UNDECIDED = (*NUMBER, type(None))  # null: the grader could not decide
DELETE = "delete that line to continue"
_said: set[str] = set()  # about doubled rows, by this process


@dataclass(frozen=True)
class Kind:
    """What the rows of a log are, and what each must have. One header may come before them."""

    name: str = "row"
    fields: Mapping[str, type | tuple] = field(default_factory=dict)  # name -> type of its value
    key: tuple[str, ...] = ()  # fields that together name a row, which is counted once; () = none do

    def problem(self, row: object) -> str:
        """Return why this is not such a row; "" = it is one."""
        if not isinstance(row, dict):
            return f"it is {type_of(row)}, not an object with fields"
        for name, wanted in self.fields.items():
            if name not in row:
                return f"it has no `{name}`"
            if not isinstance(row[name], wanted):
                return f"its `{name}` is {type_of(row[name])}"
        return ""

    def with_numbers(self, *names: str) -> Kind:
        """Return the same kind, whose rows must have these numbers, too."""
        return replace(self, fields={**self.fields, **dict.fromkeys(names, NUMBER)})


HEADER = Kind("header", {"header": dict})
REWARD = "reward: "  # before the name of a reward, in the rows of a step
STEP = Kind("step", {"step": int}, key=("step",))
MEASUREMENT = Kind("measurement", {"step": int, "benchmarks": dict}, key=("step",))  # during training
ROLLOUT = Kind(
    "rollout",
    {"step": int, "question": str, "reward": UNDECIDED, "tokens": int, "finished": bool, "text": str},
    key=("step", "sample"),
)


def type_of(value: object) -> str:
    """Return the type of a value, as JSON calls it."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


class Journal:
    """Rows of a file, one JSON object per line, which are only appended. `kind`: what they must be.

    Reading changes nothing, and leaves out a last line that is half-written: the run may still be going.
    Whatever writes locks the run's folder first, and then cuts off such a line, which a kill has left.
    Of several ranks only the first writes; of the others, writing does nothing.
    """

    def __init__(self, path: Path | str, kind: Kind | None = None):
        self.path, self.kind = Path(path), kind or Kind()

    @property
    def own(self) -> Path | None:
        """The file that this rank writes; None = none."""
        return self.path if here().is_first else None

    @property
    def files(self) -> list[Path]:
        """The files that hold the rows."""
        return [self.path]

    def append(self, row: dict) -> None:
        """Write one row to the operating system at once, so that killing the process does not lose it.

        A power cut may lose the last rows, until `sync`: they are sampled or trained again. NaN and inf
        become text, at any depth. Raises ValueError if another process works in the run's folder.
        """
        if self.own is None:
            return
        line = _line(_finite(row), allow_nan=False)
        self.lock()
        self.own.parent.mkdir(parents=True, exist_ok=True)
        with self.own.open("ab+") as file:
            if file.tell() and not _ends_line(file):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line)

    def lock(self) -> None:
        """Lock the folder of the run, as `append` does. Raises ValueError if another process works in it."""
        hold(run_of(self.path))

    def sync(self) -> None:
        """Flush all rows to the disk: nothing that counts on them, such as a checkpoint, may come before."""
        if self.own and self.own.exists():
            sync_file(self.own)
            sync_folder(self.own.parent)

    def read(self) -> list[dict]:
        """Return all rows, oldest first; none if the file does not exist.

        A row whose key is that of an earlier one is left out, and how many there are is printed.
        Raises ValueError naming file and line of the first that is not what it must be.
        """
        rows, keys, doubled = [], set(), []
        for number, row in (numbered for file in self.files for numbered in self._numbered(file)):
            if "header" in row and rows:  # of another rank
                if row != rows[0]:
                    raise ValueError(
                        f"{self.path} and the files of other ranks beside it have other headers; delete those"
                    )
                continue
            key = tuple(row.get(name) for name in self.kind.key)
            if key and None not in key and key in keys:
                doubled.append(number)
                continue
            keys.add(key)
            rows.append(row)

        if doubled:
            key = " and ".join(self.kind.key)
            said = (
                f"{self.path}: {len(doubled):,} of its rows (the first: line {doubled[0]}) have the {key} of "
                "an earlier one, so they are not counted"
            )
            if said not in _said:
                print(said, file=sys.stderr)
            _said.add(said)
        return rows

    def _numbered(self, path: Path) -> Iterator[tuple[int, dict]]:
        """Yield (line number, row) for every whole line of a file that is not blank."""
        content = path.read_bytes() if path.exists() else b""
        is_first = True
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            if not line.strip():
                continue
            try:
                row = self._parse(line, is_first)
            except ValueError as error:
                raise ValueError(f"{path}:{number} {error}") from error
            yield number, row
            is_first = False

    def _parse(self, line: bytes, is_first: bool) -> dict:
        """Return the row in a line. Raises ValueError saying what is wrong with it, and what to do."""
        if line.startswith(codecs.BOM_UTF8):
            raise ValueError("begins with a byte order mark (BOM); save the file as UTF-8 without one")
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise ValueError(
                f"is not UTF-8 ({error.reason} at byte {error.start}); {DELETE}, or save the file as UTF-8"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not JSON ({error}); {DELETE}") from error

        kind = HEADER if isinstance(row, dict) and "header" in row else self.kind
        if kind is HEADER and not is_first:
            raise ValueError(
                f"is a second header: two logs are mixed here; {DELETE} if it equals the first, otherwise "
                f"move its {self.kind.name}s to a file of their own"
            )
        article = "an" if kind.name[0] in "aeiou" else "a"
        if problem := kind.problem(row):
            raise ValueError(f"is not {article} {kind.name}: {problem}; {DELETE}")
        return row

    def keep(self, wanted: Callable[[dict], bool]) -> None:
        """Drop the rows that are not wanted, such as steps after the checkpoint that a run resumes from."""
        if self.own is None:
            return
        self.lock()
        rows = self.read()
        if not all(wanted(row) for row in rows):
            write_rows(self.path, [row for row in rows if wanted(row)])


def run_of(file: Path) -> Path:
    """Return the folder of the run that a file belongs to, to be locked: its own, or the run around that."""
    folder = file.resolve().parent
    around = (folder, *folder.parents[:2])  # samples lie in run/before, or in run/during/step_000250
    return next((path for path in around if (path / CONFIG).is_file()), folder)


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write a file of these rows, whole or not at all."""
    write_whole(path, b"".join(map(_line, rows)))


def _line(row: dict, *, allow_nan: bool = True) -> bytes:
    """Return a row as a line. Half of a surrogate pair, which a model may write, becomes its code."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=allow_nan) + "\n"
    return text.encode("utf-8", errors="backslashreplace")


def _ends_line(file) -> bool:
    """Return whether a file, open for appending and reading, ends with a whole line."""
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _finite(value):
    """Return a value with text in the place of NaN and inf, also inside lists and objects."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
