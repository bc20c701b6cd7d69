"""The sweep as a person starts it: real processes, the shipped model, a model whose context is too short, and a kill."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from children import run_recipe, start_recipe

from kit.config import parse
from kit.models.loading import TINY
from kit.valley.sweep import MODELS, TABLE, Grid, parse_models, parse_numbers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import valley_sweep

    return valley_sweep


@pytest.fixture
def short_context(tmp_path):
    """The shipped model, said to be made for 32 tokens."""
    folder = tmp_path / "short"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    return folder


@pytest.mark.slow
def test_killed_in_a_cell_and_resumed_it_finishes_what_is_left_and_reports_what_fails(
    short_context, tmp_path
):
    flags = ["--smoke", "--models", f"tiny,{short_context}", "--sizes", "96", "--max_steps", "12", "--checkpoint_every", "4",
             "--num_questions", "4", "--num_samples", "1", "--max_new_tokens", "40"]  # fmt: skip
    run = tmp_path / "runs" / "valley_sweep" / "001"
    cell, baseline, journal = (
        run / "cells" / "tiny-full-96-seed0",
        run / "baselines" / "tiny-seed0",
        run / "jobs.jsonl",
    )
    metrics = cell / "metrics.jsonl"
    sweep = start_recipe("valley_sweep", *flags, cwd=tmp_path)
    while sweep.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        time.sleep(0.01)
    sweep.kill()
    assert sweep.returncode == -signal.SIGKILL, sweep.stderr
    assert [json.loads(line)["job"] for line in journal.read_text().splitlines()] == ["baseline tiny-seed0"]
    assert not (cell / "model").exists() and list((cell / "checkpoints").glob("step_*"))
    kept = {path: path.stat().st_mtime_ns for path in baseline.rglob("*")}

    resumed = run_recipe("valley_sweep", *flags, "--resume", cwd=tmp_path)
    output, errors = resumed.stdout, resumed.stderr
    assert resumed.returncode == 1
    assert "2 of 4 runs failed: baseline short-seed0, cell short-full-96-seed0; --resume" in errors, errors
    assert all(
        path.stat().st_mtime_ns == before for path, before in kept.items()
    )  # what was done is not done again
    rows = [json.loads(line) for line in journal.read_text().splitlines()][1:]
    assert [(row["job"], row["status"]) for row in rows] == [
        ("cell tiny-full-96-seed0", "done"), ("baseline short-seed0", "failed"), ("cell short-full-96-seed0", "failed"),
    ]  # fmt: skip
    assert "max_new_tokens is 40, but the model was made for 32" in rows[1]["error"]
    assert rows[2]["error"] == "not started: it needs baseline short-seed0, which failed"
    assert any("run folder" in line for line in Path(tmp_path / rows[1]["log"]).read_text().splitlines())
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(
        range(1, 13)
    )  # none twice or missing

    for line in ("lr 0.003 (paper: 5e-05)", "num_questions 4 (paper: all)", "cell tiny-full-96-seed0, ",
                 "FAILED baseline short-seed0: ValueError: prompt 0 has", "Tiny, full fine-tuning: accuracy ",
                 "report runs"):  # fmt: skip
        assert line in output
    assert (cell / "before" / "toy.jsonl").read_bytes() == (baseline / "samples" / "toy.jsonl").read_bytes()
    stored = json.loads((cell / "config.json").read_text())
    assert (stored["num_traces"], stored["epochs"], stored["batch_traces"], stored["seed"]) == (96, 4, 1, 0)
    assert "before      taken from" in (cell / "log.txt").read_text()
    page = (run / "report.html").read_text()
    assert "1 of 2 cells are done, 1 failed." in page and "<h3>cell short-full-96-seed0</h3>" in page
    assert "http" not in page and page.count("data:image/png;base64,") == 1


def test_the_default_is_the_papers_table_and_its_settings(recipe):
    config = recipe.Config()
    grid = Grid(parse_models(config.models, config.methods), parse_numbers("sizes", config.sizes))
    assert grid.sizes == tuple(row.traces for row in TABLE)
    assert [model for model, _ in grid.models] == list(MODELS) and {
        methods for _, methods in grid.models
    } == {("full",)}
    assert (config.lr, config.warmup_ratio, config.row_tokens, config.max_new_tokens) == (
        5e-5,
        0.05,
        16_384,
        16_384,
    )
    assert (config.temperature, config.top_p, config.num_samples, config.benchmarks) == (
        0.6,
        0.95,
        0,
        "math500,aime24,amc23",
    )
    assert recipe.deviations(config, grid) == [
        "AdamW with 8-bit states, bf16 weights rounded stochastically (paper: AdamW, bf16)"
    ]
    one = recipe.gemma3_1b_8k.Config()  # what is not in the sweep's settings is the single recipe's
    assert {
        name: value for name, value in recipe.shared(config, type(one)).items() if value != getattr(one, name)
    } == {}


def test_a_preset_says_every_one_of_its_deviations(recipe):
    config = parse(recipe.Config, ["--preset", "rtx24"], smoke=recipe.SMOKE, presets=recipe.PRESETS)
    grid = Grid(parse_models(config.models, config.methods), parse_numbers("sizes", config.sizes))
    told = "\n".join(recipe.deviations(config, grid))
    for text in ("500, 2,000 traces", "without 16,000", "num_questions 100 (paper: all)", "max_new_tokens 8192 (paper: 16384)",
                 "num_samples 2 (paper: 8 for AIME24", "QLoRA of rank 16 for Qwen2.5-3B-Instruct"):  # fmt: skip
        assert text in told


def test_the_jobs_are_runs_of_the_other_recipes_with_settings_that_these_know(recipe, tmp_path):
    config = parse(recipe.Config, ["--smoke", "--methods", "full+qlora", "--rl_sizes", "0,96", "--rl_flags=--steps 2 --smoke"],
                   smoke=recipe.SMOKE)  # fmt: skip
    grid = Grid(parse_models(config.models, config.methods), (24, 96))
    chosen = {("tiny", "full"): ({"tile_tokens": 64}, ""), ("tiny", "qlora"): ({}, "it needs 99 GiB")}
    jobs = {job.name: job for job in recipe.jobs_of(config, grid.cells(), chosen, (0, 96), tmp_path)}
    assert list(jobs) == [
        "baseline tiny-seed0", "cell tiny-full-24-seed0", "cell tiny-full-96-seed0", "cell tiny-qlora-24-seed0",
        "cell tiny-qlora-96-seed0", "rl tiny-full-0-seed0", "rl tiny-full-96-seed0", "rl tiny-qlora-0-seed0",
        "rl tiny-qlora-96-seed0",
    ]  # fmt: skip
    parsed = {}
    for name, job in jobs.items():
        module = getattr(recipe, job.recipe.stem)
        parsed[name] = parse(
            module.Config, job.command()[4:], smoke=module.SMOKE, presets=getattr(module, "PRESETS", None)
        )
    full, adapters = parsed["cell tiny-full-96-seed0"], parsed["cell tiny-qlora-96-seed0"]
    assert (full.num_traces, full.epochs, full.batch_traces, full.qlora_rank, full.tile_tokens, full.lr) == (
        96,
        4,
        1,
        0,
        64,
        3e-3,
    )
    assert (adapters.qlora_rank, adapters.tile_tokens, jobs["cell tiny-qlora-96-seed0"].problem) == (
        16,
        0,
        "it needs 99 GiB",
    )
    assert full.baseline == adapters.baseline == parsed["baseline tiny-seed0"].out
    assert jobs["cell tiny-full-96-seed0"].needs == ("baseline tiny-seed0",)
    untouched, tuned = parsed["rl tiny-qlora-0-seed0"], parsed["rl tiny-qlora-96-seed0"]
    assert (untouched.model, untouched.qlora_rank) == ("tiny", 16) and jobs[
        "rl tiny-qlora-0-seed0"
    ].needs == ()
    assert (tuned.model, tuned.qlora_rank) == (f"{adapters.out}/model", 0)  # its adapters are trained on
    assert jobs["rl tiny-qlora-96-seed0"].needs == ("cell tiny-qlora-96-seed0",)
    assert (tuned.steps, tuned.eval_tokens, tuned.lr) == (2, 300, 1e-4)  # RL's own rate, not the sweep's


def test_without_a_gpu_it_says_what_can_be_done_here_and_starts_nothing(recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU") as refused:
        recipe.main(recipe.Config())
    assert "--plan" in str(refused.value) and "--smoke" in str(refused.value)
    with pytest.raises(ValueError, match="rl_sizes is 0,500 but no model is made with 500 traces"):
        recipe.main(recipe.Config(rl_sizes="0,500"))
    assert not (tmp_path / "runs").exists()


def test_the_plan_is_printed_and_written_without_a_gpu_or_a_run_folder(recipe, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [
        "--plan",
        "--models",
        "tiny",
        "--sizes",
        "8000,220000",
        "--row_tokens",
        "256",
        "--json",
        "plan.json",
    ]
    recipe.main(parse(recipe.Config, flags, smoke=recipe.SMOKE, presets=recipe.PRESETS))
    said = capsys.readouterr().out
    for text in ("tiny, full: ", "(simulated); fits 6 GB", "tiny-full-220000", "3,438", "h on one card", "Estimates, not timings",
                 "row_tokens 256 (paper: 16384)"):  # fmt: skip
        assert text in said
    assert [row["num_traces"] for row in json.loads((tmp_path / "plan.json").read_text())] == [8_000, 220_000]
    assert not (tmp_path / "runs").exists()
