"""How a report shows answers: their verdict, their steps and their boxes. All text is escaped here."""

from __future__ import annotations

import html
from collections.abc import Mapping

from kit.evaluate.reflection_and_loops import REFLECTION, boxes, ends_in_loop
from kit.evaluate.results import Result
from kit.report.figures import Stages
from kit.valley.first_error import STEPWISE, Anatomy

SHOWN = 24  # questions per benchmark in the browser of samples, half of them with a right answer
KEPT = 360  # characters of a shortened answer up to its final box; behind it a third of that


def check_steps(benchmark: str, row: dict) -> Anatomy | None:
    """Return what the steps of an answer show; None if answers to this problem have no steps to check."""
    if benchmark not in STEPWISE:
        return None
    try:
        return STEPWISE[benchmark](row["problem"], row["text"], finished=row["finished"])
    except ValueError:  # another file of problems under the benchmark's name
        return None


def answer(title: str, benchmark: str, row: dict, *, note: str = "", shorten: bool = False) -> str:
    """Return one answer as HTML, with its steps marked if they can be checked.

    note: HTML between the heading and the text. shorten: if there are no steps to mark, mark nothing but
    boxes, and leave out what is far from the final answer.
    """
    steps, text, marks = check_steps(benchmark, row), row["text"], None
    ends = "" if row["finished"] else ", cut off"
    ends += ", ends in a loop" if ends_in_loop(text) else ""
    if steps:
        right = f" after {steps.right_steps} right step{'s' * (steps.right_steps > 1)}"
        ends += f": {steps.cause or 'no wrong step'}{right if steps.cause and steps.right_steps else ''}"
        spans = {"right": steps.right, "wrong": steps.wrong, "taken-back": steps.taken_back}
        marks = {step.span: f"mark class={kind}" for kind, found in spans.items() for step in found}
    elif shorten:
        text, marks = around_answer(text), {}
    verdict = html.escape(str(row["verdict"]))
    verdict = f'<span class="{verdict}">{verdict}</span>'
    heading = f"{html.escape(title)}: {verdict}, {row['tokens']:,} tokens{ends}"
    return f"<div><h4>{heading}</h4>{note}<pre>{marked(text, marks)}</pre></div>"


def around_answer(text: str) -> str:
    """Return the part of a text around its last boxed answer, or its end if there is none."""
    found = boxes(text)
    end = found[-1][1] if found else len(text)
    start, stop = max(0, end - KEPT), min(len(text), end + KEPT // 3)
    before = f"[{start:,} characters left out] … " if start else ""
    after = f" … [{len(text) - stop:,} characters left out]" if stop < len(text) else ""
    return before + text[start:stop] + after


def marked(text: str, steps: Mapping[tuple[int, int], str] | None = None) -> str:
    """Return the text as HTML, with boxed answers marked, and the steps or else reflection phrases.

    steps: (start, end) -> the tag that marks it.
    """
    spans = [(start, end, "b class=box") for start, end in boxes(text)]
    if steps is None:
        spans += [(*match.span(), "mark") for match in REFLECTION.finditer(text)]
    spans += [(*span, tag) for span, tag in (steps or {}).items()]
    parts, position = [], 0
    for start, end, tag in sorted(spans):
        if start >= position:  # what lies inside a box belongs to the box
            inside = f"<{tag}>{html.escape(text[start:end])}</{tag.split()[0]}>"
            parts += [html.escape(text[position:start]), inside]
            position = end
    return "".join(parts) + html.escape(text[position:])


def browser(stages: Stages) -> str:
    """Return questions with one right and one wrong response of each stage, if there are such."""
    parts = [NOTE]
    for name in dict.fromkeys(name for found in stages.values() for name in found):
        parts.append(f"<h3>{html.escape(name)}</h3>")
        results = {stage: found[name] for stage, found in stages.items() if name in found}
        parts += [_question(question, name, results) for question in _chosen(list(results.values()))]
    return "".join(parts) if stages else ""


def _chosen(results: list[Result]) -> list[str]:
    """Return at most SHOWN questions, first those with a right answer: half of them, if so many have one."""
    right = {row["question"]: False for result in results for row in result.rows}
    for result in results:
        for row in result.rows:
            right[row["question"]] |= row["verdict"] == "correct"
    solved = [question for question, found in right.items() if found]
    others = [question for question, found in right.items() if not found]
    return [*solved[: max(SHOWN // 2, SHOWN - len(others))], *others[: max(SHOWN // 2, SHOWN - len(solved))]]


def _question(question: str, benchmark: str, results: dict[str, Result]) -> str:
    cells, counts, problem = "", [], ""
    for stage, result in results.items():
        rows = [row for row in result.rows if row["question"] == question]
        right = [row for row in rows if row["verdict"] == "correct"]
        wrong = [row for row in rows if row["verdict"] != "correct"]
        counts.append(f"{f'{stage}: ' if len(results) > 1 else ''}{len(right)} of {len(rows)} right")
        for row in (*right[:1], *wrong[:1]):
            read, gold, rule = (html.escape(str(row[name])) for name in ("prediction", "gold", "rule"))
            cells += answer(stage, benchmark, row, note=f"<p>answer {read}, gold {gold} ({rule})</p>")
        problem = rows[0]["problem"] if rows else problem
    summary = f"{html.escape(problem)} <small>({'; '.join(counts)})</small>"
    return f"<details><summary>{summary}</summary><div class=pair>{cells}</div></details>"


STEP_MARKS = """<mark class=right>right steps</mark>, <mark class=wrong>wrong steps</mark> (not the problem's
step at this place), <mark class=taken-back>what the answer itself takes back</mark>"""
NOTE = f"""<p><small>One right and one wrong response to each question, if there are such. Marked:
<b class=box>boxed answers</b> and, if the steps of an answer can be checked, {STEP_MARKS}; otherwise
<mark>reflection phrases</mark>.</small></p>"""
