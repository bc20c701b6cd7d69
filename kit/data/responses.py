"""The response that a row is trained on: a correct and complete one, in whatever format the row is."""

from __future__ import annotations

from dataclasses import dataclass

from kit.data.formats import (
    ASSISTANT,
    NO_COMPLETE,
    RESPONSE,
    SYSTEM,
    USER,
    Dropped,
    Format,
    Turn,
    turns_of,
)
from kit.data.generations import check_verify, generations_of
from kit.data.rows import ANSWER, PROBLEM, field_of, text_of
from kit.grade.verdict import grade
from kit.turns import never_closes

NO_CORRECT = "have no correct trace"
BY_LLAMA = "have a correct trace by Llama's verdict alone"
UNVERIFIED = "could not be verified"
UNCHECKED = "are kept without a check, since no answer is known or there are several turns"


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


def pick_response(row: dict, *, verify: str | bool = "llama") -> tuple[str | None, str]:
    """Return (the row's first correct, complete response, ""), or (None, the reason why it has none).

    A row in OpenR1's schema has `generations` with flags (see kit.data.generations): that of Math-Verify
    decides. If it is not known, or if the row has a single response in `trace` or `solution`, our grader
    decides by the row's answer.

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
    for response, complete, math, llama in generations_of(row):
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
