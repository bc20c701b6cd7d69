"""The report of a run that fine-tunes or evaluates: PNG plots and one self-contained report.html."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import fmean

from kit import paper
from kit.evaluate.results import Result, headline, paired_difference, read_results
from kit.journal import MEASUREMENT, STEP, Journal
from kit.report import answers, arithmetic, figures
from kit.report import page as pages
from kit.report.first_screen import SAMPLES_OF_ONE, Pair, choose, first_screen
from kit.report.page import percent
from kit.run import AFTER, BEFORE, DURING, SAMPLES, kept_traces, read_json, read_json_if_any
from kit.valley.curves import Estimate, points
from kit.valley.curves import percent as with_interval
from kit.valley.sentences import listed

Results = Mapping[str, Result]  # benchmark -> its samples
NOTHING = "Nothing has been measured yet."


def write_report(path: Path, *, goes_on: bool = False) -> Path:
    """Write the plots and report.html of the run in `path`, and return the report's path.

    goes_on: the run will write it again, so an open page loads itself anew. Raises ValueError if there is no
    run.
    """
    config, stages = read_run(path)
    kind = STEP.with_numbers("loss", "tokens", "seconds")
    metrics, lines = Journal(path / "metrics.jsonl", kind).read(), findings(stages)
    what = "an evaluation" if SAMPLES in stages else "before and after long chains of thought"
    figure = drawn = ""
    if stages:
        figure = figures.embed(path / "accuracy.png", partial(figures.accuracy_figure, stages))
        drawn = figures.embed(path / "length.png", partial(figures.length_figure, stages))
    if any(result.caps for found in stages.values() for result in found.values()):
        drawn += figures.embed(path / "caps.png", partial(figures.caps_figure, stages)) + pages.CAPS_NOTE
    if measured := Journal(path / f"{DURING}.jsonl", MEASUREMENT).read():
        draw = partial(figures.steps_figure, measured, metrics)
        drawn += figures.embed(path / "steps.png", draw, "accuracy, loss, length, reflection by step")
    elif metrics:
        drawn += figures.embed(path / "loss.png", partial(figures.loss_figure, metrics))
    sections = [
        pages.bullets("Benchmark by benchmark", lines if len(lines) > 1 else ()),
        _paper(str(config.get("model", "")), stages),
        pages.bullets("What differs from the paper", paper.deviations(config)),
        drawn + _training(metrics, path),
        arithmetic.section(arithmetic.check_answers(stages)),
        pages.figures_table(stages),
        "<h2>Answers</h2>" + answers.browser(stages) if stages else "",
    ]
    trained_on = config | ({"num_traces": kept} if (kept := kept_traces(path)) else {})
    sentences = (what_was_done(trained_on, stages), what_came_out(stages))
    title = f"{config.get('model', path.name)}, {what}"
    first = first_screen(sentences, same_problem(stages), figure)
    return pages.write(path, title, first, sections, config, goes_on=goes_on)


def read_run(path: Path) -> tuple[dict, figures.Stages]:
    """Return a run's settings, and stage -> benchmark -> samples so far. Raises ValueError without a run."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no run (no config.json); pass a run folder")
    results = {stage: read_results(path / stage) for stage in (BEFORE, AFTER, SAMPLES)}
    config = read_json(path / "config.json")
    return config, {stage: found for stage, found in results.items() if found}


def what_was_done(config: Mapping[str, object], stages: figures.Stages) -> str:
    """Describe a run of fine-tuning or evaluation in a sentence."""
    model, asked = config.get("model", "The model"), asked_of(stages)
    if "num_traces" not in config:
        return f"{model} answers {asked}."
    traces = f"{config['num_traces']:,} traces" if config["num_traces"] else "traces"
    tuned = "was fine-tuned" if AFTER in stages else "is being fine-tuned"
    return f"{model} {tuned} on {traces}, long worked solutions, and answers {asked} before and after."


def asked_of(stages: figures.Stages) -> str:
    """Describe the problems: 500 problems of math500 and 30 of aime24."""
    counts = {name: found.num_questions for results in stages.values() for name, found in results.items()}
    return listed([f"{count:,} problems of {name}" for name, count in counts.items()]) or "problems"


def what_came_out(stages: figures.Stages) -> str:
    """Return the run's result in a sentence: the mean over the benchmarks, each counting the same."""
    if BEFORE in stages and AFTER in stages:
        return compare(stages[BEFORE], stages[AFTER])
    if not stages:
        return NOTHING
    (stage, found), *_ = ((stage, headline(found)) for stage, found in stages.items())
    length, cut = _mean_of(found, "mean_tokens"), _mean_of(found, "truncated")
    part = "" if stage == SAMPLES else f"Only {stage} has been measured so far: "
    return (
        f"{part}{with_interval(_accuracy(found))} of the answers are right{_which(found)}; an answer takes "
        f"{length:,.0f} tokens on average, and {percent(cut)} of the answers are cut off."
    )


def findings(stages: figures.Stages) -> list[str]:
    """Return a sentence per benchmark that was measured both times."""
    before, after = (stages.get(stage, {}) for stage in (BEFORE, AFTER))
    names = [name for name in after if name in before]
    return [compare({name: before[name]}, {name: after[name]}, f"{name}: accuracy") for name in names]


def compare(before: Results, after: Results, subject: str = "Accuracy") -> str:
    """Describe how accuracy and length changed. A difference within its interval is not called one."""
    try:
        change = difference(before, after)
    except ValueError as error:  # a report is still written of what there is
        return str(error)
    before, after = _shared(before, after)
    certain = change.above_zero() or change.below_zero()
    verb = ("rose" if change.mean > 0 else "fell") if certain else "did not change beyond chance"
    longer = _mean_of(after, "mean_tokens") / _mean_of(before, "mean_tokens")
    return (
        f"{subject} {verb}: {with_interval(_accuracy(before))} before, {with_interval(_accuracy(after))} "
        f"after ({points(change)}){_which(before)}; answers are {longer:.2f} times as long, "
        f"{percent(_mean_of(after, 'truncated'))} of them cut off (before "
        f"{percent(_mean_of(before, 'truncated'))})."
    )


def difference(before: Results, after: Results) -> Estimate:
    """Return accuracy after - before, the mean over the benchmarks that both have.

    Raises ValueError if there is none, or if two results cannot be compared.
    """
    if not any(name in after for name in before):
        raise ValueError(f"{', '.join(before)} was measured before and {', '.join(after)} after")
    pairs = zip(*(of.values() for of in _shared(before, after)), strict=True)
    changes = [paired_difference(*pair) for pair in pairs]
    return _mean([mean for mean, _ in changes], [half for _, half in changes])


def same_problem(stages: figures.Stages) -> Pair | None:
    """Return a problem with its answers before and after, or two answers of the only measurement."""
    if not (BEFORE in stages and AFTER in stages):
        return next((choose(found, found, None, SAMPLES_OF_ONE) for found in stages.values()), None)
    try:
        change = difference(stages[BEFORE], stages[AFTER])
    except ValueError:  # which what_came_out says
        change = Estimate(0.0, 0.0)
    return choose(stages[BEFORE], stages[AFTER], change)


def _shared(before: Results, after: Results) -> tuple[Results, Results]:
    """Return the results of the benchmarks that both have; of the paper's, if there are any."""
    shared = headline({name: before[name] for name in before if name in after})
    return shared, {name: after[name] for name in shared}


def _mean(means: list[float], halves: list[float]) -> Estimate:
    return Estimate(fmean(means), math.hypot(*halves) / len(halves))


def _accuracy(results: Results) -> Estimate:
    found = results.values()
    return _mean([result.accuracy for result in found], [result.interval for result in found])


def _mean_of(results: Results, name: str) -> float:
    return fmean(getattr(result, name) for result in results.values())


def _which(results: Results) -> str:
    return f" (mean of {', '.join(results)})" if len(results) > 1 else ""


def _paper(model: str, stages: figures.Stages) -> str:
    """Return the paper's accuracy, with ours beside it as the paper graded, if it names the model."""
    if not (known := paper.accuracy_in_words(model)):
        return ""
    ours = [text for stage, found in stages.items() if (text := _as_the_paper(stage, headline(found)))]
    beside = f" Here, graded as the paper graded: {'; '.join(ours)}." if ours else ""
    return f"<p>The paper (mean of three benchmarks, full fine-tuning on 8 H100): {known}.{beside}</p>"


def _as_the_paper(stage: str, found: Results) -> str:
    graded = [result.paper_accuracy for result in found.values()]
    if None in graded:
        return ""
    strict, which = percent(_accuracy(found).mean), ", ".join(found)
    return f"{percent(fmean(graded))} {stage} (strictly: {strict}; mean of {html.escape(which)})"


def _training(metrics: list[dict], path: Path) -> str:
    if not metrics:
        return ""
    tokens, seconds = sum(row["tokens"] for row in metrics), sum(row["seconds"] for row in metrics)
    timed = [row for row in metrics if not row.get("compiles")] or metrics
    speed = sum(row["tokens"] for row in timed) / sum(row["seconds"] for row in timed)
    counts = read_json_if_any(path / "drop_counts.json")
    data = counts.get("text", "") + ". " if counts else ""
    return (
        f"<p>{html.escape(data)}{len(metrics):,} steps, {tokens:,} tokens in {seconds:,.0f} s "
        f"({speed:,.0f} tokens/s, without steps that compiled kernels); "
        f"loss {metrics[0]['loss']:.3f} at the first step, {metrics[-1]['loss']:.3f} at the last.</p>"
    )
