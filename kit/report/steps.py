"""The figure of what was measured while a model was trained (kit/evaluate/during_training.py)."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from kit.report.figures import panels

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")
PANELS = {  # title -> (figure of a benchmark, factor)
    "Accuracy during training, %": ("accuracy", 100),
    "Tokens per answer": ("mean_tokens", 1),
    "Answers with a reflection keyword, %": ("reflection", 100),
}


def steps_figure(measured: Sequence[dict], metrics: Sequence[dict], narrow: bool) -> Figure:
    """Draw accuracy, loss, length and reflection against the step.

    measured: rows of during.jsonl. metrics: one row per step of training.
    """
    figure, panes = panels(len(PANELS) + 1, narrow, 3.4)
    steps = [row["step"] for row in measured]
    names = list(dict.fromkeys(name for row in measured for name in row["benchmarks"]))
    for axes, (title, (figure_name, factor)) in zip(panes, PANELS.items(), strict=False):
        for name, colour in zip(names, COLOURS * len(names), strict=False):
            rows = [row["benchmarks"][name] for row in measured]
            values = [factor * row[figure_name] for row in rows]
            axes.plot(steps, values, "o-", color=colour, label=name)
            if figure_name == "accuracy":
                low = [100 * max(0.0, row["accuracy"] - row["interval"]) for row in rows]
                high = [100 * min(1.0, row["accuracy"] + row["interval"]) for row in rows]
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(title=title, xlabel="optimizer step", ylim=(0, None))
        if len(names) > 1:
            axes.legend()

    loss = panes[-1]
    trained = [row["step"] for row in metrics], [row["loss"] for row in metrics]
    loss.plot(*trained, color="#999999", linewidth=1, label="of each step")
    held_out = [(row["step"], row["held_out_loss"]) for row in measured if row["held_out_loss"] is not None]
    if held_out:
        loss.plot(*zip(*held_out, strict=True), "o-", color="#333333", label="of held-out traces")
    loss.set(title="Loss (mean over targets)", xlabel="optimizer step")
    loss.legend()
    return figure
