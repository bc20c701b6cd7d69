"""Journal: a file of JSON lines that a run appends to and that survives a kill with at most its last line lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path


class Journal:
    """Append-only rows. Opening it cuts off a line that a kill left half-written, so that no row is ever glued to it."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            content = self.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                _replace(self.path, whole)

    def append(self, row: dict) -> None:
        """One row, handed to the operating system at once: killing the process does not lose it. NaN and inf become text."""
        line = json.dumps({key: _finite(value) for key, value in row.items()}, ensure_ascii=False, allow_nan=False)
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")

    def read(self) -> list[dict]:
        """All rows, oldest first; none where the file does not exist. Raises ValueError naming a line that is not JSON."""
        if not self.path.exists():
            return []
        rows = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").split("\n"), 1):
            try:
                rows += [json.loads(line)] if line else []
            except json.JSONDecodeError as error:
                raise ValueError(f"{self.path}:{number} is not JSON ({error}); delete that line to go on without it") from error
        return rows

    def keep(self, wanted: Callable[[dict], bool]) -> None:
        """Drop the rows that are not wanted (steps after the checkpoint a run resumes from)."""
        rows = self.read()
        if not all(wanted(row) for row in rows):
            replace_rows(self.path, [row for row in rows if wanted(row)])


def replace_rows(path: Path, rows: list[dict]) -> None:
    """The file with these rows, whole or not at all."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _replace(path, "".join(lines).encode("utf-8", errors="backslashreplace"))


def _finite(value):
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_bytes(content)
    scratch.replace(path)
