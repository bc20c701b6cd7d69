"""The `arithmetic` benchmark step by step: do errors accumulate in longer answers? (The paper's figure 5.)

If every operation were right with the same chance p and nothing else went wrong, an answer to a problem of n
operations would be right with probability p^n. What is measured beyond that, the residual, has other causes.
"""

from __future__ import annotations

import html
from collections.abc import Mapping

from kit.paper import OPERATIONS_DONE
from kit.report.figures import Stages
from kit.report.page import findings, share_cell, table
from kit.valley.curves import percent, points
from kit.valley.error_accumulation import Decomposition, decompose, length_alone
from kit.valley.first_error import dissect_arithmetic, has_steps

NAME = "arithmetic"  # of the benchmark
SHOWN = 12  # first wrong steps listed per evaluation


def check_answers(stages: Stages) -> dict[str, Decomposition]:
    """Check the operations of every answer to `arithmetic`, for each stage in which it was measured."""
    return {
        stage: decompose(0, {0: results[NAME]}, dissect_arithmetic)
        for stage, results in stages.items()
        if NAME in results and has_steps(NAME, results[NAME].rows)
    }


def sentences(answers: Mapping[str, Decomposition]) -> list[str]:
    """Return a sentence per stage; for two stages also what longer answers by themselves would have cost."""
    several = len(answers) > 1
    lines = [_sentence(f"{NAME} {stage}" if several else NAME, of) for stage, of in answers.items()]
    if len(answers) == 2 and all(of.has_steps for of in answers.values()):
        before, after = answers.values()
        lines.append(
            f"{NAME}: if every operation were as reliable as before "
            f"({100 * before.equation_accuracy.mean:.1f} % of the equations are true), answers with as many "
            f"operations as those after would be right in {100 * length_alone(before, after):.1f} % of the "
            f"cases; {percent(after.accuracy)} are."
        )
    return lines


def _sentence(label: str, found: Decomposition) -> str:
    if not found.has_steps:
        return f"{label}: no answer states an equation, so there are no steps to check."
    first = "none is wrong"
    if found.first_wrong is not None:
        share, place = f"{100 * found.with_wrong:.1f} %", f"operation {found.first_wrong:g} (median)"
        first = f"{share} of the answers have a wrong one, first at {place}"
    return (
        f"{label}: answers perform {found.operations.text('.1f')} operations, "
        f"the problems need {found.num_needed:.1f}; an operation is right with "
        f"p = {percent(found.step_accuracy)}, {first}; p^n is {percent(found.predicted)}, measured "
        f"{percent(found.accuracy)}: a residual of {points(found.residual)}."
    )


def section(answers: Mapping[str, Decomposition]) -> str:
    """Return the report's section as HTML: a row of figures per stage, and where answers first go wrong."""
    if not answers:
        return ""
    parts = [f"<h2>{NAME.capitalize()}, step by step</h2>{MEANING}", findings(sentences(answers))]
    rows = [[stage, *(cell(found) for cell in COLUMNS.values())] for stage, found in answers.items()]
    parts += [table(("", *COLUMNS), rows), NOTE]
    for stage, of in answers.items():
        parts.append(_first_wrong_steps(stage, of))
    return "".join(parts)


def _first_wrong_steps(stage: str, answers: Decomposition) -> str:
    wrong = [(row, found) for _, row, found in answers.rows if found.wrong]
    rows = ""
    for row, found in wrong[:SHOWN]:
        step, verdict = found.wrong[0], html.escape(str(row["verdict"]))
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


COLUMNS = {  # of a stage
    "accuracy, %": lambda p: share_cell(p.accuracy),
    "p, %": lambda p: share_cell(p.step_accuracy) if p.has_steps else "-",
    "p^n, %": lambda p: share_cell(p.predicted) if p.has_steps else "-",
    "residual: accuracy - p^n": lambda p: share_cell(p.residual, "+") if p.has_steps else "-",
    "operations per answer": lambda p: p.operations.text(".1f"),
    "of the problem (n)": lambda p: f"{p.num_needed:.1f}",
    "answers with a wrong one, %": lambda p: f"{100 * p.with_wrong:.1f}",
    "first wrong one (median)": lambda p: "-" if p.first_wrong is None else f"{p.first_wrong:g}",
    "right all the same, %": lambda p: f"{100 * p.right_all_the_same:.1f}",
}
MEANING = """<p>If every operation were right with the same chance p and nothing else went wrong, a problem
of n operations would be solved with probability p^n: p times itself, n times.</p>"""
NOTE = f"""<p><small>p: the share of right operations among those up to and including the first wrong one of
an answer; n: the operations of the problem. Operations are read from the equations between numbers that an
answer states, each checked by itself; a wrong equation counts as one wrong operation. A residual above 0:
answers are right although an equation in them is wrong, which they may take back later. Below 0: something
else fails, for example a number is miscopied, or the answer is cut off. Intervals are 95 %, over questions.
The paper counts {OPERATIONS_DONE}.</small></p>"""
