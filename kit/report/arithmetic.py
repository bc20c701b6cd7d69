"""The `arithmetic` benchmark step by step: do errors accumulate in longer answers? (The paper's figure 5.)

If every operation were right with the same chance p and nothing else went wrong, an answer to a problem of n
operations would be right with probability p^n. What is measured beyond that, the residual, has other causes.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median

from kit.data.equations import check_steps
from kit.evaluate.results import Result
from kit.paper import OPERATIONS_DONE
from kit.report.figures import Stages
from kit.report.page import findings, share_cell, table
from kit.valley.curves import percent, points
from kit.valley.error_accumulation import Decomposition, decompose, length_alone
from kit.valley.first_error import Anatomy, dissect_arithmetic

NAME = "arithmetic"  # of the benchmark
SHOWN = 12  # first wrong steps listed per evaluation


@dataclass(frozen=True)
class Answers:
    """The answers of one evaluation and the operations that they perform."""

    decomposition: Decomposition
    rows: tuple[dict, ...]  # of the log
    found: tuple[Anatomy, ...]  # what the answer of each row shows

    @property
    def num_needed(self) -> float:
        """Mean operations of a problem."""
        return fmean(found.num_steps for found in self.found)

    @property
    def with_wrong(self) -> float:
        """Share of the answers with a wrong operation."""
        return fmean(bool(found.wrong) for found in self.found)

    @property
    def right_all_the_same(self) -> float:
        """Share of the answers that are right although an operation in them is wrong."""
        pairs = zip(self.rows, self.found, strict=True)
        return fmean(row["verdict"] == "correct" and bool(found.wrong) for row, found in pairs)

    @property
    def first_wrong(self) -> float | None:
        """Which operation of an answer is the first wrong one, as a median over answers; None without any."""
        places = [found.right_steps + 1 for found in self.found if found.wrong]
        return median(places) if places else None

    @property
    def has_steps(self) -> bool:
        return any(found.num_equations for found in self.found)


def check_answers(stages: Stages) -> dict[str, Answers]:
    """Find the operations of every answer to `arithmetic`, for each stage in which it was measured."""
    return {stage: _answers(results[NAME]) for stage, results in stages.items() if NAME in results}


def _answers(result: Result) -> Answers:
    keys = [(row["problem"], row["text"], row["finished"]) for row in result.rows]
    found = {key: dissect_arithmetic(*key[:2], finished=key[2]) for key in keys}  # once: it takes a while

    def look_up(problem: str, text: str, *, finished: bool) -> Anatomy:
        return found[problem, text, finished]

    return Answers(decompose(0, {0: result}, look_up), result.rows, tuple(found[key] for key in keys))


def sentences(answers: Mapping[str, Answers]) -> list[str]:
    """Return a sentence per stage; for two stages also what longer answers by themselves would have cost."""
    several = len(answers) > 1
    lines = [_sentence(f"{NAME} {stage}" if several else NAME, of) for stage, of in answers.items()]
    if len(answers) == 2 and all(of.has_steps for of in answers.values()):
        before, after = (of.decomposition for of in answers.values())
        lines.append(
            f"{NAME}: if every operation were as reliable as before "
            f"({100 * before.equation_accuracy.mean:.1f} % of the equations are true), answers with as many "
            f"operations as those after would be right in {100 * length_alone(before, after):.1f} % of the "
            f"cases; {percent(after.accuracy)} are."
        )
    return lines


def _sentence(label: str, answers: Answers) -> str:
    found = answers.decomposition
    if not answers.has_steps:
        return f"{label}: no answer states an equation, so there are no steps to check."
    first = "none is wrong"
    if answers.first_wrong is not None:
        share, place = f"{100 * answers.with_wrong:.1f} %", f"operation {answers.first_wrong:g} (median)"
        first = f"{share} of the answers have a wrong one, first at {place}"
    return (
        f"{label}: answers perform {found.operations.mean:.1f} operations (± {found.operations.half:.1f}), "
        f"the problems need {answers.num_needed:.1f}; an operation is right with "
        f"p = {percent(found.step_accuracy)}, {first}; p^n is {percent(found.predicted)}, measured "
        f"{percent(found.accuracy)}: a residual of {points(found.residual)}."
    )


def section(answers: Mapping[str, Answers]) -> str:
    """Return the report's section as HTML: a row of figures per stage, and where answers first go wrong."""
    if not answers:
        return ""
    parts = [f"<h2>{NAME.capitalize()}, step by step</h2>{MEANING}", findings(sentences(answers))]
    parts += [_table(answers), NOTE]
    for stage, of in answers.items():
        parts.append(_first_wrong_steps(stage, of))
    return "".join(parts)


def _table(answers: Mapping[str, Answers]) -> str:
    rows = []
    for stage, of in answers.items():
        found = of.decomposition
        fit = (share_cell(found.step_accuracy), share_cell(found.predicted), share_cell(found.residual, "+"))
        cells = (
            stage,
            share_cell(found.accuracy),
            *(fit if of.has_steps else "---"),
            f"{found.operations.mean:.1f} ± {found.operations.half:.1f}",
            f"{of.num_needed:.1f}",
            f"{100 * of.with_wrong:.1f}",
            "-" if of.first_wrong is None else f"{of.first_wrong:g}",
            f"{100 * of.right_all_the_same:.1f}",
        )
        rows.append(cells)
    heads = (
        "", "accuracy, %", "p, %", "p^n, %", "residual: accuracy - p^n", "operations per answer",
        "of the problem (n)", "answers with a wrong one, %", "first wrong one (median)",
        "right all the same, %",
    )  # fmt: skip
    return table(heads, rows)


def _first_wrong_steps(stage: str, answers: Answers) -> str:
    pairs = zip(answers.rows, answers.found, strict=True)
    wrong = [(row, found) for row, found in pairs if found.wrong]
    rows = ""
    for row, found in wrong[:SHOWN]:
        step = check_steps(row["problem"], row["text"]).first_wrong
        verdict = html.escape(str(row["verdict"]))
        rows += (
            f"<tr><td>{html.escape(row['problem'].rpartition(':')[2])}<td>{html.escape(step.text)}"
            f'<td>{step.true}<td>{found.right_steps + 1}<td class="{verdict}">{verdict}'
        )
    if not rows:
        return ""
    heads = ("problem", "first wrong step", "really", "operation", "verdict on the answer")
    title = f"First wrong steps, {stage}: {min(SHOWN, len(wrong))} of {len(wrong):,} answers with one"
    return (
        f"<details><summary>{html.escape(title)}</summary><div class=wide><table>"
        f"<tr>{''.join(f'<th>{head}' for head in heads)}{rows}</table></div></details>"
    )


MEANING = """<p>If every operation were right with the same chance p and nothing else went wrong, a problem
of n operations would be solved with probability p^n: p times itself, n times.</p>"""
NOTE = f"""<p><small>p: the share of right operations among those up to and including the first wrong one of
an answer; n: the operations of the problem. Operations are read from the equations between numbers that an
answer states, each checked by itself; a wrong equation counts as one wrong operation. A residual above 0:
answers are right although an equation in them is wrong, which they may take back later. Below 0: something
else fails, for example a number is miscopied, or the answer is cut off. Intervals are 95 %, over questions.
The paper counts {OPERATIONS_DONE}.</small></p>"""
