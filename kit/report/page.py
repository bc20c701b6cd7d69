"""Pieces of a report's page: the frame, the table of numbers, the browser of samples.

Text that models write is escaped here.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from kit.evaluate.reflection_and_loops import (
    LOOP_CHARACTERS,
    LOOP_TIMES,
    LOOP_UNIT,
    REFLECTION,
    boxes,
    ends_in_loop,
)
from kit.evaluate.results import Result, mean_accuracy
from kit.report.figures import Stages
from kit.valley.curves import Estimate

SHOWN = 24  # questions per benchmark in the browser of samples, half of them with a right answer


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def in_percent(value: Estimate, sign: str = "") -> str:
    """Return a share with its interval, for a column whose head says that it is in percent."""
    return f"{100 * value.mean:{sign}.1f} ± {100 * value.half:.1f}"


def _tokens(count: float | None) -> str:
    return "-" if count is None else f"{count:,.0f}"


def _pass_at(result: Result, k: int) -> str:
    return f"{percent(result.pass_at(k))} ± {100 * result.pass_interval(k):.1f} (k = {k})"


def findings(lines: Sequence[str]) -> str:
    """Return one paragraph per sentence."""
    return "".join(f"<p class=finding>{html.escape(line)}</p>" for line in lines)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of text, which scrolls on a narrow screen."""
    head = "".join(f"<th>{html.escape(head)}" for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    return f"<div class=wide><table><tr>{head}{body}</table></div>"


def settings(config: Mapping[str, object]) -> str:
    """Return the rows of the table of a run's settings."""
    return "".join(f"<tr><td>{html.escape(k)}<td>{html.escape(str(v))}" for k, v in config.items())


def write(path: Path, page: str) -> Path:
    """Write report.html in a run's folder, and return it. Half of a surrogate pair is written as its code."""
    report = path / "report.html"
    report.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return report


NUMBERS = {
    "accuracy": lambda r: f"<b>{percent(r.accuracy)}</b> ± {100 * r.interval:.1f}",
    "accuracy as the paper graded": lambda r: percent(r.paper_accuracy),
    "pass@k ¹": lambda r: _pass_at(r, r.num_samples),
    "questions x samples": lambda r: f"{r.num_questions} x {len(r.rows) / r.num_questions:g}",
    "tokens per response: mean": lambda r: _tokens(r.lengths().mean),
    "median": lambda r: _tokens(r.lengths().median),
    "90 % are at most": lambda r: _tokens(r.lengths().p90),
    "mean of the right ones": lambda r: _tokens(r.lengths("correct").mean),
    "mean of the wrong ones": lambda r: _tokens(r.lengths("wrong").mean),
    "accuracy per 1,000 tokens": lambda r: percent(r.token_efficiency),
    "cut off": lambda r: percent(r.truncated),
    "accuracy without those ²": lambda r: percent(r.accuracy_of_finished),
    "no answer": lambda r: percent(r.without_answer),
    "end in a loop ³": lambda r: percent(r.looping),
    "reflection keyword ⁴": lambda r: percent(r.reflection),
    "undecided": lambda r: str(r.unknown),
}


def figures_table(stages: Stages) -> str:
    """Return one row per number and one column per benchmark and stage, which fits a narrow screen."""
    columns = [(name, stage, found[name]) for stage, found in stages.items() for name in found]
    if not columns:
        return ""
    several = len(stages) > 1
    heads = [html.escape(name) + (f"<br>{stage}" if several else "") for name, stage, _ in columns]
    paper = any(result.paper_accuracy is not None for _, _, result in columns)
    rows = ""
    for label, cell in NUMBERS.items():
        if paper or label != "accuracy as the paper graded":
            rows += f"<tr><td>{label}" + "".join(f"<td>{cell(result)}" for _, _, result in columns)
    means = ""
    for stage, found in stages.items():
        if len(found) > 1:
            mean = percent(mean_accuracy(list(found.values())))
            of_stage = f" {stage}" if several else ""
            means += f"<p>Mean accuracy{of_stage}, every benchmark counting the same: <b>{mean}</b></p>"
    head = "".join(f"<th>{head}" for head in ("", *heads))
    return f"<div class=wide><table><tr>{head}{rows}</table></div>{means}{NOTES}"


NOTES = f"""<p><small>Intervals are 95 %, over questions: the samples of one question are not independent. ¹
the chance that one of k samples is right. ² the questions that are left are often the easier ones. ³ the
text's last characters are one unit of at most {LOOP_UNIT} characters, over and over, at least {LOOP_TIMES}
times and {LOOP_CHARACTERS} characters in all. ⁴ share of responses with one of the paper's keywords; the
paper also has a language model confirm each, so this is an upper bound.</small></p>"""
CAPS_NOTE = """<p><small>Accuracy against length comes from the same samples: a longer response is cut after
so many tokens and what is left is graded again, by the same rules: it is what a run with that limit writes. A
box that stands before the cut counts; if there is none the grader takes the last number, as in any response,
so a short limit can be right by luck.</small></p>
"""


def browser(stages: Stages) -> str:
    """Return questions with one right and one wrong response of each stage, if there are such."""
    parts = []
    for name in dict.fromkeys(name for found in stages.values() for name in found):
        parts.append(f"<h3>{html.escape(name)}</h3>")
        results = {stage: found[name] for stage, found in stages.items() if name in found}
        parts += [_question(question, results) for question in _chosen(list(results.values()))]
    return "".join(parts)


def _chosen(results: list[Result]) -> list[str]:
    """Return at most SHOWN questions, first those with a right answer: half of them, if so many have one."""
    right = {row["question"]: False for result in results for row in result.rows}
    for result in results:
        for row in result.rows:
            right[row["question"]] |= row["verdict"] == "correct"
    solved = [question for question, found in right.items() if found]
    others = [question for question, found in right.items() if not found]
    return [*solved[: max(SHOWN // 2, SHOWN - len(others))], *others[: max(SHOWN // 2, SHOWN - len(solved))]]


def _question(question: str, results: dict[str, Result]) -> str:
    cells, counts, problem = "", [], ""
    for stage, result in results.items():
        rows = [row for row in result.rows if row["question"] == question]
        right = [row for row in rows if row["verdict"] == "correct"]
        wrong = [row for row in rows if row["verdict"] != "correct"]
        label = f"{stage}: " if len(results) > 1 else ""
        counts.append(f"{label}{len(right)} of {len(rows)} right")
        cells += "".join(_response(row, label) for row in (*right[:1], *wrong[:1]))
        problem = rows[0]["problem"] if rows else problem
    summary = f"{html.escape(problem)} <small>({'; '.join(counts)})</small>"
    return f"<details><summary>{summary}</summary><div class=pair>{cells}</div></details>"


def _response(row: dict, label: str) -> str:
    ends = "" if row["finished"] else ", cut off"
    ends += ", ends in a loop" if ends_in_loop(row["text"]) else ""
    verdict = f"<span class={row['verdict']}>{row['verdict']}</span>"
    prediction, gold, rule = (html.escape(str(row[name])) for name in ("prediction", "gold", "rule"))
    return (
        f"<div><h4>{label}{verdict}, {row['tokens']:,} tokens{ends}</h4>"
        f"<p>answer {prediction}, gold {gold} ({rule})</p><pre>{marked(row['text'])}</pre></div>"
    )


def marked(text: str, others: Mapping[tuple[int, int], str] | None = None) -> str:
    """Return the text as HTML, with reflection phrases and boxed answers marked.

    others: (start, end) -> the tag that marks it.
    """
    spans = [(start, end, "b class=box") for start, end in boxes(text)]
    spans += [(*match.span(), "mark") for match in REFLECTION.finditer(text)]
    spans += [(*span, tag) for span, tag in (others or {}).items()]
    parts, position = [], 0
    for start, end, tag in sorted(spans):
        if start >= position:  # what lies inside a box belongs to the box
            inside = f"<{tag}>{html.escape(text[start:end])}</{tag.split()[0]}>"
            parts += [html.escape(text[position:start]), inside]
            position = end
    return "".join(parts) + html.escape(text[position:])


STYLE = """\
body { font: 17px/1.5 system-ui, sans-serif; color: #222 }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { overflow-wrap: anywhere; font-size: 1.5rem }
img { max-width: 100%; display: block; margin: 1rem 0 }
table { border-collapse: collapse }
td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }
summary { overflow-wrap: anywhere; padding: .15rem 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6rem }
pre { max-height: 24rem; overflow-y: auto }
.wide { overflow-x: auto }
.finding { border-left: 4px solid #dd8452; padding-left: .8rem; font-size: 1.1rem }
.correct { color: #1a7f37 } .wrong { color: #b42318 } .unknown { color: #7a5b00 }
mark { background: #ffe08a } .box { background: #cfe8d5; border: 1px solid #1a7f37; border-radius: 3px }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem }
@media print { pre { max-height: none } details { break-inside: avoid } }
"""
PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width"><title>{title}</title>
<style>
{style}</style>
<h1>{title}</h1>
{findings}{paper}
{table}
{images}{training}
<h2>Answers</h2>
<p><small>One right and one wrong response to each question, if there are such. Marked: <mark>reflection
phrases</mark> and <b class=box>boxed answers</b>.</small></p>
{samples}
<details><summary>Settings</summary><div class=wide><table>{settings}</table></div></details>
</html>
"""
