"""Problems with gold answers, from a file or the hub: the questions of benchmarks and the prompts of RL.

A row's problem and answer are looked for in the fields that kit.data.rows lists. A row without one of them is
named and counted, never guessed.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from kit.data.rows import ANSWER, EXAMPLE, PROBLEM, SHOWN, BadRows, read_rows, same_space, text_of
from kit.run import digest

LEVEL = ("level", "difficulty", "extra_info.level")


@dataclass(frozen=True)
class Question:
    """A problem with its gold answer. `id` names it by its words, so that files and hub copies agree."""

    id: str
    problem: str
    answer: str

    @classmethod
    def of(cls, row: dict) -> Question:
        """Read a row's problem and answer. Raises ValueError if it lacks either."""
        problem, answer = text_of(row, PROBLEM).strip(), text_of(row, ANSWER).strip()
        return cls(digest(same_space(problem))[:12], problem, answer)


def read_prompts(source: str, bad: BadRows, *, levels: str = "") -> list[Question]:
    """Read all usable questions of `source`, a local file or a hub id as for kit.data.read_rows.

    levels: keep MATH levels such as "1-4"; "" = all. bad: collects the rows without problem, answer or, if
    levels are given, level. Raises ValueError for malformed levels, for a source without a usable row, and
    for too many bad rows.
    """
    match = re.fullmatch(r"([0-9]+)-([0-9]+)", levels)
    if levels and (not match or int(match[1]) > int(match[2])):
        raise ValueError(f"levels is {levels!r} but must be two numbers such as 1-4, or empty for all")

    found, num_rows = [], 0
    for where, row in read_rows(source, bad):
        num_rows += 1
        try:
            question = Question.of(row)
            level = _level(row) if levels else 0
        except ValueError as error:
            bad.add(where, str(error))
            continue
        if not levels or int(match[1]) <= level <= int(match[2]):
            found.append(question)

    if not found:
        first = f"; the first bad row: {bad.found[0]}" if bad.found else ""
        if levels:
            raise ValueError(
                f"{source} has {num_rows} rows but no prompt of levels {levels}; pass another file or "
                f"--levels{first}"
            )
        raise ValueError(
            f"{source} has no row with a problem and its answer, such as {EXAMPLE}; pass another file{first}"
        )
    return found


def read_own(source: str) -> list[Question]:
    """Read somebody's own questions, from a local file as for kit.data.read_rows.

    Raises ValueError for a file without questions, and for one with mistakes, of which it lists the first few
    by line: rows that are not JSON, lack a problem or an answer, or repeat a problem.
    """
    bad = BadRows(sys.maxsize)  # all are found before the first is reported
    places: dict[str, str] = {}
    questions = []
    for where, row in read_rows(source, bad):
        try:
            question = Question.of(row)
        except ValueError as error:
            bad.add(where, str(error))
            continue
        if question.id in places:
            bad.add(where, f"the same problem as in {places[question.id]}; delete one of the two")
        places.setdefault(question.id, where)
        questions.append(question)

    if count := len(bad.found):
        shown = "\n  ".join([*bad.found[:SHOWN], *([f"and {count - SHOWN} more"] if count > SHOWN else [])])
        raise ValueError(
            f"{source} has {count} mistake{'s' if count > 1 else ''}; mend what is named here. A row is an "
            f"object with a problem and its answer, such as {EXAMPLE}\n  {shown}"
        )
    return questions


def _level(row: dict) -> int:
    """Return the first number in a row's level: 4 for "Level 4"."""
    text = text_of(row, LEVEL)
    match = re.search("[0-9]+", text)
    if not match:
        raise ValueError(f"no number in the level {text[:80]!r}")
    return int(match[0])


def draw(questions: Sequence[Question], start: int, count: int, *, seed: int) -> list[Question]:
    """Return items start to start + count of an endless stream of questions, which a resumed run repeats.

    The stream is all questions in a random order, then all in another order, and so on.
    """
    drawn, epoch, order = [], -1, []
    for position in range(start, start + count):
        if position // len(questions) != epoch:
            epoch, order = position // len(questions), list(range(len(questions)))
            random.Random(f"{seed} {epoch}").shuffle(order)
        drawn.append(questions[order[position % len(questions)]])
    return drawn
