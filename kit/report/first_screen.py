"""What every report opens with: what was done and what came out, one problem before and after, the figure."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kit.evaluate.results import Result, group_by_question
from kit.report.answers import STEP_MARKS, answer, check_steps
from kit.report.page import findings
from kit.run import AFTER, BEFORE
from kit.valley.curves import Estimate
from kit.valley.first_error import STEPWISE

SAMPLES_OF_ONE = ("one answer", "another")  # titles if there is one measurement only


@dataclass(frozen=True)
class Pair:
    """Answers to one problem, to be shown side by side."""

    benchmark: str
    answers: Mapping[str, dict]  # title -> row of the log; one or two
    chosen: str  # how this problem was chosen


def first_screen(sentences: Sequence[str], pair: Pair | None, figure: str) -> str:
    """Return the first screen as HTML. sentences: what was done, and what came out. figure: HTML."""
    shown = _same_problem(pair) if pair else ""
    return f"<section id=first-screen>{findings(sentences)}{WORDS}{shown}{figure}</section>"


def choose(
    before: Mapping[str, Result],
    after: Mapping[str, Result],
    change: Estimate | None,
    titles: tuple[str, str] = (BEFORE, AFTER),
) -> Pair | None:
    """Choose a problem that shows the change; None if no benchmark was measured both times.

    After a fall: one with a right answer before and a wrong one after; after a rise, the reverse; without
    either, or if there is none, any. Of several it is the first by its id, a hash, so that neither length nor
    difficulty plays a part. It is of a benchmark with steps to check, or else of the one with most questions.
    before, after: benchmark -> samples. change: of accuracy; None if both are the same measurement.
    """
    common = [name for name in before if name in after]
    if not common:
        return None
    most = max(common, key=lambda name: before[name].num_questions)
    name = next((name for name in STEPWISE if name in common), most)
    first, second = _by_question(before[name]), _by_question(after[name])
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return None

    right = change is None or change.below_zero()  # of the first answer
    if right or change.above_zero():
        pairs = [
            (_answer(first[question], right), _answer(second[question], not right)) for question in shared
        ]
        if found := [pair for pair in pairs if all(pair)]:
            kinds = ("a right answer", "a wrong one") if right else ("a wrong answer", "a right one")
            where = ["" if change is None else f" ({title})" for title in titles]
            chosen = f"Chosen: of the problems with {kinds[0]}{where[0]} and {kinds[1]}{where[1]}, "
            chosen += f"{len(found):,} of {len(shared):,}, the first by its id."
            return Pair(name, dict(zip(titles, found[0], strict=True)), chosen)

    rows = [first[shared[0]][0], second[shared[0]][0]][: 1 if change is None else 2]
    chosen = f"Chosen: the first of {len(shared):,} by its id."
    return Pair(name, dict(zip(titles, rows, strict=False)), chosen)


def _by_question(result: Result) -> dict[str, list[dict]]:
    """Return each question's answers, the first sample first."""
    return group_by_question(sorted(result.rows, key=lambda row: row["sample"]), lambda row: row)


def _answer(rows: Sequence[dict], right: bool) -> dict | None:
    """Return the first answer that is right, or that is not; None if there is none."""
    return next((row for row in rows if (row["verdict"] == "correct") == right), None)


def _same_problem(pair: Pair) -> str:
    row = next(iter(pair.answers.values()))
    cells = "".join(answer(title, pair.benchmark, of, shorten=True) for title, of in pair.answers.items())
    heading = f"The same problem: {' and '.join(pair.answers)}" if len(pair.answers) > 1 else "One problem"
    marks = f" Marked: {STEP_MARKS}." if check_steps(pair.benchmark, row) else ""
    problem = f"{html.escape(row['problem'])} <small>(answer: {html.escape(str(row['answer']))})</small>"
    return (
        f"<h2>{html.escape(heading)}</h2><p class=problem>{problem}</p><div class=pair>{cells}</div>"
        f"<p><small>{html.escape(pair.chosen)}{marks}</small></p>"
    )


WORDS = """<p><small>In parentheses behind a figure: its 95 % interval, the range in which it would most
likely lie if other problems of the same kind were asked.</small></p>"""
