"""The place in an answer's tokens where its parser reads, and how deep it is."""

from __future__ import annotations

import time

from kit.grade.limits import ParseError, TooLarge, Undecided
from kit.grade.reading.tokens import tokenize

SIGNS = frozenset(("op", "cmd", "sep", "row"))  # kinds of tokens that are compared by their value
MAX_DEPTH = 80  # two a bracket: 40 brackets, some 320 Python frames of the 1,000 allowed; real answers nest about 5 brackets


class Cursor:
    """The tokens of one answer, read from left to right; the last one is `end` and stays."""

    def __init__(self, text: str, deadline_at: float):
        self.tokens = tokenize(text, deadline_at)
        self.deadline_at = deadline_at
        self.index = 0
        self.depth = 0

    def peek(self, ahead: int = 0) -> tuple[str, object]:
        return self.tokens[min(self.index + ahead, len(self.tokens) - 1) if ahead else self.index][:2]

    def take(self) -> tuple[str, object]:
        kind, value, _ = self.tokens[self.index]
        if kind != "end":  # which stays the token that is looked at
            self.index += 1
        return kind, value

    def accept(self, *values: str) -> str | None:
        kind, value, _ = self.tokens[self.index]
        if kind in SIGNS and value in values:
            self.index += 1
            return value
        return None

    def expect(self, value: str) -> None:
        if not self.accept(value):
            raise ParseError(f"expected {value!r}, found {self.peek()[1]!r}")

    def enter(self) -> None:
        self.depth += 1
        if time.monotonic() > self.deadline_at:
            raise Undecided("deadline")
        if self.depth > MAX_DEPTH:
            raise TooLarge(f"an answer nested deeper than {MAX_DEPTH} levels")
