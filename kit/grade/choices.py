"""Find the option of a multiple choice that a text names.

Examples: (C), C. 42, "I choose option C because ...", "C is the correct answer".
"""

from __future__ import annotations

import re

_LETTER = r"\*{0,2}(?:\(([A-J])\)|([A-J])(?![A-Za-z0-9'’+^=/\-]|\*\s?[A-Za-z0-9(]))"
_STATED = re.compile(
    rf"[\s*\"']*(?:(?:[Oo]ption|[Cc]hoice|[Ll]etter)\s{{1,3}})?{_LETTER}"
    r"(?!\s{0,3}(?:and|or|et|ou|&|/)\s{0,3}\(?[A-J](?![a-z]))"  # "A or B" chooses neither
    # nor is "A, B and C", but "A, B and C being too small" is
    r"(?!\s{0,3},\s{0,3}\(?[A-J](?![a-z])\)?(?:,?\s(?:and|or)\s\(?[A-J]\)?)?(?!\s[a-z]))"
)
_LEADING = re.compile(
    r"[\s*\"']*(?:\(([A-J])\)|([A-J])(?=[.):,。、]|\**\s*$))(?!\s{0,3},\s{0,3}\(?[A-J](?![a-z]))"
)
_NOUN = r"(?:the\s)?(?:(?:correct|right|best)\s)?(?:[Oo]ption|[Cc]hoice|[Aa]nswer|[Ll]etter|选项|opción)"
_OTHER = r"(?!\)?\*{0,2}\s{0,3}(?:and|or|et|ou|,|&|/|和|或)\s{0,3}\(?[A-J](?![a-z]))"
_CHOSEN = re.compile(
    r"(?:\b(?:[Cc]hoose|[Cc]hose|[Pp]ick|[Ss]elect|[Gg]o(?:ing)? with|[Oo]pt for)\s|选择?|選択?)"
    rf"\s?(?:{_NOUN}\s?)?{_LETTER}{_OTHER}"
    r"|\b[Aa]nswer\s(?:would|must|should|can only|has to|will|may|might)\s"
    r"(?:\w+\s)?be\s"
    rf"(?:{_NOUN}\s)?{_LETTER}{_OTHER}"
    rf"|(?<![A-Za-z0-9]){_LETTER}\*{{0,2}}\s(?:is|must be|would be)\s"
    r"(?:(?:the|clearly|therefore|thus)\s){0,2}"
    r"(?:correct|right|best|only|answer|true)\b"
    rf"|\b(?:[Ii]t['’]?s|is|[Tt]herefore|[Tt]hus|[Ss]o|[Hh]ence)[,:]?\s{_LETTER}[\s.*)]*\Z"
)
_NAMED = re.compile(rf"{_NOUN}\s?:?\s?{_LETTER}{_OTHER}")
_REFUSED = re.compile(
    r"(?:\bnot|neither|nor|than|n't|reject|eliminate|exclude|rule out|unlike|without|不|非)\s?(?:the\s)?$"
)
_FAILS = re.compile(
    r"\)?\*{0,2}[\s,]{1,3}(?:(?:is|are|was|does|can|seems|would be)\s?)?(?:also\s)?"
    r"(?:wrong|incorrect|not|n't|false|too|out|fails?|impossible)"
)
_BARE = re.compile(r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer):? ?)?(?:\(([A-J])\)|([A-J]))[.:)]?")
_LABELLED = re.compile(r"(?:\(([A-J])\)|([A-J])[.):])[\s:~\\]*(\S.*)|([A-J]) ([A-Z][A-Za-z ]+)", re.DOTALL)


def bare_choice(text: str) -> tuple[str | None, str | None]:
    """Return (letter, its text) of a multiple-choice answer such as "(C)", "C. 42" or "C Cecile".

    Each is None if the answer does not have it.
    """
    match = _BARE.fullmatch(text)
    if match:
        return match[1] or match[2], None
    if len(text) > 200 or not text[:2].strip("(")[:1].isupper():
        return None, None
    match = _LABELLED.fullmatch(text)
    if match:
        return match[1] or match[2] or match[4], match[3] or match[5]
    return None, None


def stated_choice(text: str) -> str | None:
    """Return the letter that a text begins with after "the answer is", or None."""
    match = _STATED.match(text)
    return match and (match[1] or match[2])


def leading_choice(text: str) -> str | None:
    """Return the letter of a text such as "C. 42" or "(C) because 6 * 7 = 42", or None."""
    match = _LEADING.match(text)
    return match and (match[1] or match[2])


def choice_in_prose(text: str) -> str | None:
    """Return the letter that a text settles on without saying "the answer is", or None.

    It counts if the text chooses it ("I pick B"), calls it correct, or names no other option.
    """
    chosen = _letters(_CHOSEN, text)
    if chosen:
        return chosen[-1]
    named = _letters(_NAMED, text)
    return named[0] if len(set(named)) == 1 else None


def _letters(pattern: re.Pattern, text: str) -> list[str]:
    return [
        next(filter(None, match.groups()))
        for match in pattern.finditer(text)
        if not _REFUSED.search(text, max(0, match.start() - 20), match.start())
        and not _FAILS.match(text, match.end())
    ]
