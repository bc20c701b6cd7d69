"""The frame of a report's page, its tables and its numbers."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from kit.disk import write_whole
from kit.evaluate.reflection_and_loops import LOOP_CHARACTERS, LOOP_TIMES, LOOP_UNIT
from kit.evaluate.results import Result
from kit.evaluate.uncertainty import in_percent
from kit.report.figures import Stages
from kit.valley.curves import Estimate


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def share_cell(value: Estimate, sign: str = "") -> str:
    """Return a share with its interval, for a column whose head says that it is in percent."""
    return in_percent(value.mean, value.half, "", sign)


def _tokens(count: float | None) -> str:
    return "-" if count is None else f"{count:,.0f}"


def _judged(result: Result) -> str:
    left = f" ({result.unjudged} left open)" if result.unjudged else ""
    return "-" if result.judged_reflection is None else percent(result.judged_reflection) + left


def findings(lines: Sequence[str]) -> str:
    """Return one paragraph per sentence. What stands between backticks is a command."""
    texts = (re.sub("`(.*?)`", r"<code>\1</code>", html.escape(line)) for line in lines)
    return "".join(f"<p class=finding>{text}</p>" for text in texts)


def bullets(title: str, lines: Sequence[str], level: int = 2) -> str:
    """Return a list under a heading; nothing without lines."""
    items = "".join(f"<li>{html.escape(line)}" for line in lines)
    return f"<h{level}>{title}</h{level}><ul>{items}</ul>" if lines else ""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, figures: bool = True) -> str:
    """Return a table of text, which scrolls in its own box. figures: put intervals below their figures."""
    head = "".join(f"<th>{html.escape(head)}" for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    if figures:
        body = body.replace(" (", "<br>(").replace(" to ", "&nbsp;to&nbsp;").replace(" ±", "&nbsp;±")
    return f"<div class=wide><table><tr>{head}{body}</table></div>"


def write(
    path: Path, title: str, first: str, sections: Sequence[str], settings: Mapping, *, goes_on: bool = False
) -> Path:
    """Write report.html in a run's folder, and return it. Half of a surrogate pair is written as its code.

    first: the first screen. settings: of the run, for the table at the end. goes_on: the run will write it
    again, so an open page loads itself anew.
    """
    rows = table(
        ("setting", "value"), [(name, str(value)) for name, value in settings.items()], figures=False
    )
    title, body = html.escape(title), first + "\n".join(sections)
    refresh = REFRESH if goes_on else ""
    page = PAGE.format(style=STYLE, title=title, body=body, settings=rows, refresh=refresh)
    report = path / "report.html"
    write_whole(report, page.encode("utf-8", errors="xmlcharrefreplace"))
    return report


NUMBERS = {
    "accuracy": lambda r: in_percent(r.accuracy, r.interval),
    "accuracy as the paper graded": lambda r: percent(r.paper_accuracy),
    "pass@k ¹": lambda r: (
        f"k = {r.num_samples}: {in_percent(r.pass_at(r.num_samples), r.pass_interval(r.num_samples))}"
    ),
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
    "confirmed by the judge": lambda r: _judged(r),
    "undecided": lambda r: str(r.unknown),
}


def figures_table(stages: Stages) -> str:
    """Return one row per number and one column per benchmark and stage, which fits a narrow screen."""
    columns = [(name, stage, found[name]) for stage, found in stages.items() for name in found]
    if not columns:
        return ""
    heads = [f"{name} {stage}" if len(stages) > 1 else name for name, stage, _ in columns]
    graded = any(result.paper_accuracy is not None for _, _, result in columns)
    judged = any(result.judged_reflection is not None for _, _, result in columns)
    shown = {"accuracy as the paper graded": graded, "confirmed by the judge": judged}
    labels = [label for label in NUMBERS if shown.get(label, True)]
    rows = [[label, *(NUMBERS[label](result) for _, _, result in columns)] for label in labels]
    return "<h2>All numbers</h2>" + table(("", *heads), rows) + NOTES


NOTES = f"""<p><small>Intervals are 95 %, over questions: the samples of one question are not independent. ¹
the chance that one of k samples is right. ² the questions that are left are often the easier ones. ³ the
text's last characters are one unit of at most {LOOP_UNIT} characters, over and over, at least {LOOP_TIMES}
times and {LOOP_CHARACTERS} characters in all. ⁴ share of responses with one of the paper's keywords; the
paper also has a language model confirm each, so this is an upper bound unless a judge has
confirmed it too; what the judge left open counts as its keyword says.</small></p>"""
CAPS_NOTE = """<p><small>Accuracy against length comes from the same samples: a longer response is cut after
so many tokens and what is left is graded again, by the same rules: it is what a run with that limit writes. A
box that stands before the cut counts; if there is none the grader takes the last number, as in any response,
so a short limit can be right by luck.</small></p>
"""
STYLE = """\
body { font: 17px/1.45 system-ui, sans-serif; color: #222 }
body { max-width: 68rem; margin: 1rem auto; padding: 0 1rem }
h1 { overflow-wrap: anywhere; font-size: 1.4rem; margin: 0 0 .6rem }
h2 { font-size: 1.25rem; margin: 1.6rem 0 .4rem }
h4 { margin: .2rem 0; font-size: 1rem }
code { font-size: .88em; overflow-wrap: anywhere }
img { max-width: 100%; height: auto; display: block; margin: .8rem auto }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .35rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
summary { overflow-wrap: anywhere; padding: .15rem 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6rem; margin: .3rem 0 }
pre { max-height: 24rem; overflow-y: auto } #first-screen pre { max-height: 15rem }
#first-screen h2 { margin-top: .8rem } .problem { font-weight: 600; margin: .3rem 0; overflow-wrap: anywhere }
.wide { overflow-x: auto }
.finding { border-left: 4px solid #dd8452; padding-left: .8rem; font-size: 1.15rem; margin: .5rem 0 }
.correct { color: #1a7f37 } .wrong { color: #b42318 } .unknown { color: #7a5b00 }
mark { background: #ffe08a } .box { background: #cfe8d5; border: 1px solid #1a7f37; border-radius: 3px }
mark.right, mark.wrong { display: inline-block }
mark.right { background: #d3efd9; color: #12552a } mark.right::after { content: "\\00a0✓" }
mark.wrong { background: #f6b8ae; color: #6d130a } mark.wrong::after { content: "\\00a0✗" }
mark.taken-back { background: #e4e4e4; text-decoration: line-through }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem }
.pair > div { min-width: 0 }
@media print { pre { max-height: none } details { break-inside: avoid } }
"""
REFRESH = "<meta http-equiv=refresh content=60>"  # seconds
PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">{refresh}
<title>{title}</title>
<style>
{style}</style>
<h1>{title}</h1>
{body}
<details><summary>Settings</summary>{settings}</details>
</html>
"""
