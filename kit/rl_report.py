"""Report of a reinforcement learning run: its metrics and rollouts -> rl.png and one self-contained report.html.

    python -m kit.rl_report runs/grpo_qwen2_5_0_5b/001

Everything is computed from the files in the folder, so a report can be made again at any time, also of an unfinished run.
"""

from __future__ import annotations

import argparse
import html
import json
from pathlib import Path

from matplotlib.figure import Figure

from kit.figures import embed
from kit.journal import Journal
from kit.results import Result

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
    """Write rl.png and report.html of the run in `path`; returns the report. Raises ValueError where there is no run."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no run (no config.json); pass a run folder")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    metrics = Journal(path / "metrics.jsonl").read()
    image = embed(path / "rl.png", _figure(metrics), alt="reward, signal, length, entropy, ratio and KL by step")
    report = path / "report.html"
    page = PAGE.format(
        title=html.escape(f"{config.get('model', path.name)}, reinforcement learning"),
        measured="".join(f"<li>{html.escape(line)}</li>" for line in measured(path)),
        summary=html.escape(summary(metrics)),
        image=image,
        samples=_samples(Journal(path / "rollouts.jsonl").read()),
        settings="".join(f"<tr><td>{html.escape(k)}<td>{html.escape(str(v))}" for k, v in config.items()),
    )
    report.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return report


def measured(path: Path) -> list[str]:
    """A line a benchmark and stage."""
    files = [(stage, file) for stage in ("before", "after") for file in sorted((path / stage).glob("*.jsonl"))]
    return [f"{stage}: {result}" for stage, file in files for result in [Result.read(file)] if result.rows]


def summary(metrics: list[dict]) -> str:
    if not metrics:
        return "No step has been made yet."
    tenth = max(len(metrics) // 10, 1)
    first, last = (sum(row["reward_mean"] for row in rows) / tenth for rows in (metrics[:tenth], metrics[-tenth:]))
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
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], lw=2 if name == names[0] else 0.8, label=name)
        axes.set(title=title, xlabel="step")
        if len(names) > 1:
            axes.legend()
    return figure


def _samples(rows: list[dict]) -> str:
    steps = sorted({row["step"] for row in rows})
    wanted = {steps[i * (len(steps) - 1) // max(SHOWN - 1, 1)] for i in range(SHOWN)} if steps else set()
    parts = []
    for step in sorted(wanted):
        cells = "".join(
            f"<h4>reward {row['reward']}, {row['tokens']:,} tokens{'' if row['finished'] else ' (cut off)'}</h4>"
            f"<pre>{html.escape(row['text'])}</pre>"
            for row in rows
            if row["step"] == step
        )
        parts.append(f"<details><summary>step {step}</summary>{cells}</details>")
    return "".join(parts)


PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width"><title>{title}</title>
<style>
body {{ font: 17px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ max-width: 100% }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6rem; max-height: 16rem; overflow-y: auto }}
td {{ padding: .15rem .7rem; border-bottom: 1px solid #ddd }}
</style>
<h1>{title}</h1>
<ul>{measured}</ul>
<p>{summary}</p>
{image}
<h2>The first prompt's answers</h2>
{samples}
<details><summary>Settings</summary><table>{settings}</table></details>
</html>
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    print(write_report(parser.parse_args().run))
