"""Invented studies: curves, sentences and the report follow from the samples, and change if these change."""

import json
import random
import re

import pytest
import sample_rows
from sample_rows import sample

from kit.report.curve_figures import valley_figure
from kit.report.valley import stars, write_report
from kit.run import Journal
from kit.valley.finished import StudyResults, write_study
from kit.valley.jobs import DONE, FAILED
from kit.valley.reflection import reflection_of
from kit.valley.sentences import sentences
from kit.valley.study import FIXED_BATCH, Cell, Study

GEMMA = "google/gemma-3-1b-it"
QUESTIONS = {"math500": 60, "aime24": 12}


def write_samples(folder, accuracy, *, tokens=600, seed=0, header=(), finished=True, luck=None):
    """Write two samples per question of both benchmarks.

    accuracy: the chance that one is right, or benchmark -> chance. luck: seeds the draw; by default the
    folder's name does.
    """
    for name, count in QUESTIONS.items():
        level = accuracy[name] if isinstance(accuracy, dict) else accuracy
        rng = random.Random(f"{luck or '/'.join(folder.parts[-3:])} {name}")
        shared = {"tokens": tokens if name == "math500" else 9_999, "finished": finished, "text": "x"}
        verdicts = ["correct" if rng.random() < level else "wrong" for _ in range(2 * count)]
        rows = [
            sample(f"q{i // 2}", verdict, sample=i % 2, problem=f"{i // 2}+1?", **shared)
            for i, verdict in enumerate(verdicts)
        ]
        sample_rows.write_samples(
            folder / f"{name}.jsonl", rows, {"seed": seed, "prompt": "p", **dict(header)}
        )


def make_study(path, study, accuracies, *, base=0.5, skip=(), failed=(), tokens=600, rl=None, **samples):
    """Write the runs of a study. accuracies: (method, arm) -> a level per size."""
    outcomes, cells = Journal(path / "jobs.jsonl"), study.cells()

    def ended(name, status=DONE, **fields):
        outcomes.append(sample_rows.outcome(name, status, **fields))

    for cell in cells:
        write = path / "cells" / cell.baseline / "samples"
        if not write.exists():
            write_samples(write, base, seed=cell.seed)
            ended(cell.baseline)
        if cell.name in failed:
            ended(cell.name, FAILED, error="ValueError: <too long>", tail=["a < b"], log="log.txt")
        elif cell.name not in skip:
            level = accuracies[cell.method, cell.arm][study.sizes.index(cell.num_traces)]
            write_samples(
                path / "cells" / cell.name / "after", level, seed=cell.seed, tokens=tokens, **samples
            )
            for step in (1, 2):
                Journal(path / "cells" / cell.name / "metrics.jsonl").append(
                    {"step": step, "seconds": 1_800.0}
                )
            ended(cell.name)
    for size, level in (rl or {}).items():
        starts = [cell for cell in cells if cell.num_traces == size] or [Cell.of_base(cells[0].model, 0)]
        run = path / "rl" / starts[0].name
        for stage, share in (("before", 0.3), ("after", level)):
            write_samples(run / stage, share, luck="the same")
        Journal(run / "metrics.jsonl").append({"step": 1, "reward_mean": 0.5})
        ended(f"rl {starts[0].name}")
    write_study(path, cells, ["lr 1 (paper: 2)"])
    return path


def study(*methods, sizes=(8_000, 32_000, 220_000), **options):
    return Study(((GEMMA, methods or ("full",)),), sizes, **options)


TABLE = ("full", "long")


@pytest.mark.parametrize(
    ("levels", "base", "phrases", "absent"),
    [
        ([0.5, 0.5, 0.5], 0.5, ["does not change beyond chance"], ["falls"]),
        (
            [0.05, 0.5, 0.9],
            0.9,
            ["falls from", "at 8,000 traces", "valley is crossed"],
            ["no recovery", "still below"],
        ),
        ([0.05, 0.2, 0.4], 0.9, ["falls from", "at 8,000 traces", "still below the base"], ["crossed"]),
        ([0.6, 0.3, 0.05], 0.9, ["at 220,000 traces", "no recovery"], ["crossed"]),
        ([0.5, 0.7, 0.95], 0.4, ["rises from"], ["falls from"]),
    ],
)
def test_the_sentence_follows_from_invented_results(levels, base, phrases, absent, tmp_path):
    path = make_study(tmp_path, study(), {TABLE: levels}, base=base)
    lines = sentences(StudyResults.read(path))
    assert lines[0].startswith("Gemma-3-1b-it, long traces: accuracy ")
    assert all(phrase in lines[0] for phrase in phrases) and not any(phrase in lines[0] for phrase in absent)


def test_accuracy_is_the_unweighted_mean_of_the_benchmarks_and_length_is_math500s(tmp_path):
    path = make_study(
        tmp_path, study(sizes=(8_000,)), {TABLE: [{"math500": 1.0, "aime24": 0.0}]}, base=0.0, tokens=1_200
    )
    results = StudyResults.read(path)
    (curve,), (_, refused) = results.curves(GEMMA), results.points(GEMMA)
    assert refused == []
    assert curve.points[0].accuracy.mean == 0.5  # not 60 / 72, the share of the questions
    assert curve.changes()[0].mean == 0.5
    assert curve.points[0].length.mean == 1_200 and curve.base.length.mean == 600
    assert curve.points[0].accuracy.half > 0


def test_arms_and_methods_are_curves_of_their_own_compared_with_the_first(tmp_path):
    levels = {
        TABLE: [0.1, 0.5],
        ("qlora", "long"): [0.9, 0.5],
        ("full", "fixed"): [0.1, 0.1],
        ("qlora", "fixed"): [0.1, 0.1],
    }
    path = make_study(
        tmp_path,
        study("full", "qlora", sizes=(8_000, 32_000), arms=("long", "fixed"), batch_traces=8),
        levels,
        base=0.9,
    )
    curves = StudyResults.read(path).curves(GEMMA)
    assert [(curve.name, [point.num_traces for point in curve.points]) for curve in curves] == [
        ("gemma-3-1b-it, long traces", [8_000, 32_000]),
        ("gemma-3-1b-it, long traces, one batch size", [32_000]),
        ("gemma-3-1b-it, long traces, QLoRA", [8_000, 32_000]),
        ("gemma-3-1b-it, long traces, one batch size, QLoRA", [32_000]),
    ]
    lines = "\n".join(sentences(StudyResults.read(path)))
    assert "QLoRA: accuracy is above that of gemma-3-1b-it, long traces at 8,000" in lines
    assert "one batch size: accuracy is below that of gemma-3-1b-it, long traces at 32,000" in lines


def test_seeds_are_paired_with_their_own_baseline_and_widen_the_interval(tmp_path):
    one = make_study(tmp_path / "one", study(sizes=(8_000,)), {TABLE: [0.2]}, base=0.6)
    three = make_study(tmp_path / "three", study(sizes=(8_000,), seeds=3), {TABLE: [0.2]}, base=0.6)
    (single,) = StudyResults.read(one).curves(GEMMA)
    (several,) = StudyResults.read(three).curves(GEMMA)
    assert set(several.points[0].shares) == set(several.base.shares) == {0, 1, 2}
    assert several.changes()[0].below_zero() and single.changes()[0].below_zero()


def test_a_cell_that_was_measured_differently_is_left_out_and_named(tmp_path):
    path = make_study(tmp_path, study(sizes=(8_000,)), {TABLE: [0.2]}, header={"prompt": "another"}.items())
    results = StudyResults.read(path)
    refused = results.points(GEMMA)[1]
    assert results.curves(GEMMA) == [] and "x" not in sentences(StudyResults.read(path))
    assert "gemma-3-1b-it-full-8000-seed0 is left out" in refused[0] and "prompt" in refused[0]
    assert "is left out" in write_report(path).read_text()


def test_the_report_has_the_papers_numbers_beside_ours_and_names_what_failed_and_what_is_missing(tmp_path):
    two_arms = study(arms=("long", FIXED_BATCH), batch_traces=8)
    cells = [cell.name for cell in two_arms.cells()]
    levels = {TABLE: [0.05, 0.2, 0.4], ("full", FIXED_BATCH): [0, 0.1, 0.1]}
    path = make_study(tmp_path, two_arms, levels, base=0.24, failed=[cells[1]], skip=[cells[3]])
    (path / "config.json").write_text(json.dumps({"lr": 5e-5}))
    page = write_report(path).read_text()
    assert "3 of 5 cells are done, 1 failed, 1 have not ended yet." in page
    table = page.partition("Every cell")[2].partition("</table>")[0].split("<tr>")
    rows = {tuple(row.split("<td>")[2:4]): row for row in table if row.startswith("<td>gemma")}
    assert "<td>24<td>" in rows["base model", "0"]
    assert "<td>about a quarter of its 24<td>" in rows["long traces", "8,000"]
    assert "<td>15<td>" in rows["long traces", "220,000"]
    assert rows["long traces", "220,000"].endswith("<td>1.00")  # two steps of half an hour
    assert "<td>8<td>" in rows["long traces, one batch size", "220,000"]
    assert "seed 0: FAILED" in rows["long traces", "32,000"] and page.count("FAILED") == 1
    assert (
        "not ended yet" in rows["long traces, one batch size", "32,000"]
        and page.count("seed 0: not ended yet") == 1
    )
    assert (
        f"<h3>{cells[1]}</h3><p class=wrong>ValueError: &lt;too long&gt;</p>" in page and "a &lt; b" in page
    )
    assert "<li>lr 1 (paper: 2)" in page
    assert page.count("<img ") == 2 and "http" not in page  # the curves, and reflection
    assert (path / "gemma-3-1b-it.png").read_bytes().startswith(b"\x89PNG")


def edit_rows(path, change):
    """Rewrite every sample of a study. change: takes (benchmark, row) and returns the row."""
    for file in path.glob("cells/*/*/*.jsonl"):
        header, *rows = (json.loads(line) for line in file.read_text().splitlines())
        lines = [json.dumps(row) for row in (header, *(change(file.stem, row) for row in rows))]
        file.write_text("\n".join(lines) + "\n")


def test_beside_the_papers_stars_accuracy_is_by_its_grading_and_the_strict_one_is_drawn_too(tmp_path):
    path = make_study(tmp_path, study(), {TABLE: [0.2, 0.4, 0.5]})
    strict = StudyResults.read(path).curves(GEMMA)[0]
    assert strict.base.paper_accuracy is None
    (axes, _), stars = valley_figure([strict], "math500", {0: 24.0}, False).axes, {0: 24.0}
    assert axes.get_title() == "Accuracy (strict grading)"

    edit_rows(path, lambda _, row: row | {"paper_verdict": "correct" if row["sample"] else "wrong"})
    (curve,) = StudyResults.read(path).curves(GEMMA)
    assert curve.base.paper_accuracy.mean == 0.5 and curve.base.accuracy == strict.base.accuracy
    axes = valley_figure([curve], "math500", stars, False).axes[0]
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert axes.get_title() == "Accuracy as the paper graded"
    assert drawn["long traces"] == [50.0] * 4
    points = [curve.base, *curve.points]
    assert drawn["strict grading"] == pytest.approx([100 * point.accuracy.mean for point in points])
    axes = valley_figure([curve], "math500", {}, False).axes[0]  # nothing of the paper is beside it
    assert axes.get_title() == "Accuracy" and list(axes.get_lines()[0].get_ydata()) == pytest.approx(
        [100 * point.accuracy.mean for point in points]
    )
    page = write_report(path).read_text()
    assert "<td>50.0<br>(" in page and "as the paper graded, %" in page


def test_the_papers_stars_are_beside_the_mean_of_its_three_benchmarks_alone(tmp_path, monkeypatch):
    two = make_study(tmp_path / "two", study(sizes=(8_000,)), {TABLE: [0.2]})
    assert stars(StudyResults.read(two), GEMMA) == {}
    monkeypatch.setitem(QUESTIONS, "amc23", 20)
    three = make_study(tmp_path / "three", study(sizes=(8_000,)), {TABLE: [0.2]})
    assert stars(StudyResults.read(three), GEMMA) == {0: 24.0, 220_000: 15.0}


def test_a_study_counts_the_answers_that_the_judge_left_open(tmp_path):
    path = make_study(tmp_path, study(sizes=(8_000,)), {TABLE: [1.0]})
    edit_rows(path, lambda _, row: row | {"text": "let me double-check"})
    assert "gave no verdict" not in write_report(path).read_text()  # nobody was asked

    def judged(benchmark, row):
        is_open = benchmark == "math500" and row["question"] in ("q0", "q1")
        return row | {"judged": None if is_open else True}

    edit_rows(path, judged)  # two samples each, before and after
    assert "The judge gave no verdict on 8 answers with a keyword." in write_report(path).read_text()


def test_the_headline_is_of_the_papers_benchmarks_and_the_others_stand_apart(tmp_path, monkeypatch):
    monkeypatch.setitem(QUESTIONS, "gsm8k", 20)
    levels = {"math500": 1.0, "aime24": 0.0, "gsm8k": 1.0}
    path = make_study(tmp_path, study(sizes=(8_000,)), {TABLE: [levels]}, base=0.0)
    results = StudyResults.read(path)
    (curve,) = results.curves(GEMMA)
    assert curve.points[0].accuracy.mean == 0.5 and results.finished[-1].accuracy == 0.5  # not 2 / 3
    page = write_report(path).read_text()
    apart = page.partition("Accuracy by benchmark, %")[2]
    assert "<th>gsm8k" in apart and apart.count("<td>100.0<br>(") == 2
    monkeypatch.delitem(QUESTIONS, "math500")
    monkeypatch.delitem(QUESTIONS, "aime24")
    only = make_study(tmp_path / "only", study(sizes=(8_000,)), {TABLE: [{"gsm8k": 1.0}]}, base=0.0)
    assert StudyResults.read(only).curves(GEMMA)[0].points[0].accuracy.mean == 1.0


def test_efficiency_reflection_and_the_length_of_reflective_answers_by_size_are_those_by_hand(tmp_path):
    path = make_study(tmp_path, study(sizes=(8_000,)), {TABLE: [1.0]}, base=1.0)

    def change(benchmark, row):  # a quarter of the answers to MATH-500 recheck, and are 100 tokens longer
        reflects = benchmark == "math500" and row["sample"] == 1 and int(row["question"][1:]) % 2 == 0
        text = "let me double-check" if reflects else "x"
        return row | {"text": text, "tokens": row["tokens"] + 100 * reflects}

    edit_rows(path, change)
    results = StudyResults.read(path)
    base, (tuned,) = results.bases(GEMMA), results.points(GEMMA)[0]["long traces"].values()
    for seeds, size in ((list(base.values()), 0), (tuned, 8_000)):
        point = reflection_of(size, {found.cell.seed: found.results["math500"] for found in seeds})
        assert point.share.mean == 0.25 and point.tokens_longer.mean == pytest.approx(100)
        assert point.efficiency.mean == pytest.approx(1_000 / 625)
    judged = results.finished[0].results["math500"]
    for i, row in enumerate(row for row in judged.rows if "double-check" in row["text"]):
        row["judged"] = (False, True, None)[i % 3]  # None: the judge gave no verdict
    assert reflection_of(0, {0: judged}).share.mean == pytest.approx(0.25 * 2 / 3)
    none = reflection_of(0, {0: results.finished[0].results["aime24"]})
    assert none.share.mean == 0 and none.tokens_longer is None
    page = write_report(path).read_text()
    assert "Token efficiency and reflection (math500)" in page
    assert "<td>long traces<td>8,000<td>1.600&nbsp;± 0.0" in page and "<td>+100&nbsp;± 0" in page
    assert (path / "gemma-3-1b-it-reflection.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_of_a_study_that_has_only_begun_can_be_written_and_a_folder_without_one_is_refused(tmp_path):
    write_study(tmp_path, study().cells(), [])
    assert "0 of 3 cells are done" in write_report(tmp_path).read_text()
    results = StudyResults.read(tmp_path)
    assert sentences(results) == [] and results.length_benchmark == "math500"
    assert results.cells == study().cells()
    with pytest.raises(ValueError, match="holds no study"):
        write_report(tmp_path / "other")


@pytest.mark.slow
def test_reinforcement_learning_is_compared_with_that_from_the_base_model(tmp_path):
    def lines(levels):
        path = make_study(tmp_path / str(levels), study(), {TABLE: [0.1, 0.5, 0.5]}, rl=levels)
        page = write_report(path).read_text()
        assert "<h2>Reinforcement learning</h2>" in page and page.count("<img ") == 3
        return [line for line in sentences(StudyResults.read(path)) if "reinforcement" in line]

    base, below, above = lines({0: 0.5, 8_000: 0.1, 220_000: 0.95})
    assert "from the base model: accuracy rises" in base and "ends" not in base
    assert "from 8,000 traces: accuracy falls" in below and "it ends below the base model (-" in below
    assert "from 220,000 traces: accuracy rises" in above and "it ends above the base model (+" in above
    _, alike = lines({0: 0.5, 8_000: 0.5})
    assert "it is not known whether it ends above or below the base model" in alike
    assert "ends" not in lines({8_000: 0.5})[0]  # nothing to compare with


def test_answers_to_problems_of_ones_own_that_are_called_toy_have_no_steps_to_check(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "QUESTIONS", {"toy": 2})
    path = make_study(tmp_path, study(sizes=(8_000,)), {TABLE: [0.5]})
    for problem, has_steps in (("7+5-3?", True), ("Compute 2*3", False)):
        for log in path.rglob("toy.jsonl"):
            log.write_text(re.sub(r'"problem": "(?!1\+1)[^"]*"', f'"problem": "{problem}"', log.read_text()))
        page = write_report(path).read_text()
        assert problem in page and ("answers step by step (toy)" in page) == has_steps
