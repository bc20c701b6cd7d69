"""What a response's text shows: reflection by the paper's keywords, a repetition loop at its end, where its boxed answers stand.

Everything is read from the text alone, so that it can be counted again from a log of samples.
"""

from __future__ import annotations

import re

from kit.grade.reading import group_ends

# the paper's keywords (section "Why it happens"). It also asks a language model whether each match is a real reflection: keywords
# alone are an upper bound
KEYWORDS = (
    "recheck", "rethink", "reassess", "reevaluate", "re-evaluate", "reevaluation", "re-examine", "reexamine", "reconsider",
    "reanalyze", "double-check", "check again", "think again", "verify again", "go over the steps",
)  # fmt: skip
REFLECTION = re.compile("|".join(map(re.escape, KEYWORDS)), re.IGNORECASE)
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")

LOOP_UNIT = 512  # characters at most in what is repeated: a long paragraph
LOOP_TIMES = 4  # a unit said three times may be a table or a refrain
LOOP_CHARACTERS = 128  # in all: "0000" and "......" are not loops


def reflects(text: str) -> bool:
    """Whether one of the paper's keywords occurs, in any case and inside words ("rechecking"): an upper bound on reflection."""
    return REFLECTION.search(text) is not None


def ends_in_loop(text: str) -> bool:
    """Whether the text ends in a repetition loop.

    It does when its last characters are one unit of at most LOOP_UNIT characters over and over, the last one perhaps cut off:
    at least LOOP_TIMES units and at least LOOP_CHARACTERS characters. A loop that the model found its way out of is not counted.
    """
    tail = text[
        : -1 - max(LOOP_UNIT * LOOP_TIMES, LOOP_CHARACTERS) : -1
    ]  # backwards, so that a loop is a periodic prefix
    matches = _matches_with_start(tail)
    for period in range(1, min(LOOP_UNIT, len(tail) - 1) + 1):
        if period + matches[period] >= max(LOOP_TIMES * period, LOOP_CHARACTERS):
            return True
    return False


def _matches_with_start(text: str) -> list[int]:
    """For every place, how many characters from there on are those the text begins with (the Z function, in linear time)."""
    matches = [0] * len(text)
    left = right = 0  # the match that reaches furthest
    for i in range(1, len(text)):
        length = min(right - i, matches[i - left]) if i < right else 0
        while i + length < len(text) and text[length] == text[i + length]:
            length += 1
        matches[i] = length
        if i + length > right:
            left, right = i, i + length
    return matches


def boxes(text: str) -> list[tuple[int, int]]:
    r"""(start, end) of every complete \boxed{...} that stands in no other, in the text's order."""
    ends, found = group_ends(text), []
    for match in BOX.finditer(text):
        end = ends.get(match.end() - 1)
        if end is not None and not (found and match.start() < found[-1][1]):
            found.append((match.start(), end + 1))
    return found
