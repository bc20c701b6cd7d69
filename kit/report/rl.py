"""The report of a run of reinforcement learning: two figures and one self-contained report.html."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from kit import paper
from kit.journal import REWARD, ROLLOUT, STEP, Journal
from kit.report import page as pages
from kit.report.answers import browser, marked
from kit.report.before_after import asked_of, findings, read_run, same_problem, what_came_out
from kit.report.figures import embed, panels
from kit.report.first_screen import first_screen
from kit.report.page import percent
from kit.run import ROLLOUTS

# title, names of metrics; the first gets a thick line
OTHERS = (
    ("Groups without signal", ("no_signal",)),
    ("Entropy, nats per token", ("entropy",)),
    ("Ratio of new to old probability", ("ratio_mean", "ratio_min", "ratio_max")),
    ("KL to the start", ("kl",)),
)
SHOWN = 6  # steps whose first group is shown, evenly spaced from the first to the last


def write_report(path: Path, *, goes_on: bool = False) -> Path:
    """Write rl.png, rl-more.png and report.html of the run in `path`, and return the report's path.

    goes_on: the run will write it again. Raises ValueError if the folder holds no run.
    """
    config, stages = read_run(path)
    kind = STEP.with_numbers("reward_mean", "rollout_seconds", "update_seconds")
    metrics = Journal(path / "metrics.jsonl", kind).read()
    title = "Mean reward (1: right)" if _reward(config) == paper.REWARD else "Mean reward"
    first = ((title, ("reward_mean", *_parts(metrics))), ("Tokens per answer", ("length",)))
    figure = embed(path / "rl.png", partial(_figure, metrics, first), "reward and length by step")
    more = "signal, entropy, ratio and KL by step"
    lines = findings(stages)
    sections = [
        pages.bullets("Benchmark by benchmark", lines if len(lines) > 1 else ()),
        pages.bullets("What differs from the paper", paper.deviations(config)),
        f"<h2>Training</h2><p>{html.escape(summary(metrics))}</p>",
        embed(path / "rl-more.png", partial(_figure, metrics, OTHERS), more),
        pages.figures_table(stages),
        "<h2>Answers</h2>" + browser(stages) + _samples(Journal(path / ROLLOUTS, ROLLOUT).read()),
    ]
    outcome = what_came_out(stages) if stages else summary(metrics)
    sentences = (what_was_done(config, metrics, asked_of(stages) if stages else ""), outcome)
    title = f"{config.get('model', path.name)}, reinforcement learning"
    first = first_screen(sentences, same_problem(stages), figure)
    return pages.write(path, title, first, sections, config, goes_on=goes_on)


def what_was_done(config: Mapping[str, object], metrics: list[dict], asked: str) -> str:
    """Describe the run in a sentence."""
    model, group = config.get("model", "The model"), config.get("group_size", "several")
    steps = f"{len(metrics):,} of {config.get('steps', len(metrics)):,} steps"
    measured = f" It answers {asked} before and after." if asked else ""
    reward = _reward(config)
    raised = "right answers" if reward == paper.REWARD else f"answers with a higher reward ({reward})"
    return (
        f"{model} is trained by reinforcement learning (GRPO), {steps}: it answers a problem "
        f"{group} times, and the {raised} among them become more likely.{measured}"
    )


def _reward(config: Mapping[str, object]) -> str:
    return str(config.get("reward", paper.REWARD))


def _parts(metrics: list[dict]) -> list[str]:
    """Return the metrics of the rewards that add up, if there are several."""
    names = dict.fromkeys(name for row in metrics for name in row if name.startswith(REWARD))
    return list(names) if len(names) > 1 else []


def summary(metrics: list[dict]) -> str:
    """Return the run's rewards and times in words."""
    if not metrics:
        return "No step is finished yet."
    tenth = max(len(metrics) // 10, 1)
    first, last = (fmean(row["reward_mean"] for row in rows) for rows in (metrics[:tenth], metrics[-tenth:]))
    sampling, updating = (sum(row[f"{phase}_seconds"] for row in metrics) for phase in ("rollout", "update"))
    rejected = sum(value for row in metrics for name, value in row.items() if name.startswith("rejected"))
    undecided = fmean(row.get("undecided", 0.0) for row in metrics)  # older runs lack it
    return (
        f"{len(metrics):,} steps: mean reward {first:.3f} in the first tenth, {last:.3f} in the last; "
        f"{sampling:,.0f} s of sampling and grading, {updating:,.0f} s of updates; the grader could not "
        f"decide {percent(undecided)} of the answers, and {rejected} were left out as such or as not to be "
        "trusted. The loss is not plotted: on-policy it is near zero whatever is learned."
    )


def _figure(metrics: list[dict], shown: Sequence, narrow: bool) -> Figure:
    figure, panes = panels(len(shown), narrow, 3.4)
    for axes, (title, names) in zip(panes, shown, strict=True):
        for name in names:
            rows = [row for row in metrics if isinstance(row.get(name), float | int)]
            steps, values = [row["step"] for row in rows], [row[name] for row in rows]
            axes.plot(steps, values, lw=2.5 if name == names[0] else 0.8, label=name)
        axes.set(title=title, xlabel="step")
        if len(names) > 1:
            axes.legend()
    return figure


def _samples(rows: list[dict]) -> str:
    steps = sorted({row["step"] for row in rows})
    if not steps:
        return ""
    wanted = sorted({steps[i * (len(steps) - 1) // (SHOWN - 1)] for i in range(SHOWN)})
    parts = ["<h3>In training: all answers to the first prompt of a step</h3>"]
    for step in wanted:
        found = [row for row in rows if row["step"] == step]
        problem = str(found[0].get("problem", found[0]["question"]))  # older runs have its id alone
        mean = fmean(row["reward"] or 0.0 for row in found)
        title = f"step {step}, mean reward {mean:.3g}: {problem}"
        gold = f"<p>gold answer {html.escape(str(found[0]['gold']))}</p>" if "gold" in found[0] else ""
        cells = gold + "".join(map(_answer, found))
        parts.append(f"<details><summary>{html.escape(title)}</summary>{cells}</details>")
    return "".join(parts)


def _answer(row: dict) -> str:
    rewards = row.get("rewards", {})
    by_name = ", ".join(f"{name} {_number(value)}" for name, value in rewards.items())
    reward = _number(row["reward"]) + (f" ({by_name})" if len(rewards) > 1 else "")
    cut_off = "" if row["finished"] else " (cut off)"
    title = html.escape(f"reward {reward}, {row['tokens']:,} tokens{cut_off}")
    return f"<h4>{title}</h4><pre>{marked(row['text'])}</pre>"


def _number(reward: float | None) -> str:
    return "none: undecided" if reward is None else f"{reward:.3g}"
