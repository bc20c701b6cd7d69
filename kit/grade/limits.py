"""The grader's caps, and the errors it raises if it cannot read or decide."""

from __future__ import annotations

import time

MAX_CHARS = 60_000  # a list of 3,000 numbers has about 20,000 characters
MAX_DIGITS = 4_000  # int() takes quadratic time, and Python refuses more than 4,300 digits


class ParseError(ValueError):
    """The parser does not know the notation of the text."""


class Undecided(ValueError):
    """Equality could not be decided within the caps or the deadline. The verdict's rule is the message."""


class TooLarge(ValueError):
    """The answer exceeds a cap on length, depth, digits or size, so the verdict is `unknown`."""


class NotNumeric(ValueError):
    """The expression has no number as its value: an unbound symbol, an unknown function, a set."""


class Undefined(ValueError):
    """The value does not exist at this point, for example because of a division by zero."""


class Budget:
    """The steps and the time that one comparison may use."""

    def __init__(self, deadline_at: float, steps: int = 400_000):
        self.deadline_at = deadline_at
        self.steps = steps

    def spend(self, steps: int = 1) -> None:
        """Count the steps. Raises Undecided if the steps or the time are used up."""
        self.steps -= steps
        if self.steps < 0:
            raise Undecided("too many steps")
        if time.monotonic() > self.deadline_at:
            raise Undecided("deadline")
