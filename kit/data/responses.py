"""The response that a row is trained on: a correct and complete one, in whatever format the row is.

A row in OpenR1-Math-220k's schema has several, its `generations`, with flags in lists parallel to them. A
list may be absent or shorter than `generations`: what it does not say is not known. A flag may be written as
text or as a number. A generation that holds no usable text costs itself only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kit.data.formats import ASSISTANT, NO_COMPLETE, RESPONSE, SYSTEM, USER, Dropped, Format, Turn, turns_of
from kit.data.rows import ANSWER, PROBLEM, field_of, text_of
from kit.grade.verdict import grade
from kit.turns import never_closes

NO_CORRECT = "have no correct trace"
BY_LLAMA = "have a correct trace by Llama's verdict alone"
UNVERIFIED = "could not be verified"
UNCHECKED = "are kept without a check, since no answer is known or there are several turns"
PARALLEL = ("correctness_math_verify", "correctness_llama", "is_reasoning_complete", "finish_reasons")
VERIFY = {"llama": "llama", "math": "math", "none": "none", True: "llama", False: "none"}
PADDED = "have fewer flags than generations (the others count as not known)"
UNUSABLE = "have a generation without usable text (the others count)"
# what a flag says -> how it may be written
WORDS = {True: ("true", "1", "1.0"), False: ("false", "0", "0.0"), None: ("none", "null", "")}
FLAGS = {word: flag for flag, words in WORDS.items() for word in words}


@dataclass(frozen=True)
class Trace:
    """A problem and the response that the model is trained on, and the turns before them."""

    problem: str
    response: str
    where: str  # file:line, or data set[index]
    short: Trace | None = None  # of a mixture: what is kept if no row holds the response
    before: tuple[Turn, ...] = ()  # perhaps the system's turn, then earlier ones of user and assistant

    @property
    def turns(self) -> list[Turn]:
        return [*self.before, (USER, self.problem), (ASSISTANT, self.response)]

    @property
    def asked(self) -> str:
        """What names the problem: its text, below that of earlier turns."""
        return "\n".join([*(text for role, text in self.before if role != SYSTEM), self.problem])


def check_verify(verify: str | bool) -> str:
    """Return who decides which generations are correct: "llama", "math" or "none". Raises ValueError."""
    if verify not in VERIFY:
        raise ValueError(
            f"verify is {verify!r} but must be math (Math-Verify decides), llama (a trace that Llama alone "
            "accepted counts, too) or none (wrong traces count, too)"
        )
    return VERIFY[verify]


def pick_response(row: dict, *, verify: str | bool = "llama") -> tuple[str | None, str]:
    """Return (the row's first correct, complete response, ""), or (None, the reason why it has none).

    Of `generations`, the flag of Math-Verify decides. If it is not known, or if the row has a single response
    in `trace` or `solution`, our grader decides by the row's answer.

    verify: "math" = as above. "llama" (or True) = if no response is accepted so, the first that Llama accepts
    is returned, with BY_LLAMA in place of "". "none" (or False) = the first complete response is returned,
    correct or not. Raises ValueError for another `verify` and for a malformed row.
    """
    verify = check_verify(verify)
    if row.get("generations") is None:
        response = text_of(row, RESPONSE)
        why = NO_COMPLETE if never_closes(response) else "" if verify == "none" else _verify(row, response)
        return (None, why) if why else (response, "")

    reasons, by_llama = set(), None
    for response, complete, math, llama in _generations(row):
        if not complete:
            why = NO_COMPLETE
        elif verify == "none" or math:
            return response, ""
        else:
            why = _verify(row, response) if math is None else NO_CORRECT
            if not why:
                return response, ""
            by_llama = by_llama or (response if llama else None)
        reasons.add(why)
    if by_llama:
        return (by_llama if verify == "llama" else None), BY_LLAMA
    return None, next(why for why in (NO_CORRECT, UNVERIFIED, NO_COMPLETE) if why in reasons)


def _generations(row: dict) -> Iterator[tuple[str, bool, bool | None, bool | None]]:
    """Yield (text, complete, math, llama) of a row's generations, without those that hold no usable text.

    complete: False if a flag, the finish reason or a thought that never closes says that it is not. math,
    llama: the verdicts of Math-Verify and of Llama-3.3-70B, None if not known.
    Raises ValueError that names the malformed field, which is the first generation if none is usable.
    """
    generations = row["generations"]
    if not isinstance(generations, list) or not generations:
        found = "an empty list" if generations == [] else f"a {type(generations).__name__}"
        raise ValueError(f"field generations is {found}")

    flags = [_flags(row, name, len(generations)) for name in PARALLEL[:3]]
    finish = _parallel(row, PARALLEL[3], len(generations))
    texts = list(_texts(generations))
    if not any(isinstance(text, str) for text in texts):
        raise texts[0]
    for text, math, llama, complete, reason in zip(texts, *flags, finish, strict=True):
        if isinstance(text, str):
            cut_off = str(reason).strip().lower() == "length"
            yield text, complete is not False and not cut_off and not never_closes(text), math, llama


def _texts(generations: list) -> Iterator[str | ValueError]:
    """Yield each generation's text, or the error that says why it has none."""
    for i, value in enumerate(generations):
        name = f"generations[{i}]"
        try:
            yield text_of({name: value}, [name])
        except ValueError as error:
            yield error


def _flags(row: dict, name: str, count: int) -> list[bool | None]:
    """Return a list of flags as what they say."""
    values = _parallel(row, name, count)
    words = [str(value).strip().lower() for value in values]
    for place, word in enumerate(words):
        if word not in FLAGS:
            raise ValueError(f"field {name}[{place}] is {values[place]!r}, which says neither true nor false")
    return [FLAGS[word] for word in words]


def _parallel(row: dict, name: str, count: int) -> list:
    """Return a list parallel to `generations`, of which there are `count`; None for what it does not have."""
    value = [] if row.get(name) is None else row[name]
    if not isinstance(value, list) or len(value) > count:
        found = f"{len(value)} entries" if isinstance(value, list) else f"a {type(value).__name__}"
        raise ValueError(f"field {name} has {found} but generations has {count} entries")
    return value + [None] * (count - len(value))


def _verify(row: dict, response: str) -> str:
    """Return why our grader does not call the response correct; "" if it does."""
    verdict = grade(text_of(row, ANSWER), response).verdict
    return {"correct": "", "wrong": NO_CORRECT, "unknown": UNVERIFIED}[verdict]


def trace_of(row: dict, where: str, layout: Format | None, verify: str) -> tuple[Trace | None, str]:
    """Return (a row's trace, "" or what is to be noted of it), or (None, the reason why it has none)."""
    if layout is None or layout.read is None:
        problem = text_of(row, PROBLEM)
        response, why = pick_response(row, verify=verify)
        return (None if response is None else Trace(problem, response, where)), why
    try:
        *before, (_, problem), (_, response) = turns_of(row, layout)
    except Dropped as error:
        return None, str(error)
    trace = Trace(problem, response, where, before=tuple(before))
    if verify == "none":
        return trace, ""
    if len(before) > 1 or not any(field_of(row, name) is not None for name in ANSWER):
        return trace, UNCHECKED
    why = _verify(row, response)
    return (None, why) if why else (trace, "")


def notes_on(row: dict) -> list[str]:
    """Return what else is to be known of a row that was read: PADDED, UNUSABLE."""
    generations = row.get("generations") or []
    lists = [row[name] for name in PARALLEL if isinstance(row.get(name), list)]
    is_padded = any(len(values) < len(generations) for values in lists)
    is_unusable = any(isinstance(text, ValueError) for text in _texts(generations))
    return [PADDED] * is_padded + [UNUSABLE] * is_unusable
