"""The model card of an exported model: what it is, what was measured, where, and what differs from the paper.

Everything is read from the files in the run's folder. What the run did not record is said to be unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from kit import paper
from kit.evaluate.uncertainty import in_percent
from kit.report.before_after import findings, read_run, what_came_out
from kit.report.figures import Stages
from kit.run import AFTER, BEFORE, MACHINE, kept_traces, read_json

FOLDERS = re.compile(r"(^|[=,])(?:~|[A-Za-z]:)?[/\\](?:[^/\\,]+[/\\])*")  # of absolute paths
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
RECIPES = {"group_size": "reinforcement learning", "num_traces": "fine-tuning on long worked solutions"}


def of_run(run: Path) -> list[str]:
    """Return the lines of a card that a run's folder fills: figures, deviations, machine."""
    settings, stages = read_run(run)
    settings = {name: without_folders(value) for name, value in settings.items()}
    what = next((text for name, text in RECIPES.items() if name in settings), "an evaluation")
    count = f" ({kept:,} traces)" if (kept := kept_traces(run)) else ""
    lines = [f"{settings['model']} after {what}{count}.", ""]
    if BEFORE in stages and AFTER in stages:
        lines += ["## Measured", "", what_came_out(stages), "", *_table(stages), ""]
        lines += ["In parentheses: 95 % intervals, over questions.", ""]
        lines += _bullets(found) if len(found := findings(stages)) > 1 else []
    lines += ["## What differs from the paper", ""]
    lines += _bullets(paper.deviations(settings)) or ["Nothing that the kit compares.", ""]
    return [*lines, "## Machine", "", *_machine(run, settings, stages), ""]


def without_folders(value: object) -> object:
    """Return a setting without the folders of paths in it, which are nobody else's business."""
    return FOLDERS.sub(r"\1", value) if isinstance(value, str) else value


def _table(stages: Stages) -> list[str]:
    heads = ["benchmark", "before", "after", "tokens before", "tokens after", "questions x samples"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, after in stages[AFTER].items():
        if before := stages[BEFORE].get(name):
            shares = (in_percent(result.accuracy, result.interval) for result in (before, after))
            tokens = (f"{result.mean_tokens:,.0f}" for result in (before, after))
            counts = f"{after.num_questions} x {after.num_samples}"
            lines.append("| " + " | ".join((name, *shares, *tokens, counts)) + " |")
    return lines


def _bullets(lines: Sequence[str]) -> list[str]:
    return [*(f"- {line}" for line in lines), ""] if lines else []


def _machine(run: Path, settings: Mapping[str, object], stages: Stages) -> list[str]:
    """Say what the run was trained on, as far as it recorded it."""
    file = run / MACHINE
    if file.is_file():
        known = read_json(file)
    else:
        header = next((r.header for results in stages.values() for r in results.values()), {})
        known = {"device": settings.get("device", "unknown"), "machine": "the run did not record it"}
        known |= {name: header[name] for name in ("torch", "transformers") if name in header}
    return ["; ".join(f"{name}: {value}" for name, value in known.items()) + "."]


def write(path: Path, name: str, base: str, sections: Sequence[str]) -> None:
    """Write README.md, with the lines that the hub reads at its head. base: what was trained."""
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if HUB_ID.fullmatch(base) and not Path(base).exists():
        head.append(f"base_model: {base}")
    base = without_folders(base)
    licence = f"The licence is that of {base}: read it before you share this model."
    lines = [*head, "---", "", f"# {name}", "", *sections, "## Licence", "", licence, ""]
    (path / "README.md").write_text("\n".join(lines), encoding="utf-8")
