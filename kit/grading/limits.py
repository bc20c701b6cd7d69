"""How much the grader reads before it gives up, and what it raises where it cannot read or decide."""

MAX_CHARS = 60_000  # a list of 3,000 numbers has about 20,000 characters
MAX_DIGITS = 4_000  # Python itself refuses int() beyond 4,300 digits: that limit is quadratic time


class ParseError(ValueError):
    """The text is not an answer in a notation that the parser knows."""


class Undecided(ValueError):
    """Equality could not be decided within the caps or the deadline; the message is the rule that the verdict reports."""


class TooLarge(ValueError):
    """The answer is beyond a cap on length, depth, digits or size: it cannot be compared, which is not the same as wrong."""
