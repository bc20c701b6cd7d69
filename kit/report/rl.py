"""Report of a reinforcement learning run: its metrics and rollouts -> rl.png and one self-contained report.html.

    python -m kit.report.rl runs/grpo_qwen2_5_0_5b/001

Everything is computed from the files in the folder, so a report can be made again at any time, also of an unfinished run.
"""

from __future__ import annotations

import argparse
import html
import json
from pathlib import Path

from matplotlib.figure import Figure

from kit.evaluate.results import read_results
from kit.report import page as pages
from kit.report.before_after import findings
from kit.report.figures import embed
from kit.run import AFTER, BEFORE, Journal

PANELS = (  # title, names of metrics; the first is drawn thick
    ("reward", ("reward_mean",)),
    ("groups without signal", ("no_signal",)),
    ("tokens an answer", ("length",)),
    ("entropy, nats a token", ("entropy",)),
    ("ratio of new to old probability", ("ratio_mean", "ratio_min", "ratio_max")),
    ("KL to the start", ("kl",)),
)
SHOWN = 6  # steps whose first group is shown: from the first to the last, evenly


def write_report(path: Path) -> Path:
    """Write rl.png and report.html of the run in `path`; returns the report. Raises ValueError if there is no run."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no run (no config.json); pass a run folder")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    metrics = Journal(path / "metrics.jsonl").read()
    results = {stage: read_results(path / stage) for stage in (BEFORE, AFTER)}
    measured = {stage: found for stage, found in results.items() if found}
    page = pages.PAGE.format(
        style=pages.STYLE,
        title=html.escape(f"{config.get('model', path.name)}, reinforcement learning"),
        findings="".join(f"<p class=finding>{html.escape(line)}</p>" for line in findings(results)),
        paper="",
        table=pages.figures_table(measured),
        images=embed(
            path / "rl.png", _figure(metrics), alt="reward, signal, length, entropy, ratio and KL by step"
        ),
        training=f"<p>{html.escape(summary(metrics))}</p>",
        samples=pages.browser(measured) + _samples(Journal(path / "rollouts.jsonl").read()),
        settings="".join(f"<tr><td>{html.escape(k)}<td>{html.escape(str(v))}" for k, v in config.items()),
    )
    report = path / "report.html"
    report.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return report


def summary(metrics: list[dict]) -> str:
    if not metrics:
        return "No step has been made yet."
    tenth = max(len(metrics) // 10, 1)
    first, last = (
        sum(row["reward_mean"] for row in rows) / tenth for rows in (metrics[:tenth], metrics[-tenth:])
    )
    seconds = {phase: sum(row[f"{phase}_seconds"] for row in metrics) for phase in ("rollout", "update")}
    rejected = sum(value for row in metrics for name, value in row.items() if name.startswith("rejected"))
    return (
        f"{len(metrics):,} steps: mean reward {first:.3f} in the first tenth, {last:.3f} in the last; {seconds['rollout']:,.0f} "
        f"s of sampling and grading, {seconds['update']:,.0f} s of updates; {rejected} answers left out as not to be trusted. "
        "The loss is not drawn: on-policy it is near zero whatever is learned."
    )


def _figure(metrics: list[dict]) -> Figure:
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for name in names:
            rows = [row for row in metrics if isinstance(row.get(name), float | int)]
            axes.plot(
                [row["step"] for row in rows],
                [row[name] for row in rows],
                lw=2 if name == names[0] else 0.8,
                label=name,
            )
        axes.set(title=title, xlabel="step")
        if len(names) > 1:
            axes.legend()
    return figure


def _samples(rows: list[dict]) -> str:
    steps = sorted({row["step"] for row in rows})
    wanted = {steps[i * (len(steps) - 1) // max(SHOWN - 1, 1)] for i in range(SHOWN)} if steps else set()
    parts = ["<h3>In training: all answers to the first prompt of a step</h3>"] if steps else []
    for step in sorted(wanted):
        cells = "".join(
            f"<h4>reward {row['reward']}, {row['tokens']:,} tokens{'' if row['finished'] else ' (cut off)'}</h4>"
            f"<pre>{pages.marked(row['text'])}</pre>"
            for row in rows
            if row["step"] == step
        )
        parts.append(f"<details><summary>step {step}</summary>{cells}</details>")
    return "".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder")
    print(write_report(parser.parse_args().run))
