"""The toy study as a person starts it: real processes, kills in training and in sampling, its settings."""

import time
from pathlib import Path

import pytest
from children import run_recipe, start_recipe, wait_until_still

from kit import models
from kit.config import parse
from kit.data.chat import ChatFormat
from kit.data.documents import load_documents
from kit.valley.finished import StudyResults
from kit.valley.jobs import read_outcomes
from kit.valley.runs import jobs_of
from kit.valley.study import ARMS, Cell

ROOT = Path(__file__).resolve().parents[2]
FEW = [
    "--num_samples",
    "1",
    "--num_questions",
    "6",
    "--max_new_tokens",
    "48",
    "--seeds",
    "1",
    "--epochs",
    "2",
    "--batch_traces",
    "4",
]


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import valley_demo

    return valley_demo


def numbers(path):
    """Everything of a study's runs that does not tell the time."""
    found = {}
    for done in StudyResults.read(path).finished:
        run = path / "cells" / done.cell.name
        metrics = [[row[name] for name in ("step", "loss", "grad_norm", "tokens")] for row in done.metrics]
        rows = done.results["toy"].rows
        samples = sorted((row["question"], row["sample"], row["text"], row["verdict"]) for row in rows)
        weights = (run / "model" / "model.safetensors").read_bytes() if metrics else b""
        found[done.cell.name] = (metrics, samples, weights)
    return found


@pytest.mark.slow
def test_killed_in_training_and_in_sampling_and_resumed_two_at_a_time_it_ends_as_an_unbroken_run(tmp_path):
    flags = [
        *FEW,
        "--models",
        "tiny,tinier",
        "--arms",
        "long,short",
        "--sizes",
        "8,24",
        "--control_sizes",
        "24",
    ]
    whole = run_recipe("valley_demo", *flags, "--workers", "1", "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    broken, resume = tmp_path / "broken", []
    for where in ("tiny-full-24-seed0/metrics.jsonl", "tiny-full-24-short-seed0/after/toy.jsonl"):
        process = start_recipe(
            "valley_demo", *flags, "--workers", "1", "--out", "broken", *resume, cwd=tmp_path
        )
        watched, resume = broken / "cells" / where, ["--resume"]
        while process.poll() is None and not (watched.exists() and watched.read_text().count("\n") >= 4):
            time.sleep(0.001)
        process.kill()
        wait_until_still(watched)
        ended = read_outcomes(broken)
        assert where.split("/")[0] not in ended, "killed too late to test anything"

    done = run_recipe("valley_demo", *flags, "--workers", "2", "--out", "broken", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_outcomes(broken).items() >= ended.items()  # finished runs are kept
    assert numbers(broken) == numbers(tmp_path / "whole")
    results = StudyResults.read(broken)
    base, smaller = "tiny-full-0-seed0", "tinier-full-0-seed0"
    assert [found.cell.name for found in results.finished] == [
        base,
        smaller,
        "tiny-full-8-seed0",
        "tiny-full-24-seed0",
        "tiny-full-24-short-seed0",
        "tinier-full-8-seed0",
        "tinier-full-24-seed0",
    ]
    samples = {name: of_cell[1] for name, of_cell in numbers(broken).items()}
    long, short = samples["tiny-full-24-seed0"], samples["tiny-full-24-short-seed0"]
    assert long not in (short, samples[base], samples["tinier-full-24-seed0"])
    assert [
        (curve.name, [point.num_traces for point in curve.points]) for curve in results.curves("tiny")
    ] == [
        ("tiny, long traces", [8, 24]),
        ("tiny, short traces", [24]),
    ]
    assert [curve.name for curve in results.curves("tinier")] == ["tinier, long traces"]
    page = (broken / "report.html").read_text()
    assert page.count("<img ") == 8 and "http" not in page  # four per model
    for text in (
        "Tiny, long traces: accuracy ",
        "Tiny, short traces: accuracy ",
        "Tinier, long traces: accuracy ",
        "with one seed they do not cover",
        "long traces, 24:",
    ):
        assert text in page


@pytest.mark.slow
def test_a_finished_study_takes_more_sizes_and_then_reinforcement_learning(tmp_path):
    flags = ["--smoke", "--arms", "long", "--num_questions", "4", "--max_new_tokens", "48"]
    done = run_recipe("valley_demo", *flags, "--sizes", "8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "valley_demo" / "001"

    first = read_outcomes(run)
    assert [*first] == ["tiny-full-0-seed0", "tiny-full-8-seed0"]
    assert {path.name for path in run.iterdir()} >= {
        "config.json",
        "study.json",
        "data",
        "tiny.png",
        "tiny-causes.png",
        "tiny-steps.png",
        "report.html",
    }
    for line in ("tiny-full-0-seed0, ", "tiny-full-8-seed0, ", "Tiny, long traces: accuracy ", "report "):
        assert line in done.stdout

    flags += ["--sizes", "4,8", "--resume"]
    again = run_recipe("valley_demo", *flags, "--rl_steps", "1", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    then = read_outcomes(run)
    assert {name: then[name] for name in first} == first and "tiny-full-4-seed0" in then
    starts = [name for name in then if name.startswith("rl ")]
    assert {"rl tiny-full-0-seed0", "rl tiny-full-8-seed0"} <= {*starts}
    assert "reinforcement learning from the base model: accuracy" in again.stdout
    assert f"recipes/ask.py --model {run.resolve()} " in again.stdout.splitlines()[-1]
    other = run_recipe("valley_demo", *flags, "--rl_steps", "2", cwd=tmp_path)
    assert other.returncode != 0
    assert "rl_steps is 2 but " in other.stderr and "was trained for 1; pass that" in other.stderr


def test_quick_sets_what_the_flags_may_change(recipe):
    config = parse(recipe.Config, ["--quick", "--sizes", "8"], smoke=recipe.SMOKE, quick=recipe.QUICK)
    assert (config.quick, config.smoke, config.seeds, config.sizes) == (True, False, 1, "8")
    full = recipe.study_of(recipe.Config())
    assert (full.seeds, len(full.sizes), full.compared) == (3, 6, ["tiny"])
    assert {(cell.epochs, cell.batch_traces) for cell in full.cells() if cell.arm == "long"} == {(4, 16)}
    growing = [cell.num_traces for cell in full.cells() if cell.arm == "growing" and cell.seed == 0]
    assert growing == [64, 1_024]  # at 4,096 its batch is that of the others
    with pytest.raises(ValueError, match="sizes is '8,x' but 'x' in it must be a whole number"):
        recipe.study_of(recipe.Config(sizes="8,x"))


@pytest.mark.parametrize("arm", ARMS)
def test_the_rows_of_a_cell_hold_a_steps_traces_in_the_models_own_tokens(recipe, arm, tmp_path):
    """The study counts tokens without a tokenizer; a wrong count would change every pack."""
    config = recipe.Config(seeds=1, sizes="40", control_sizes="40", arms=arm)
    study = recipe.study_of(config)
    recipe.write_data(study, set(), tmp_path / "data", rl=False)
    cell = study.cells()[0] if arm == "growing" else Cell("tiny", "full", 40, 0, 4, 16, arm)
    settings = recipe.recipes_of(config, tmp_path / "data").finetune(cell)
    _, tokenizer = models.load("tiny", device="cpu")
    documents, _ = load_documents(
        settings["traces"],
        ChatFormat(tokenizer, instruction=""),
        row_tokens=10_000,
        num_traces=40,
        shuffle=False,
        long_share=ARMS[arm].long_share,
    )
    lengths = list(map(len, documents))
    assert settings["row_tokens"] == max(*lengths, cell.batch_traces * sum(lengths) // 40)


def test_every_run_of_the_toy_is_one_that_its_recipe_takes(recipe, tmp_path):
    config = recipe.Config(**recipe.SMOKE, rl_steps=3)
    study = recipe.study_of(config)
    recipe.write_data(study, {"7+5?"}, tmp_path / "data", rl=True)
    for name in ("traces-seed0.jsonl", "prompts-seed0.jsonl"):
        assert '"7+5?"' not in (tmp_path / "data" / name).read_text()
    jobs = {
        job.name: job
        for job in jobs_of(study.cells(), recipe.recipes_of(config, tmp_path / "data"), tmp_path)
    }
    import gemma3_1b_8k

    short = parse(gemma3_1b_8k.Config, jobs["tiny-full-64-short-seed0"].command())
    assert (short.long_share, short.shuffle, short.beta2, short.recompute) == (0.0, False, 0.95, False)
    assert (short.num_traces, short.epochs, short.batch_traces, short.lr) == (64, 4, 16, 1e-3)
    assert short.baseline == str(tmp_path / "cells" / "tiny-full-0-seed0")


def test_the_command_that_goes_on_names_the_recipe_and_the_run_whatever_program_asked_for_it(
    recipe, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["/site-packages/ipykernel_launcher.py"])  # in a notebook
    _, command = recipe.next_command(recipe.Config(out="runs/my lesson"))
    assert command.endswith(" recipes/valley_demo.py --resume --out 'runs/my lesson' --rl_steps 80")
    _, command = recipe.next_command(recipe.Config())
    assert command.endswith(" recipes/valley_demo.py --resume --rl_steps 80")
