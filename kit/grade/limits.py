"""How much the grader reads before it gives up, and what it raises where it cannot read or decide."""

from __future__ import annotations

import time

MAX_CHARS = 60_000  # a list of 3,000 numbers has about 20,000 characters
MAX_DIGITS = 4_000  # Python itself refuses int() beyond 4,300 digits: that limit is quadratic time


class ParseError(ValueError):
    """The text is not an answer in a notation that the parser knows."""


class Undecided(ValueError):
    """Equality could not be decided within the caps or the deadline; the message is the rule that the verdict reports."""


class TooLarge(ValueError):
    """The answer is beyond a cap on length, depth, digits or size: it cannot be compared, which is not the same as wrong."""


class NotNumeric(ValueError):
    """The expression has no number as its value: a symbol is unbound, a function unknown, a set where a number belongs."""


class Undefined(ValueError):
    """The value does not exist at this point (a division by zero, say)."""


class Budget:
    """Steps and time that one comparison may spend."""

    def __init__(self, deadline_at: float, steps: int = 400_000):
        self.deadline_at = deadline_at
        self.steps = steps

    def spend(self, steps: int = 1) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise Undecided("too many steps")
        if time.monotonic() > self.deadline_at:
            raise Undecided("deadline")
