"""Prompts for reinforcement learning: problems with gold answers from a file or the hub, in an order that a resume repeats.

A row has its problem in `problem`, `question` or verl's `extra_info.question`, and its answer in `answer`, `gt_answer` or verl's
`reward_model.ground_truth`. A row without one of them is named and counted, never guessed at.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from kit.data.rows import BadRows, read_rows
from kit.run import digest

PROBLEM = ("problem", "question", "extra_info.question")
ANSWER = ("answer", "gt_answer", "reward_model.ground_truth")
LEVEL = ("level", "difficulty", "extra_info.level")


def read_prompts(source: str, bad: BadRows, *, levels: str = "") -> list[Question]:
    """All usable prompts of `source` (a local .jsonl, .json or .parquet file, or a hub id, as kit.data.read_rows takes it).

    levels: keep MATH levels such as "1-4"; "" = all. bad: takes the rows without problem, answer or, where levels are asked for,
    level. Raises ValueError for levels that are none, for a source without a usable row, and for too many bad rows.
    """
    match = re.fullmatch(r"([0-9]+)-([0-9]+)", levels)
    if levels and (not match or int(match[1]) > int(match[2])):
        raise ValueError(f"levels is {levels!r} but must be two numbers such as 1-4, or empty for all")
    found, num_rows = [], 0
    for where, row in read_rows(source, bad):
        num_rows += 1
        problem, answer = _text(row, PROBLEM), _text(row, ANSWER)
        level = re.search("[0-9]+", _text(row, LEVEL)) if levels else None
        missing = [
            name
            for name, value in (("problem", problem), ("gold answer", answer), ("level", level or not levels))
            if not value
        ]
        if missing:
            bad.add(where, f"no {' and no '.join(missing)} among its fields {sorted(row)}")
        elif not levels or int(match[1]) <= int(level.group()) <= int(match[2]):
            found.append(Question(digest(problem)[:12], problem, answer))
    if not found:
        raise ValueError(
            f"{source} has {num_rows} rows but no prompt of levels {levels or 'any'}; pass another file or --levels"
        )
    return found


def _text(row: dict, names: Sequence[str]) -> str:
    """The first of these fields that holds text or a number; "a.b" is field b of a. "" if there is none."""
    for name in names:
        value = row
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    return ""


def draw(questions: Sequence[Question], start: int, count: int, *, seed: int) -> list[Question]:
    """Prompts start to start + count of an endless stream: all of them in a random order, then all in another, and so on."""
    drawn, epoch, order = [], -1, []
    for position in range(start, start + count):
        if position // len(questions) != epoch:
            epoch, order = position // len(questions), list(range(len(questions)))
            random.Random(f"{seed} {epoch}").shuffle(order)
        drawn.append(questions[order[position % len(questions)]])
    return drawn


@dataclass(frozen=True)
class Question:
    """One problem with its gold answer; `id` names it by its words, so that files and hub copies agree."""

    id: str
    problem: str
    answer: str
