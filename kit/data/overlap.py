"""How many training problems share eight words in a row with a benchmark's: a usual sign of a leak.

It is no proof: stock phrases ("what is the sum of all possible values of") count, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from kit.data.rows import same_space

WORDS = 8  # in a row; a shorter problem has to be the same as a whole


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
