"""Write the report of a reinforcement learning run: rl.png and one self-contained report.html.

    python -m kit.report runs/grpo_qwen2_5_0_5b/001

Everything is computed from the files in the folder, so the command works at any time, also for an unfinished
run.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from kit.evaluate.results import read_results
from kit.report import page as pages
from kit.report.before_after import findings
from kit.report.figures import embed
from kit.run import AFTER, BEFORE, Journal

PANELS = (  # title, names of metrics; the first gets a thick line
    ("reward", ("reward_mean",)),
    ("groups without signal", ("no_signal",)),
    ("tokens per answer", ("length",)),
    ("entropy, nats per token", ("entropy",)),
    ("ratio of new to old probability", ("ratio_mean", "ratio_min", "ratio_max")),
    ("KL to the start", ("kl",)),
)
SHOWN = 6  # steps whose first group is shown, evenly spaced from the first to the last


def write_report(path: Path) -> Path:
    """Write rl.png and report.html of the run in `path`, and return the report's path.

    Raises ValueError if the folder holds no run.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no run (no config.json); pass a run folder")

    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    metrics = Journal(path / "metrics.jsonl").read()
    results = {stage: read_results(path / stage) for stage in (BEFORE, AFTER)}
    measured = {stage: found for stage, found in results.items() if found}
    figure_alt = "reward, signal, length, entropy, ratio and KL by step"
    page = pages.PAGE.format(
        style=pages.STYLE,
        title=html.escape(f"{config.get('model', path.name)}, reinforcement learning"),
        findings=pages.findings(findings(results)),
        paper="",
        table=pages.figures_table(measured),
        images=embed(path / "rl.png", _figure(metrics), alt=figure_alt),
        training=f"<p>{html.escape(summary(metrics))}</p>",
        samples=pages.browser(measured) + _samples(Journal(path / "rollouts.jsonl").read()),
        settings=pages.settings(config),
    )
    return pages.write(path, page)


def summary(metrics: list[dict]) -> str:
    """Return the run's rewards and times in words."""
    if not metrics:
        return "No step is finished yet."
    tenth = max(len(metrics) // 10, 1)
    first, last = (fmean(row["reward_mean"] for row in rows) for rows in (metrics[:tenth], metrics[-tenth:]))
    sampling, updating = (sum(row[f"{phase}_seconds"] for row in metrics) for phase in ("rollout", "update"))
    rejected = sum(value for row in metrics for name, value in row.items() if name.startswith("rejected"))
    return (
        f"{len(metrics):,} steps: mean reward {first:.3f} in the first tenth, {last:.3f} in the last; "
        f"{sampling:,.0f} s of sampling and grading, {updating:,.0f} s of updates; {rejected} answers left "
        "out because they could not be graded or trusted. The loss is not plotted: on-policy it is near zero "
        "whatever is learned."
    )


def _figure(metrics: list[dict]) -> Figure:
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for name in names:
            rows = [row for row in metrics if isinstance(row.get(name), float | int)]
            steps, values = [row["step"] for row in rows], [row[name] for row in rows]
            axes.plot(steps, values, lw=2 if name == names[0] else 0.8, label=name)
        axes.set(title=title, xlabel="step")
        if len(names) > 1:
            axes.legend()
    return figure


def _samples(rows: list[dict]) -> str:
    steps = sorted({row["step"] for row in rows})
    if not steps:
        return ""
    wanted = {steps[i * (len(steps) - 1) // (SHOWN - 1)] for i in range(SHOWN)}
    parts = ["<h3>In training: all answers to the first prompt of a step</h3>"]
    for step in sorted(wanted):
        cells = "".join(_answer(row) for row in rows if row["step"] == step)
        parts.append(f"<details><summary>step {step}</summary>{cells}</details>")
    return "".join(parts)


def _answer(row: dict) -> str:
    cut_off = "" if row["finished"] else " (cut off)"
    title = f"reward {row['reward']}, {row['tokens']:,} tokens{cut_off}"
    return f"<h4>{title}</h4><pre>{pages.marked(row['text'])}</pre>"
