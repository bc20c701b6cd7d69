"""The position of the parser in an answer's tokens, and its depth of nesting."""

from __future__ import annotations

import time

from kit.grade.limits import ParseError, TooLarge, Undecided
from kit.grade.reading.tokens import tokenize

SIGNS = frozenset(("op", "cmd", "sep", "row"))  # kinds of tokens that are compared by their value
# Two levels per bracket: 40 brackets, which take some 320 of the 1,000 frames that Python allows. Real
# answers nest about 5 brackets.
MAX_DEPTH = 80


class Cursor:
    """Reads the tokens of one answer from left to right. The last token is `end` and is never passed."""

    def __init__(self, text: str, deadline_at: float):
        self.tokens = tokenize(text, deadline_at)
        self.deadline_at = deadline_at
        self.index = 0
        self.depth = 0

    def peek(self, ahead: int = 0) -> tuple[str, object]:
        """Return (kind, value) of the next token, or of one further ahead."""
        return self.tokens[min(self.index + ahead, len(self.tokens) - 1) if ahead else self.index][:2]

    def take(self) -> tuple[str, object]:
        """Return (kind, value) of the next token and pass it."""
        kind, value, _ = self.tokens[self.index]
        if kind != "end":
            self.index += 1
        return kind, value

    def accept(self, *values: str) -> str | None:
        """Pass the next token if it is one of these signs, and return it; else return None."""
        kind, value, _ = self.tokens[self.index]
        if kind in SIGNS and value in values:
            self.index += 1
            return value
        return None

    def expect(self, value: str) -> None:
        """Pass the sign that must come next. Raises ParseError if another token does."""
        if not self.accept(value):
            raise ParseError(f"expected {value!r}, found {self.peek()[1]!r}")

    def enter(self) -> None:
        """Go one level deeper. Raises Undecided at the deadline and TooLarge beyond MAX_DEPTH."""
        self.depth += 1
        if time.monotonic() > self.deadline_at:
            raise Undecided("deadline")
        if self.depth > MAX_DEPTH:
            raise TooLarge(f"an answer nested deeper than {MAX_DEPTH} levels")
