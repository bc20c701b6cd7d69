"""Logs of samples: one file per benchmark, to which several ranks append at once."""

from __future__ import annotations

import glob
from pathlib import Path

from kit.journal import Journal, Kind, write_rows
from kit.ranks import here

OF_RANK = ".rank"  # math500.rank1.jsonl beside math500.jsonl
SAMPLE = Kind(
    "sample",
    {
        "question": str,
        "sample": int,
        "problem": str,
        "answer": str,
        "tokens": int,
        "finished": bool,
        "verdict": str,
        "prediction": (str, type(None)),  # None: no answer was found
        "text": str,
    },
    key=("question", "sample"),
)


class SampleLog(Journal):
    """The samples of one benchmark. Each rank appends to a file of its own, and reading joins them."""

    def __init__(self, path: Path):
        super().__init__(path, SAMPLE)

    @property
    def own(self) -> Path:
        rank = here().rank
        return self.path.with_name(f"{self.path.stem}{OF_RANK}{rank}.jsonl") if rank else self.path

    @property
    def files(self) -> list[Path]:
        others = self.path.parent.glob(f"{glob.escape(self.path.stem)}{OF_RANK}*.jsonl")
        return [self.path, *sorted(others)]

    def begin(self, header: dict) -> None:
        """Write the header, if this rank's file is empty."""
        if not any(self._numbered(self.own)):
            self.append({"header": header})

    def join(self) -> None:
        """Make one file of all ranks' files, once all have written their last row."""
        self.sync()
        if others := self.files[1:]:
            write_rows(self.path, self.read())
            for other in others:
                other.unlink()


def logs_in(folder: Path) -> list[Path]:
    """Return the logs of samples in a folder: one per benchmark."""
    return sorted(file for file in folder.glob("*.jsonl") if OF_RANK not in file.stem)


def kept_samples(journal: Journal, header: dict, source: str) -> list[tuple[str, int]]:
    """Return (question, sample) of each row in a journal. source: of the questions.

    Raises ValueError if it has another header.
    """
    rows = journal.read()
    if not rows:
        return []
    stored = rows[0].get("header", {})
    if stored.get("questions", header["questions"]) != header["questions"]:
        raise ValueError(
            f"the questions or answers in {source} are no longer those of the samples in {journal.path}; "
            "restore the file, or begin a new run in another --out"
        )
    changed = [f"{k} was {stored.get(k)!r}, is {header[k]!r}" for k in header if stored.get(k) != header[k]]
    if changed:
        raise ValueError(
            f"{journal.path} holds samples with other settings: {'; '.join(changed)}; "
            "use another folder or delete the file"
        )
    return [(row["question"], row["sample"]) for row in rows[1:]]
