"""What a response's text shows: reflection by the paper's keywords, a loop at its end, its boxed answers.

Everything is read from the text alone, so it can be counted again from a log of samples.
"""

from __future__ import annotations

import re

from kit.grade.reading import group_ends
from kit.paper import KEYWORDS

REFLECTION = re.compile("|".join(map(re.escape, KEYWORDS)), re.IGNORECASE)
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")

LOOP_UNIT = 512  # characters in the repeated unit, at most: a long paragraph
LOOP_TIMES = 4  # repetitions, at least: three may be a table or a refrain
LOOP_CHARACTERS = 128  # in all, at least: "0000" and "......" are not loops


def reflects(text: str) -> bool:
    """Return whether one of the paper's keywords occurs, in any case and also inside words ("rechecking")."""
    return REFLECTION.search(text) is not None


def ends_in_loop(text: str) -> bool:
    """Return whether the last characters repeat one unit; the last unit may be cut off.

    A unit has at most LOOP_UNIT characters, and is repeated at least LOOP_TIMES times and over at least
    LOOP_CHARACTERS characters. A loop that the model left again does not count.
    """
    for period in range(1, LOOP_UNIT + 1):
        length = max(LOOP_TIMES * period, LOOP_CHARACTERS)
        end = text[-length:]
        if len(end) == length and end[period:] == end[:-period]:
            return True
    return False


def boxes(text: str) -> list[tuple[int, int]]:
    r"""Return the (start, end) of every complete \boxed{...} that is not inside another, in order."""
    ends, found = group_ends(text), []
    for match in BOX.finditer(text):
        end = ends.get(match.end() - 1)
        if end is not None and not (found and match.start() < found[-1][1]):
            found.append((match.start(), end + 1))
    return found
