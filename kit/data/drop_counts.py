"""The drop statistics: how many rows of the training data were kept, and why the others were not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from kit.data.overlap import WORDS


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
