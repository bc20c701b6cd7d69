"""The drop statistics: how many rows of the training data were kept, and why the others were not.

They also say how many problems share eight words in a row with a benchmark's: a usual sign of a leak. It is
no proof: stock phrases ("what is the sum of all possible values of") count, too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kit.data.rows import same_space

WORDS = 8  # in a row; a shorter problem has to be the same as a whole


@dataclass
class DropCounts:
    """How many rows were kept and dropped, by reason. Printed before training and stored with the run."""

    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    bad_rows: list[str] = field(default_factory=list)  # where: reason
    noted: Counter = field(default_factory=Counter)  # what else is to be known of the rows that were read
    wanted: int = 0  # traces asked for; 0 = all
    formats: Counter = field(default_factory=Counter)  # rows read, by the names of kit.data.formats
    # benchmark -> how many of the problems share words with one of its problems; None = not checked
    overlaps: Mapping[str, int | None] = field(default_factory=dict)

    def __str__(self) -> str:
        few = f" ({self.wanted:,} were asked for, but no more qualify)" if self.kept < self.wanted else ""
        text = f"{self.kept:,} traces kept{few}, {self.dropped.total():,} dropped"
        for title, counts in ((": ", self.dropped), (". Of the rows read, ", self.noted)):
            listed = "; ".join(f"{count:,} {what}" for what, count in counts.most_common() if count)
            text += title + listed if listed else ""
        if self.formats:
            by_format = self.formats.most_common()
            named = (f"{count:,} {name}" if len(by_format) > 1 else name for name, count in by_format)
            text += f". Format: {'; '.join(named)}"
        return text + self._overlap()

    def _overlap(self) -> str:
        """Say how many problems share words with each benchmark, and which benchmarks were not checked."""
        checked = [f"{name} {count:,}" for name, count in self.overlaps.items() if count is not None]
        others = [name for name, count in self.overlaps.items() if count is None]
        text = f". Problems that share {WORDS} words in a row with a benchmark's: {', '.join(checked)}"
        return text * bool(checked) + f". Not checked for overlap: {', '.join(others)}" * bool(others)


def runs_of_words(text: str) -> set[str]:
    """Return all runs of WORDS words of a text; of a shorter one, the text itself."""
    text = same_space(text.casefold())
    words = re.findall(r"\w+", text)
    if len(words) < WORDS:
        return {text}
    return {" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


def count_overlaps(
    problems: Iterable[str], benchmarks: Mapping[str, Sequence[str] | None]
) -> dict[str, int | None]:
    """Count, for each benchmark, the problems that share a run of words with one of its own.

    benchmarks: name -> problems; None = not at hand, and so is its count.
    """
    at_hand = {name: texts for name, texts in benchmarks.items() if texts is not None}
    known = {name: set().union(*map(runs_of_words, texts)) for name, texts in at_hand.items()}
    counts = {name: 0 if name in known else None for name in benchmarks}
    for problem in problems:
        runs = runs_of_words(problem)
        for name, its_runs in known.items():
            counts[name] += not runs.isdisjoint(its_runs)
    return counts
