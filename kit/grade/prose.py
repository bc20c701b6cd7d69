"""Find the value that prose ends with: the last mathematics or number, and the list around it."""

from __future__ import annotations

import re

from kit.grade.reading import clean
from kit.grade.vocabulary import FUNCTIONS, GREEK, MULTIPLIERS, UNITS, names

MAX_SENTENCE = 200  # characters before the last value in which its sentence is looked for
MAX_SPANS = 12  # pairs of delimiters that are tried, from the end; an earlier pair is not the answer

SENTENCE_END = re.compile(r"\n|(?<!i\.e)(?<!e\.g)\.(?=\s|$)|。|<\|")
_COPULA = re.compile(
    r"(?:\b(?:is|are|was|were|be|equals?|equal to)\b"
    r"(?:\s(?:at|either|exactly|only|then|thus|therefore)\b)?|:)[\s:]*"
    r"|(?=(?:\$|(?<![\w\\$.]))(?:-?[0-9]+\s?[<≤]=?\s?)?[A-Za-z](?:_\w)?\s?[=<>≤≥])"
)
_ASIDE = re.compile(r"\b(?:that|which) is[\s:]*\Z")
_LISTED = re.compile(r"[,;]|\b(?:and|or)\b")
_NAMES = re.compile(r"(?:\A|[,;\s($])([A-Za-z](?:_\w)?)\s?[=<>≤≥]")
NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.^])(?:(?<![\w)\]}])[-−]\s?)?\$?"
    r"(?:[0-9]{1,3}(?:(?:,|\{,\}|,\\!|\s)[0-9]{3})+(?![0-9])|[0-9]+)?"
    r"(?:(?<=[0-9])[.,][0-9]+|(?<![0-9])\.[0-9]+|(?<=[0-9]))"
    r"(?:/[0-9]+(?![0-9])|(?:(?:\s:\s|:)[0-9]+)+)?"
    r"(?:\s?\\?%|\s(?:hundred|thousand|million|billion|trillion)s?\b)?"
)
_TEXT_GROUP = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox|operatorname|begin|end)\s*\{[^{}]*\}"
)
_WORDS = re.compile(r"[^\W\d_]+")
_COMMANDS = re.compile(r"\\[A-Za-z]+")
_PROSE = names(
    "the is are was be it its of so we he she you they not no but can for has had to as at by if on that "
    "this thus hence an"
)
_MATH_WORDS = (
    FUNCTIONS
    | GREEK
    | frozenset(MULTIPLIERS)
    | names("and or sqrt cbrt binom infinity infty inf pi percent pct")
)
_LONE_SYMBOL = re.compile(r"\s*(?:[A-Za-z]|\\[A-Za-z]+)\s*")


def _words_of(text: str) -> list[str]:
    """Return the words of a text outside \\text{} that are not commands."""
    return _WORDS.findall(_COMMANDS.sub(" ", _TEXT_GROUP.sub(" ", text)) if "\\" in text else text)


def is_bare(text: str) -> bool:
    """Whether a text is an answer by itself.

    Mathematics, units, connectives and words inside \\text{} are; prose is not.
    """
    if not text.isascii():
        text = clean(text)
    for word in _words_of(text):
        lower = word.lower()
        if lower in _PROSE or not word.isascii():
            return False
        if len(word) >= 4 and not (word.isupper() or lower in _MATH_WORDS or lower in UNITS):
            return False
    return True


def last_value(text: str) -> tuple[str | None, str]:
    """Return (value, place): the last mathematics between delimiters, or the last number after it."""
    span = _last_span(text)
    number, where = None, -1
    for match in NUMBER.finditer(text, span[1] if span else 0):
        if match[0]:
            number, where = match[0].strip(), match.start()
    predicate = _predicate(text, span[0] if number is None and span else where)
    if predicate is not None and predicate not in (number, span and text[span[0] : span[1]]):
        return predicate, "last statement"
    if number is not None:
        return number, "last number"
    if span is not None:
        return text[span[0] : span[1]], "last mathematics"
    return None, ""


def _predicate(text: str, position: int) -> str | None:
    """Return all that the sentence around the last value states: the solutions are 1, 3 and 5.

    Return None if what follows "are" is not mathematics up to the end.
    """
    if position < 0:
        return None
    start = max(
        (match.end() for match in SENTENCE_END.finditer(text, max(0, position - MAX_SENTENCE), position)),
        default=0,
    )
    start = max(start, position - MAX_SENTENCE)
    end = SENTENCE_END.search(text, position)
    sentence = text[start : end.start() if end else len(text)][: 2 * MAX_SENTENCE].rstrip(" *")
    for match in _COPULA.finditer(sentence, 0, position - start + 1):
        tail = sentence[match.end() :].strip(" *")
        if is_bare(tail) and _is_plain(tail):
            named = match.end() > match.start() or len(set(_NAMES.findall(tail))) == 1
            # a list, but not the two values of "that is 4 or 9", nor what "each side is 5, 5 * 4 = 20" says
            stated = not _LISTED.search(tail) or (
                ("=" not in tail or _NAMES.match(tail)) and not _ASIDE.search(sentence[: match.end()])
            )
            if named and stated and tail.count("$") % 2 == 0:
                return tail
    return None


def _is_plain(text: str) -> bool:
    """Whether all words of a bare text are mathematics: single letters, functions, units."""
    return all(
        len(word) == 1 or word.isupper() or word.lower() in _MATH_WORDS or word.lower() in UNITS
        for word in _words_of(text)
    )


def _last_span(text: str) -> tuple[int, int] | None:
    """Return (start, end) of the last delimited mathematics, or None.

    A lone symbol does not count, nor does prose between two dollar signs.
    """
    best: tuple[int, int] | None = None
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]"), ("$", "$")):
        end = text.rfind(closing)
        for _ in range(MAX_SPANS):
            start = text.rfind(opening, 0, end) if end > 0 else -1
            if start < 0:
                break
            content = text[start + len(opening) : end]
            useful = content.strip() and not _LONE_SYMBOL.fullmatch(content)
            if useful and is_bare(content):
                if best is None or end > best[1]:
                    best = (start, end + len(closing))
                break
            # prose between two dollar signs: the second one may open mathematics or belong to a price
            end = start if opening == "$" else text.rfind(closing, 0, start)
    return best
