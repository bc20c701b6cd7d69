"""What a setting may be: the brackets at the end of the comment behind it.

    # passes over the traces [1..1000]            a number in between, or one of the ends
    # peak learning rate [> 0, <= 1]              both must hold
    # 0 = greedy [0 | 0.001..1000]                one must hold
    # [cuda | cpu]                                one of these words
    # traces of each model [1..1000000, ...]      a text that lists such numbers or words, with commas between

In a text, numbers are whole unless the brackets hold a decimal point. --help shows the brackets, and a Config
is checked against them whenever one is made (kit/config.py).
"""

from __future__ import annotations

import difflib
import math
import operator
import re

BRACKETS = re.compile(r" *\[([^][]*)\]$")  # at the end of a comment
NUMBER = r"(-?\d+(?:\.\d+)?)"
COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "": operator.eq}


class Range:
    """The values that a setting may have. text: what stands between the brackets."""

    def __init__(self, text: str):
        self.is_list = text.endswith(", ...")
        options = text.removesuffix(", ...").split(" | ")
        self.words = [option for option in options if re.fullmatch(r"[A-Za-z][\w+-]*", option)]
        self.numbers = [option for option in options if option not in self.words]
        self.conditions = [_conditions(option) for option in self.numbers]
        self.is_whole = not re.search(r"\d\.\d", text)

    def problem(self, value: float | str) -> str:
        """Return what is wrong with a value, such as "must be > 0"; "" if nothing is."""
        items = [value]
        if self.is_list:
            items = [item.strip() for item in value.split(",") if item.strip()] or [""]
        wrong = next((item for item in items if not self._holds(item)), None)
        if wrong is None:
            return ""
        near = difflib.get_close_matches(str(wrong), self.words, n=1)
        which = f"{wrong!r} in it " if self.is_list and len(items) > 1 else ""
        return f"{which}must be {self._in_words(isinstance(value, str))}" + "".join(
            f"; did you mean {word}?" for word in near
        )

    def _holds(self, item: float | str) -> bool:
        if isinstance(item, str):
            if item in self.words:
                return True
            try:
                item = int(item) if self.is_whole else float(item)
            except ValueError:
                return False
        return math.isfinite(item) and any(
            all(compare(item, end) for compare, end in conditions) for conditions in self.conditions
        )

    def _in_words(self, is_text: bool) -> str:
        kind = ("a whole number " if self.is_whole else "a number ") if is_text else ""
        numbers = [f"in {option}" if ".." in option else option for option in self.numbers]
        *first, last = [*self.words, *(kind + option.replace(", ", " and ") for option in numbers)]
        return f"{', '.join(first)} or {last}" if first else last


def _conditions(option: str) -> list[tuple]:
    """Return (comparison, number) of each condition. Raises TypeError if it cannot be read."""
    if span := re.fullmatch(rf"{NUMBER}\.\.{NUMBER}", option):
        return [(operator.ge, float(span[1])), (operator.le, float(span[2]))]
    found = [re.fullmatch(rf"(>=|<=|>|<|) ?{NUMBER}", part) for part in option.split(", ")]
    if None in found:
        raise TypeError(f"[{option}] is not a range; kit/ranges.py shows how one is written")
    return [(COMPARISONS[match[1]], float(match[2])) for match in found]
