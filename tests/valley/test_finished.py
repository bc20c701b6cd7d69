"""Made-up sweeps: curves, sentences and the report's table follow from the samples, and change if these change."""

import json
import random

import pytest

from kit.report.sweep import write_report
from kit.run import Journal
from kit.valley.finished import Sweep, curves_of, length_benchmark, sentences
from kit.valley.jobs import DONE, FAILED
from kit.valley.sweep import FIXED_BATCH, Grid, rl_name, write_sweep

GEMMA = "google/gemma-3-1b-it"
QUESTIONS = {"math500": 60, "aime24": 12}


def write_samples(folder, accuracy, *, tokens=600, seed=0, header=(), finished=True, luck=None):
    """Two samples a question of both benchmarks, right with the same chance, or a chance a benchmark. luck: of its own unless
    given, the same wherever the sweep lies."""
    for name, count in QUESTIONS.items():
        level = accuracy[name] if isinstance(accuracy, dict) else accuracy
        rng = random.Random(f"{luck or '/'.join(folder.parts[-3:])} {name}")
        journal = Journal(folder / f"{name}.jsonl")
        journal.append({"header": {"seed": seed, "prompt": "p", **dict(header)}})
        for i in range(count):
            for sample in range(2):
                verdict = "correct" if rng.random() < level else "wrong"
                length = tokens if name == "math500" else 9_999
                journal.append({"question": f"q{i}", "sample": sample, "verdict": verdict, "tokens": length, "finished": finished,
                                "text": "x", "prediction": "1", "answer": "1"})  # fmt: skip


def make_sweep(path, grid, accuracies, *, base=0.5, skip=(), failed=(), tokens=600, rl=None, **samples):
    """accuracies: of a method and arm, a level a size."""
    outcomes, cells = Journal(path / "jobs.jsonl"), grid.cells()

    def ended(name, status=DONE, **fields):
        outcomes.append(
            {"job": name, "status": status, "seconds": 1.0, "error": "", "tail": [], "log": ""} | fields
        )

    for cell in cells:
        write = path / "baselines" / cell.baseline / "samples"
        if not write.exists():
            write_samples(write, base, seed=cell.seed)
            ended(f"baseline {cell.baseline}")
        if cell.name in failed:
            ended(f"cell {cell.name}", FAILED, error="ValueError: <too long>", tail=["a < b"], log="log.txt")
        elif cell.name not in skip:
            level = accuracies[cell.method, cell.arm][grid.sizes.index(cell.num_traces)]
            write_samples(
                path / "cells" / cell.name / "after", level, seed=cell.seed, tokens=tokens, **samples
            )
            for step in (1, 2):
                Journal(path / "cells" / cell.name / "metrics.jsonl").append(
                    {"step": step, "seconds": 1_800.0}
                )
            ended(f"cell {cell.name}")
    for size, level in (rl or {}).items():
        name = rl_name(cells[0].model, cells[0].method, size, 0)
        for stage, share in (("before", 0.3), ("after", level)):
            write_samples(path / "rl" / name / stage, share, luck="the same")
        ended(f"rl {name}")
    write_sweep(path, cells, ["lr 1 (paper: 2)"], list(rl or {}))
    return path


def grid(*methods, sizes=(8_000, 32_000, 220_000), **options):
    return Grid(((GEMMA, methods or ("full",)),), sizes, **options)


TABLE = ("full", "table")


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
def test_the_sentence_follows_from_made_up_results(levels, base, phrases, absent, tmp_path):
    path = make_sweep(tmp_path, grid(), {TABLE: levels}, base=base)
    said = sentences(Sweep.read(path))
    assert said[0].startswith("Gemma-3-1b-it, full fine-tuning: accuracy ")
    assert all(phrase in said[0] for phrase in phrases) and not any(phrase in said[0] for phrase in absent)


def test_accuracy_is_the_unweighted_mean_of_the_benchmarks_and_length_is_math500s(tmp_path):
    path = make_sweep(
        tmp_path, grid(sizes=(8_000,)), {TABLE: [{"math500": 1.0, "aime24": 0.0}]}, base=0.0, tokens=1_200
    )
    (curve,), refused = curves_of(Sweep.read(path), GEMMA)
    assert refused == []
    assert curve.points[0].accuracy.mean == 0.5  # not 60 / 72, the share of the questions
    assert curve.changes()[0].mean == 0.5
    assert curve.points[0].length.mean == 1_200 and curve.base.length.mean == 600
    assert curve.points[0].accuracy.half > 0


def test_arms_and_methods_are_curves_of_their_own_compared_with_the_first(tmp_path):
    levels = {
        TABLE: [0.1, 0.5],
        ("qlora", "table"): [0.9, 0.5],
        ("full", "fixed"): [0.1, 0.1],
        ("qlora", "fixed"): [0.1, 0.1],
    }
    path = make_sweep(tmp_path, grid("full", "qlora", sizes=(8_000, 32_000), fixed_batch=8), levels, base=0.9)
    curves, _ = curves_of(Sweep.read(path), GEMMA)
    assert [(curve.name, [point.num_traces for point in curve.points]) for curve in curves] == [
        ("gemma-3-1b-it, full fine-tuning", [8_000, 32_000]),
        ("gemma-3-1b-it, full fine-tuning, batch 8 throughout", [32_000]),
        ("gemma-3-1b-it, QLoRA", [8_000, 32_000]),
        ("gemma-3-1b-it, QLoRA, batch 8 throughout", [32_000]),
    ]
    said = "\n".join(sentences(Sweep.read(path)))
    assert "QLoRA: accuracy is above that of gemma-3-1b-it, full fine-tuning at 8,000" in said
    assert "batch 8 throughout: accuracy is below that of gemma-3-1b-it, full fine-tuning at 32,000" in said


def test_seeds_are_paired_with_their_own_baseline_and_widen_the_interval(tmp_path):
    one = make_sweep(tmp_path / "one", grid(sizes=(8_000,)), {TABLE: [0.2]}, base=0.6)
    three = make_sweep(tmp_path / "three", grid(sizes=(8_000,), seeds=3), {TABLE: [0.2]}, base=0.6)
    (single,), _ = curves_of(Sweep.read(one), GEMMA)
    (several,), _ = curves_of(Sweep.read(three), GEMMA)
    assert set(several.points[0].shares) == set(several.base.shares) == {0, 1, 2}
    assert several.changes()[0].below_zero() and single.changes()[0].below_zero()


def test_a_cell_that_was_measured_otherwise_is_left_out_and_said_so(tmp_path):
    path = make_sweep(tmp_path, grid(sizes=(8_000,)), {TABLE: [0.2]}, header={"prompt": "another"}.items())
    curves, refused = curves_of(Sweep.read(path), GEMMA)
    assert curves[0].points == [] and "x" not in sentences(Sweep.read(path))
    assert "gemma-3-1b-it-full-8000-seed0 is left out" in refused[0] and "prompt" in refused[0]
    assert "is left out" in write_report(path).read_text()


def test_the_report_has_the_papers_numbers_beside_ours_and_names_what_failed_and_what_is_missing(tmp_path):
    cells = [cell.name for cell in grid(fixed_batch=8).cells()]
    path = make_sweep(
        tmp_path, grid(fixed_batch=8), {TABLE: [0.05, 0.2, 0.4], ("full", FIXED_BATCH): [0, 0.1, 0.1]}, base=0.24,
        failed=[cells[1]], skip=[cells[3]],
    )  # fmt: skip
    (path / "config.json").write_text(json.dumps({"lr": 5e-5}))
    page = write_report(path).read_text()
    assert "3 of 5 cells are done, 1 failed, 1 have not ended yet." in page
    rows = {tuple(row.split("<td>")[2:4]): row for row in page.split("<tr>") if row.startswith("<td>gemma")}
    assert "<td>24<td>" in rows["base model", "0"]
    assert "<td>about a quarter of its 24<td>" in rows["full fine-tuning", "8,000"]
    assert "<td>15<td>" in rows["full fine-tuning", "220,000"]
    assert "<td>1.00<td>" in rows["full fine-tuning", "220,000"]  # two steps of half an hour
    assert "<td>8<td>" in rows["full fine-tuning, batch 8 throughout", "220,000"]
    assert "seed 0: FAILED" in rows["full fine-tuning", "32,000"] and page.count("FAILED") == 1
    assert (
        "not ended yet" in rows["full fine-tuning, batch 8 throughout", "32,000"]
        and page.count("seed 0: not ended yet") == 1
    )
    assert (
        f"<h3>cell {cells[1]}</h3><p class=wrong>ValueError: &lt;too long&gt;</p>" in page
        and "a &lt; b" in page
    )
    assert "<li>lr 1 (paper: 2)" in page
    assert page.count("data:image/png;base64,") == 1 and "http" not in page
    assert (path / "gemma-3-1b-it.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_of_a_sweep_that_has_only_begun_can_be_written(tmp_path):
    write_sweep(tmp_path, grid().cells(), [], [])
    assert "0 of 3 cells are done" in write_report(tmp_path).read_text()
    assert sentences(Sweep.read(tmp_path)) == [] and length_benchmark(Sweep.read(tmp_path)) == "math500"


def test_reinforcement_learning_is_compared_with_that_from_the_untouched_model(tmp_path):
    def said(levels):
        path = make_sweep(tmp_path / str(levels), grid(), {TABLE: [0.1, 0.5, 0.5]}, rl=levels)
        assert "<h2>Reinforcement learning</h2>" in write_report(path).read_text()
        return [line for line in sentences(Sweep.read(path)) if "reinforcement" in line]

    below, above = said({0: 0.5, 8_000: 0.1, 220_000: 0.95})
    assert "after 8,000 traces ends below that from the base model" in below
    assert "after 220,000 traces ends above that" in above
    (alike,) = said({0: 0.5, 8_000: 0.5})
    assert "after 8,000 traces cannot be told from that" in alike
    assert said({8_000: 0.5}) == []  # nothing to compare with
