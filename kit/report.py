"""Report: a run folder's metrics and samples -> PNG plots and one self-contained report.html.

    python -m kit.report runs/gemma3_1b_8k/001

Everything is computed from the files in the folder, so a report can be made again at any time, also of an unfinished run.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
from pathlib import Path

from matplotlib.figure import Figure

from kit.responses import REFLECTION
from kit.results import Result, mean_accuracy, paired_difference
from kit.journal import Journal

BEFORE, AFTER, SAMPLES = "before", "after", "samples"  # folders of samples in a run
COLOURS = {BEFORE: "#4c72b0", AFTER: "#dd8452"}
SHOWN = 12  # questions in the browser of samples: a page one can still scroll

# what the paper's text states as numbers; its curves carry no values
PAPER = {
    "gemma-3-1b-it": "24 % before (mean of the three benchmarks), about a quarter of that after 8k traces, 15 % after 220k",
    "qwen2.5-0.5b-instruct": "14 % before (mean of the three benchmarks), 11 % after 220k traces; no number for 8k",
}


def write_report(path: Path) -> Path:
    """Write the plots and report.html of the run in `path`; returns the report. Raises ValueError where there is no run."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no run (no config.json); pass a run folder")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    results = {stage: _results(path / stage) for stage in (BEFORE, AFTER)}
    metrics = Journal(path / "metrics.jsonl").read()
    figures = {}
    if metrics:
        figures["loss.png"] = _loss_figure(metrics)
    if results[BEFORE]:
        figures["accuracy.png"] = _accuracy_figure(results)
        figures["length.png"] = _length_figure(results)
    images = "".join(_image(path / name, figure) for name, figure in figures.items())
    page = PAGE.format(
        title=html.escape(f"{config.get('model', path.name)}, before and after long chains of thought"),
        findings="".join(f"<p class=finding>{html.escape(line)}</p>" for line in findings(results)),
        paper=_paper(str(config.get("model", ""))),
        table=_table(results),
        images=images or "<p>Nothing has been measured yet.</p>",
        training=_training(metrics, path),
        samples=_samples(results),
        settings="".join(f"<tr><td>{html.escape(k)}<td>{html.escape(str(v))}" for k, v in config.items()),
    )
    report = path / "report.html"
    report.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return report


def findings(results: dict[str, dict[str, Result]]) -> list[str]:
    """What the measurements say, a sentence a benchmark; a difference inside its interval is not called one."""
    sentences = []
    for name, after in results[AFTER].items():
        before = results[BEFORE].get(name)
        if before is None:
            continue
        difference, spread = paired_difference(before, after)
        certain = abs(difference) > spread
        change = ("rose" if difference > 0 else "fell") if certain else "did not change beyond chance"
        longer = after.mean_tokens / before.mean_tokens
        sentences.append(
            f"{name}: accuracy {change}, {_percent(before.accuracy)} to {_percent(after.accuracy)} "
            f"(difference {100 * difference:+.1f} points, 95 % interval ± {100 * spread:.1f}); "
            f"answers are {longer:.2f} times as long, {_percent(after.truncated)} of them cut off "
            f"(before {_percent(before.truncated)})."
        )
    return sentences


def _results(folder: Path) -> dict[str, Result]:
    results = (Result.read(file) for file in sorted(folder.glob("*.jsonl")))
    return {result.benchmark: result for result in results if result.rows}


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _loss_figure(metrics: list[dict]) -> Figure:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in metrics], [row["loss"] for row in metrics], color="#333333", linewidth=1)
    axes.set(xlabel="optimizer step", ylabel="loss (mean over targets)", title="Training loss")
    return figure


def _accuracy_figure(results: dict[str, dict[str, Result]]) -> Figure:
    names = list(results[BEFORE])
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for offset, (stage, found) in zip((-0.2, 0.2), results.items(), strict=True):
        shown = [name for name in names if name in found]
        axes.bar(
            [names.index(name) + offset for name in shown], [100 * found[name].accuracy for name in shown], 0.36,
            yerr=[[100 * min(found[name].interval, found[name].accuracy) for name in shown],
                  [100 * min(found[name].interval, 1 - found[name].accuracy) for name in shown]],
            color=COLOURS[stage], label=stage, capsize=3,
        )  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="accuracy, % (95 % interval)", title="Accuracy before and after", ylim=(0, None))
    axes.legend()
    return figure


def _length_figure(results: dict[str, dict[str, Result]]) -> Figure:
    names = list(results[BEFORE])
    figure = Figure(figsize=(7, 2.8 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        longest = max(row["tokens"] for found in results.values() if name in found for row in found[name].rows)
        for stage, found in results.items():
            if name in found:
                lengths = [row["tokens"] for row in found[name].rows]
                axes.hist(lengths, bins=30, range=(0, longest), alpha=0.6, color=COLOURS[stage], label=stage)
        axes.set(xlabel="tokens a response", ylabel="responses", title=f"Length of the answers: {name}")
        axes.legend()
    return figure


def _image(path: Path, figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    path.write_bytes(buffer.getvalue())
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


def _paper(model: str) -> str:
    known = next((text for name, text in PAPER.items() if name in model.lower()), None)
    return f"<p>The paper, full fine-tuning on 8 H100: {known}.</p>" if known else ""


def _table(results: dict[str, dict[str, Result]]) -> str:
    rows = ""
    for stage, found in results.items():
        for name, result in found.items():
            rows += (
                f"<tr><td>{name}<td>{stage}<td>{_percent(result.accuracy)} ± {100 * result.interval:.1f}"
                f"<td>{result.mean_tokens:,.0f}<td>{_percent(result.truncated)}<td>{_percent(result.reflection)}<td>{result.unknown}"
                f"<td>{result.num_questions} x {len(result.rows) / result.num_questions:g}"
            )
        if len(found) > 1:
            rows += f"<tr><td><b>mean</b><td>{stage}<td>{_percent(mean_accuracy(list(found.values())))}<td><td><td><td><td>"
    return rows


def _training(metrics: list[dict], path: Path) -> str:
    if not metrics:
        return ""
    tokens, seconds = sum(row["tokens"] for row in metrics), sum(row["seconds"] for row in metrics)
    census = path / "census.json"
    data = json.loads(census.read_text(encoding="utf-8"))["text"] + ". " if census.is_file() else ""
    return (
        f"<p>{html.escape(data)}{len(metrics):,} steps, {tokens:,} tokens in {seconds:,.0f} s "
        f"({tokens / seconds:,.0f} tokens/s); "
        f"loss {metrics[0]['loss']:.3f} at the first step, {metrics[-1]['loss']:.3f} at the last.</p>"
    )


def _samples(results: dict[str, dict[str, Result]]) -> str:
    parts = []
    for name, before in results[BEFORE].items():
        questions = list(dict.fromkeys(row["question"] for row in before.rows))[:SHOWN]
        for question in questions:
            problem = next(row["problem"] for row in before.rows if row["question"] == question)
            cells = ""
            for stage, found in results.items():
                row = next((row for row in found[name].rows if row["question"] == question), None) if name in found else None
                if row:
                    text = REFLECTION.sub(lambda match: f"<mark>{match.group()}</mark>", html.escape(row["text"]))
                    end = "" if row["finished"] else " (cut off)"
                    cells += (
                        f"<div><h4>{stage}: <span class={row['verdict']}>{row['verdict']}</span>, "
                        f"{row['tokens']:,} tokens{end}</h4>"
                        f"<p>answer {html.escape(str(row['prediction']))}, gold {html.escape(str(row['gold']))} "
                        f"({html.escape(str(row['rule']))})</p><pre>{text}</pre></div>"
                    )
            parts.append(f"<details><summary>{name}: {html.escape(problem)}</summary><div class=pair>{cells}</div></details>")
    return "".join(parts)


PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width"><title>{title}</title>
<style>
body {{ font: 17px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
h1 {{ overflow-wrap: anywhere; font-size: 1.5rem }}
img {{ max-width: 100%; display: block; margin: 1rem 0 }}
table {{ border-collapse: collapse }}
td, th {{ padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }}
summary {{ overflow-wrap: anywhere; padding: .15rem 0 }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6rem; max-height: 24rem; overflow-y: auto }}
.wide {{ overflow-x: auto }}
.finding {{ border-left: 4px solid #dd8452; padding-left: .8rem; font-size: 1.1rem }}
.correct {{ color: #1a7f37 }} .wrong {{ color: #b42318 }} .unknown {{ color: #7a5b00 }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem }}
@media print {{ pre {{ max-height: none }} }}
</style>
<h1>{title}</h1>
{findings}{paper}
<div class=wide><table>
<tr><th>benchmark<th><th>accuracy<th>tokens<th>cut off<th>reflection*<th>undecided<th>questions x samples
{table}</table></div>
<p><small>* share of responses with one of the paper's keywords; the paper also has a language model confirm each, so this is an
upper bound. Intervals are 95 %, over questions.</small></p>
{images}{training}
<h2>Answers to the same questions</h2>
{samples}
<details><summary>Settings</summary><div class=wide><table>{settings}</table></div></details>
</html>
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    print(write_report(parser.parse_args().run))
