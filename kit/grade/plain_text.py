"""Tier 0 of the grader: normalise answers as plain text and exact fractions, in microseconds."""

from __future__ import annotations

import re

from kit.grade.reading import clean
from kit.grade.vocabulary import FONT_COMMANDS, TEXT_COMMANDS


def normal(text: str) -> str:
    """Return the text as tier 0 compares it.

    Delimiters, spacing, font commands, thousands separators and final full stops are removed.
    """
    if INTEGER.fullmatch(text):
        return str(int(text))
    text = clean(text).strip()
    is_marked_up = "\\" in text or "$" in text
    if "\\" in text:
        for _ in range(4):
            unwrapped = _UNWRAP.sub(r"\1", text)
            if unwrapped == text:
                break
            text = unwrapped
    # 1,234 and 1{,}234 are 1234; a comma inside brackets separates entries
    if "," in text and not any(bracket in text for bracket in ("(", "[", "\\{")):
        text = _GROUPED.sub(lambda match: match[1] + re.sub("[^0-9]", "", match[2]), text)
    if is_marked_up:
        text = _NOISE.sub(" ", text).replace("\\%", "%")
        if "frac" in text:
            text = text.replace("dfrac", "frac").replace("tfrac", "frac").replace("cfrac", "frac")
    text = " ".join(text.split())  # keep one space: 1  1/2 must not become 11/2
    if " " in text:
        text = _SPACES.sub("", text)
    return text.rstrip(".,;")


def plain_number(text: str) -> tuple[int, int, bool] | None:
    """Return (numerator, denominator, whether a decimal) of a plain integer, decimal or fraction, or None."""
    if len(text) > 400:
        return None
    match = _FRACTION.fullmatch(text)
    if match:
        numerator, denominator = int(match[2] or match[3]), int(match[4] or match[5])
        return (-numerator if match[1] else numerator, denominator, False) if denominator else None
    match = _PLAIN.fullmatch(text)
    if not match or not (match[2] or match[3]):
        return None
    sign = -1 if match[1] == "-" else 1
    if match[4]:
        return (sign * int(match[2]), int(match[4]), False) if match[2] and int(match[4]) else None
    decimals = match[3] or ""
    return sign * int((match[2] or "0") + decimals), 10 ** len(decimals), bool(decimals)


def only_letters(text: str) -> str:
    """Return a normalised text in lower case and without spaces, for texts that are not mathematics.

    A space between digits stays: 1 2 is not 12.
    """
    return _NOT_BETWEEN_DIGITS.sub("", text.casefold())


_UNWRAP = re.compile(
    r"\\(?:" + "|".join(sorted(TEXT_COMMANDS | FONT_COMMANDS | {"boxed", "fbox"})) + r")\s*\{([^{}]*)\}"
)
_NOISE = re.compile(
    r"\\(?:(?:left|right|[bB]igg?[lr]?|displaystyle|limits|q?quad)(?![A-Za-z])|[,!;:> ()\[\]$])|\$|`|\""
)
_SPACES = re.compile(r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) ")
_NOT_BETWEEN_DIGITS = re.compile(r" (?![0-9])|(?<![0-9]) ")
_GROUPED = re.compile(
    r"(?<![0-9.,])([0-9]{1,3})((?:(?:,|\{,\}|(?:\\!)?,\\!\s*|\\,)[0-9]{3})+)(?![0-9]|,[0-9])"
)
_FRACTION = re.compile(
    r"(-?)\\[dtc]?frac\s*(?:\{\s*(-?[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))"
)
_PLAIN = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*)|/([0-9]+))?")

INTEGER = re.compile(r"-?[0-9]{1,18}")
