"""The report of a run: its metrics and samples become PNG plots and one self-contained report.html.

    python -m kit.report runs/gemma3_1b_8k/001

Everything is computed from the files in the folder, so a report can be written again at any time, even of an
unfinished run.
"""

from __future__ import annotations

import html
import json
from pathlib import Path

from kit.evaluate.results import Result, paired_difference, read_results
from kit.report import arithmetic, figures
from kit.report import page as pages
from kit.report.page import percent
from kit.run import AFTER, BEFORE, SAMPLES, Journal

# the numbers in the paper's text, means of the three benchmarks; its curves show no values
PAPER = {
    "gemma-3-1b-it": "24 % before, about a quarter of that after 8k traces, 15 % after 220k",
    "qwen2.5-0.5b-instruct": "14 % before, 11 % after 220k traces; no number for 8k",
}


def write_report(path: Path) -> Path:
    """Write the plots and report.html of the run in `path`, and return the report's path.

    Raises ValueError if there is no run.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no run (no config.json); pass a run folder")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    results = {stage: read_results(path / stage) for stage in (BEFORE, AFTER, SAMPLES)}
    measured = {stage: found for stage, found in results.items() if found}
    metrics = Journal(path / "metrics.jsonl").read()
    plots, note = {}, ""
    if metrics:
        plots["loss.png"] = figures.loss_figure(metrics)
    if measured:
        plots["accuracy.png"] = figures.accuracy_figure(measured)
        plots["length.png"] = figures.length_figure(measured)
    if any(result.caps for found in measured.values() for result in found.values()):
        plots["caps.png"] = figures.caps_figure(measured)
        note = pages.CAPS_NOTE
    drawn = "".join(figures.embed(path / name, figure) for name, figure in plots.items()) + note
    steps = arithmetic.check_answers(measured)
    lines = [*findings(results), *arithmetic.sentences(steps)]
    what = "an evaluation" if results[SAMPLES] else "before and after long chains of thought"
    page = pages.PAGE.format(
        style=pages.STYLE,
        title=html.escape(f"{config.get('model', path.name)}, {what}"),
        findings=pages.findings(lines),
        paper=_paper(str(config.get("model", ""))),
        table=pages.figures_table(measured),
        images=(drawn or "<p>Nothing has been measured yet.</p>") + arithmetic.section(steps),
        training=_training(metrics, path),
        samples=pages.browser(measured),
        settings=pages.settings(config),
    )
    return pages.write(path, page)


def findings(results: dict[str, dict[str, Result]]) -> list[str]:
    """Return a sentence per benchmark on what was measured. A difference within its interval is not one."""
    sentences = []
    for name, after in results[AFTER].items():
        before = results[BEFORE].get(name)
        if before is None:
            continue
        try:
            difference, spread = paired_difference(before, after)
        except ValueError as error:  # a report is still written of what there is
            sentences.append(str(error))
            continue
        certain = abs(difference) > spread
        change = ("rose" if difference > 0 else "fell") if certain else "did not change beyond chance"
        longer = after.mean_tokens / before.mean_tokens
        sentences.append(
            f"{name}: accuracy {change}, {percent(before.accuracy)} to {percent(after.accuracy)} "
            f"(difference {100 * difference:+.1f} points, 95 % interval ± {100 * spread:.1f}); "
            f"answers are {longer:.2f} times as long, {percent(after.truncated)} of them cut off "
            f"(before {percent(before.truncated)})."
        )
    return sentences


def _paper(model: str) -> str:
    known = next((text for name, text in PAPER.items() if name in model.lower()), None)
    return (
        f"<p>The paper (mean of three benchmarks, full fine-tuning on 8 H100): {known}.</p>" if known else ""
    )


def _training(metrics: list[dict], path: Path) -> str:
    if not metrics:
        return ""
    tokens, seconds = sum(row["tokens"] for row in metrics), sum(row["seconds"] for row in metrics)
    timed = [row for row in metrics if not row.get("compiles")] or metrics
    speed = sum(row["tokens"] for row in timed) / sum(row["seconds"] for row in timed)
    drop_counts = path / "drop_counts.json"
    data = json.loads(drop_counts.read_text(encoding="utf-8"))["text"] + ". " if drop_counts.is_file() else ""
    return (
        f"<p>{html.escape(data)}{len(metrics):,} steps, {tokens:,} tokens in {seconds:,.0f} s "
        f"({speed:,.0f} tokens/s, without steps that compiled kernels); "
        f"loss {metrics[0]['loss']:.3f} at the first step, {metrics[-1]['loss']:.3f} at the last.</p>"
    )
