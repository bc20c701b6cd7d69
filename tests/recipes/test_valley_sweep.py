"""The sweep as a person starts it: real processes, a model whose context is too short, and a kill."""

import importlib
import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from children import run_recipe, start_recipe
from test_valley_demo import numbers

from kit.config import parse
from kit.lock import release, share
from kit.models.shipped import TINY
from kit.paper import MODELS, TABLE
from kit.run import RunFolder
from kit.valley.runs import jobs_of, rl_jobs
from kit.valley.study import Cell

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--sizes", "96", "--max_steps", "12", "--checkpoint_every", "4", "--workers", "1"]
SMALL += ["--num_questions", "4", "--num_samples", "1", "--max_new_tokens", "40"]


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import valley_sweep

    return valley_sweep


@pytest.fixture
def short_context(tmp_path):
    """Return the shipped model with a context of 32 tokens."""
    folder = tmp_path / "short"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    return folder


@pytest.mark.slow
def test_killed_in_a_cell_and_resumed_it_finishes_what_is_left_and_reports_what_fails(
    short_context, tmp_path
):
    flags = ["--smoke", "--models", f"tiny,{short_context}", *SMALL]
    run = tmp_path / "runs" / "valley_sweep" / "001"
    cell, baseline = run / "cells" / "tiny-full-96-seed0", run / "cells" / "tiny-full-0-seed0"
    journal, resumed_journal = (run / "processes" / name / "jobs.jsonl" for name in ("001", "002"))
    metrics = cell / "metrics.jsonl"
    sweep = start_recipe("valley_sweep", *flags, cwd=tmp_path)
    while sweep.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        time.sleep(0.01)
    sweep.kill()
    assert sweep.returncode == -signal.SIGKILL, sweep.stderr
    assert [json.loads(line)["job"] for line in journal.read_text().splitlines()] == ["tiny-full-0-seed0"]
    assert not (cell / "model").exists() and list((cell / "checkpoints").glob("step_*"))
    kept = {path: path.stat().st_mtime_ns for path in baseline.rglob("*")}

    resumed = run_recipe("valley_sweep", *flags, "--resume", cwd=tmp_path)
    output, errors = resumed.stdout, resumed.stderr
    assert resumed.returncode == 1
    assert "2 of 4 runs failed: short-full-0-seed0, short-full-96-seed0; --resume" in errors, errors
    # what was done is not done again
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    rows = [json.loads(line) for line in resumed_journal.read_text().splitlines()]
    assert [(row["job"], row["status"]) for row in rows] == [
        ("tiny-full-96-seed0", "done"),
        ("short-full-0-seed0", "failed"),
        ("short-full-96-seed0", "failed"),
    ]
    assert "max_new_tokens is 40, but the model was made for 32" in rows[1]["error"]
    assert rows[2]["error"] == "not started: it needs short-full-0-seed0, which failed"
    assert any("run folder" in line for line in Path(tmp_path / rows[1]["log"]).read_text().splitlines())
    # no step twice or missing
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 13))

    for line in (
        "lr 0.003 (paper: 5e-05)",
        "num_questions 4 (paper: all)",
        "tiny-full-96-seed0, ",
        "FAILED short-full-0-seed0: prompt ",
        "Tiny, long traces: accuracy ",
        "report ",
    ):
        assert line in output
    assert (cell / "before" / "toy.jsonl").read_bytes() == (baseline / "samples" / "toy.jsonl").read_bytes()
    stored = json.loads((cell / "config.json").read_text())
    assert (stored["num_traces"], stored["epochs"], stored["batch_traces"], stored["seed"]) == (96, 4, 1, 0)
    assert "before      taken from" in (cell / "log.txt").read_text()
    page = (run / "report.html").read_text()
    assert "1 of 2 cells are done, 1 failed." in page and "<h3>short-full-96-seed0</h3>" in page
    assert "http" not in page and page.count("<img ") == 4


@pytest.mark.slow
def test_two_processes_share_a_study_and_one_takes_over_the_cell_in_which_the_other_is_killed(tmp_path):
    flags = ["--smoke", "--models", "tiny,tinier", *SMALL]
    whole = run_recipe("valley_sweep", *flags, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr

    shared, killed = tmp_path / "shared", ""
    both = [start_recipe("valley_sweep", *flags, "--out", "shared", cwd=tmp_path) for _ in range(2)]
    while not killed:
        assert {child.poll() for child in both} == {None}, [child.stderr for child in both]
        steps = {path: path.read_text().count("\n") for path in shared.glob("cells/*/metrics.jsonl")}
        killed = next((path.parent for path, count in steps.items() if 5 <= count < 12), "")
        time.sleep(0.01)
    owner = shared / "processes" / (killed / "claim-1").read_text()
    victim = next(c for c in both if f"process {c._process.pid} " in (owner / ".lock").read_text())
    victim.kill()
    survivor = both[1 - both.index(victim)]
    assert survivor.wait() == 0, survivor.stderr

    rows = [json.loads(line)["job"] for path in shared.glob("processes/*/jobs.jsonl") for line in path.open()]
    assert sorted(rows) == sorted(path.name for path in (shared / "cells").iterdir()) and len(rows) == 4
    assert (killed / "claim-2").is_file() and len([*shared.glob("cells/*/claim-2")]) == 1
    assert numbers(shared) == numbers(tmp_path / "whole")
    assert "2 of 2 cells are done." in (shared / "report.html").read_text()


def test_the_default_is_the_papers_table_and_its_settings(recipe):
    config = recipe.Config()
    study = recipe.study_of(config)
    assert [(cell.num_traces, cell.epochs, cell.batch_traces) for cell in study.cells()[: len(TABLE)]] == [
        (row.traces, row.epochs, row.batch_traces) for row in TABLE
    ]
    assert [model for model, _ in study.models] == list(MODELS) == study.compared
    assert {methods for _, methods in study.models} == {("full",)} and study.arms == ("long",)
    assert (config.lr, config.warmup_ratio, config.row_tokens, config.max_new_tokens) == (
        5e-5,
        0.05,
        16_384,
        16_384,
    )
    assert (config.temperature, config.top_p, config.num_samples) == (0.6, 0.95, 0)
    assert config.benchmarks == "math500,aime24,amc23"
    assert recipe.deviations(config, study) == [
        "the instruction stands below the problem (from Qwen2.5-Math: in the system turn)",
        "AdamW with 8-bit states (paper: AdamW, bf16)",
        "gradients are bf16, also while a step's rows add up (the paper does not say; ours)",
        "whether a trace fits is counted in the model's own tokens (the paper does not say; ours)",
        "a step holds whole rows of packed traces, so batch_traces is its mean (paper: exactly so many)",
    ]
    one = recipe.gemma3_1b_8k.Config()  # what is not in the sweep's settings is the single recipe's
    shared = recipe.shared(config, type(one))
    assert {name: value for name, value in shared.items() if value != getattr(one, name)} == {}


def test_models_that_are_not_the_papers_are_said(recipe):
    config = recipe.Config(models="tiny,Qwen/Qwen2.5-3B-Instruct,m.gguf=qlora")
    listed = recipe.deviations(config, recipe.study_of(config))
    for model in ("tiny", "m.gguf"):
        assert f"model {model}, which by its name is none of the paper's" in listed
    assert listed.count("weights that a GGUF file has rounded (paper: bf16)") == 1
    assert not [line for line in listed if line.startswith("model Qwen")]


def test_a_preset_lists_every_one_of_its_deviations(recipe):
    config = parse(recipe.Config, ["--preset", "rtx24"], smoke=recipe.SMOKE, presets=recipe.PRESETS)
    listed = "\n".join(recipe.deviations(config, recipe.study_of(config)))
    for text in (
        "500, 2,000 traces",
        "without 16,000",
        "num_questions 100 (paper: all)",
        "max_new_tokens 8,192 (paper: 16,384)",
        "num_samples 2 (paper: 8 for AIME24",
        "QLoRA of rank 16 for Qwen2.5-3B-Instruct",
    ):
        assert text in listed


def test_short_traces_go_to_the_arms_that_mix_and_are_refused_if_there_is_none(recipe):
    config = recipe.Config(models="tiny", sizes="8000", arms="long,quarter", short_traces="own.jsonl")
    finetune = recipe.recipes_of(config, {("tiny", "full"): ({}, "")}).finetune
    given = {cell.arm: finetune(cell)["short_traces"] for cell in recipe.study_of(config).cells()}
    assert given == {"long": "", "quarter": "own.jsonl"}
    with pytest.raises(ValueError, match=r"short_traces is own.jsonl but long_share is 1"):
        recipe.main(recipe.Config(models="tiny", short_traces="own.jsonl", plan=True))


def test_a_fixed_batch_adds_its_arm_and_every_arm_exists_here(recipe):
    config = parse(
        recipe.Config, ["--arms", "long,quarter", "--control_sizes", "8000", "--fixed_batch", "16"]
    )
    cells = recipe.study_of(replace(config, models="x")).cells()
    assert [(cell.arm, cell.num_traces, cell.batch_traces) for cell in cells if cell.arm != "long"] == [
        ("quarter", 8_000, 8),
        ("fixed", 8_000, 16),
    ]


def test_the_jobs_are_runs_of_the_other_recipes_with_settings_that_these_know(recipe, tmp_path):
    config = parse(
        recipe.Config,
        [
            "--smoke",
            "--methods",
            "full+qlora",
            "--arms",
            "long,mixed",
            "--control_sizes",
            "24",
            "--rl_flags=--steps 2 --smoke",
        ],
        smoke=recipe.SMOKE,
    )
    cells = recipe.study_of(config).cells()
    chosen = {("tiny", "full"): ({"tile_tokens": 64}, ""), ("tiny", "qlora"): ({}, "it needs 99 GiB")}
    recipes = recipe.recipes_of(config, chosen)
    starts = [Cell.of_base("tiny", 0), Cell.of_base("tiny", 0, "qlora"), cells[1], cells[4]]
    jobs = {
        job.name: job for job in [*jobs_of(cells, recipes, tmp_path), *rl_jobs(starts, recipes, tmp_path)]
    }
    assert list(jobs) == [
        "tiny-full-0-seed0",
        "tiny-full-24-seed0",
        "tiny-full-96-seed0",
        "tiny-full-24-mixed-seed0",
        "tiny-qlora-24-seed0",
        "tiny-qlora-96-seed0",
        "tiny-qlora-24-mixed-seed0",
        "rl tiny-full-0-seed0",
        "rl tiny-qlora-0-seed0",
        "rl tiny-full-96-seed0",
        "rl tiny-qlora-96-seed0",
    ]
    parsed = {}
    for name, job in jobs.items():
        module = importlib.import_module(job.recipe)
        parsed[name] = parse(
            module.Config, job.command(), smoke=module.SMOKE, presets=getattr(module, "PRESETS", None)
        )
    full, adapters, mixed = (
        parsed[f"tiny-{name}-seed0"] for name in ("full-96", "qlora-96", "full-24-mixed")
    )
    assert (full.num_traces, full.epochs, full.batch_traces, full.qlora_rank, full.lr) == (96, 4, 1, 0, 3e-3)
    assert (full.tile_tokens, full.long_share, mixed.long_share, full.shuffle) == (64, 1.0, 0.5, True)
    assert (adapters.qlora_rank, jobs["tiny-qlora-96-seed0"].problem) == (16, "it needs 99 GiB")
    assert full.baseline == adapters.baseline == parsed["tiny-full-0-seed0"].out
    assert jobs["tiny-full-96-seed0"].needs == ("tiny-full-0-seed0",)
    base, tuned = parsed["rl tiny-qlora-0-seed0"], parsed["rl tiny-qlora-96-seed0"]
    assert (base.model, base.qlora_rank) == ("tiny", 16) and jobs["rl tiny-qlora-0-seed0"].needs == ()
    assert (tuned.model, tuned.qlora_rank) == (f"{adapters.out}/model", 0)  # its adapters are trained on
    assert jobs["rl tiny-qlora-96-seed0"].needs == ("tiny-qlora-96-seed0",)
    assert full.verify == config.verify == "llama"
    can_run = [name for name, job in jobs.items() if not job.problem]
    assert {parsed[name].attention for name in can_run} == {"kit"}  # with auto, each would pick for itself
    assert recipes.reinforce(starts[0]).keys().isdisjoint({"prompts", "levels"})  # they follow from the model
    assert (tuned.steps, tuned.eval_tokens, tuned.lr) == (2, 300, 1e-4)  # RL's own rate, not the sweep's
    assert tuned.seed != adapters.seed  # other samples: the lowest of several points is in part bad luck


def test_without_a_gpu_it_says_what_can_be_done_here_and_starts_nothing(recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU") as refused:
        recipe.main(recipe.Config())
    assert "--plan" in str(refused.value) and "--smoke" in str(refused.value)
    with pytest.raises(ValueError, match="rl_sizes is 0,lowest,500 but no model is trained on 500 traces"):
        recipe.main(recipe.Config(rl_sizes="0,lowest,500"))
    with pytest.raises(ValueError, match="rl_sizes is '8k' but must be lowest, most or a whole number"):
        recipe.main(recipe.Config(rl_sizes="8k"))
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
    printed = capsys.readouterr().out
    for text in (
        "tiny, full: ",
        "(simulated); fits 6 GB",
        "tiny-full-220000",
        "3,438",
        "h on one card",
        "Estimates, not timings",
        "row_tokens 256 (paper: 16,384)",
    ):
        assert text in printed
    assert [row["num_traces"] for row in json.loads((tmp_path / "plan.json").read_text())] == [8_000, 220_000]
    assert not (tmp_path / "runs").exists()


def test_reinforcement_learning_from_adapters_is_refused_before_the_first_run(recipe):
    settings = {"models": "tiny=qlora", "sizes": "4", "control_sizes": "", "device": "cpu"}
    with pytest.raises(ValueError, match=r"rl_sizes is 4 and kl_coef .* tiny is trained with adapters"):
        recipe.main(recipe.Config(**settings, rl_sizes="4"))
    study = recipe.study_of(recipe.Config(**settings))
    for allowed in ({"rl_sizes": "0"}, {"rl_sizes": "4", "rl_flags": "--kl_coef 0"}, {}):
        recipe.check_before_hours(recipe.Config(**settings, **allowed), study)


def test_a_tracker_that_is_not_installed_is_refused_before_the_first_run(recipe, monkeypatch):
    monkeypatch.setattr("kit.watch.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--log wandb needs wandb, which is not installed"):
        recipe.main(recipe.Config(models="tiny", sizes="4", device="cpu", log="wandb"))


def test_a_mixture_whose_columns_name_no_short_solution_is_refused(recipe):
    settings = {"models": "tiny", "sizes": "4", "device": "cpu", "arms": "long,mixed"}
    with pytest.raises(ValueError, match="which names no short solution; add solution=COLUMN"):
        recipe.main(recipe.Config(**settings, columns="problem=q,trace=r"))


def test_what_a_finished_sweep_says_to_type_is_taken_until_other_flags_would_be_mixed_in_one_report(
    recipe, tmp_path
):
    def words_after(*typed):
        flags = ["--device", "cpu", *typed, "--out", str(tmp_path / str(len(list(tmp_path.iterdir()))))]
        config = parse(recipe.Config, flags, smoke=recipe.SMOKE)
        RunFolder.open(config).unlock()
        words = recipe.rl_words(config, recipe.study_of(config))
        resumed = resume(config.out, *words)
        recipe.check_before_hours(resumed, recipe.study_of(resumed))
        RunFolder.open(resumed, may_grow=recipe.GROWS, join=True).unlock()
        assert words[:2] == ["--rl_sizes", "0,lowest,most"]
        return words[2:]

    def resume(out, *words):
        config = parse(recipe.Config, ["--resume", "--out", str(out), *words])
        recipe.check_rl_flags(config)
        return config

    assert words_after("--smoke", "--models", "tiny=lora") == ["--rl_flags=--smoke --kl_coef 0"]
    assert words_after("--smoke", "--models", "tiny") == ["--rl_flags=--smoke"]
    assert words_after("--models", "tiny=full+qlora") == ["--rl_flags=--kl_coef 0"]
    own = ("--models", "tiny,tinier=qlora", "--rl_flags=--steps 2 --kl_coef 0.01")
    assert words_after(*own) == ["--rl_flags=--steps 2 --kl_coef 0.01 --kl_coef 0"]
    assert words_after("--models", "tiny=lora", "--rl_flags=--kl_coef 0") == []
    assert words_after("--models", "tiny") == []

    first, cell = tmp_path / "0", "tiny-lora-24-seed0"
    resume(first, "--rl_flags=--smoke --kl_coef 0 --steps 3")
    (first / "rl" / cell).mkdir(parents=True)
    (first / "rl" / cell / "config.json").write_text("{}")
    resume(first, "--rl_flags=--smoke --kl_coef 0 --num_slots 8")
    with pytest.raises(ValueError, match=r"is '--steps 3', which changes batch_prompts.* kl_coef.* steps"):
        resume(first, "--rl_flags=--steps 3")
    # a process that helps others starts some of the runs
    RunFolder.open(resume(first), join=True)
    share(first)
    with pytest.raises(ValueError, match=r"rl_flags was .*--kl_coef 0', is .*--num_slots 8'; wait"):
        RunFolder.open(resume(first, "--rl_flags=--smoke --kl_coef 0 --num_slots 8"), join=True)
    release(first)


def test_reinforcement_learning_starts_from_the_cells_models_without_the_noise_of_its_smoke(recipe, tmp_path):
    config = parse(recipe.Config, ["--smoke", "--rl_flags=--smoke"], smoke=recipe.SMOKE)
    recipes = recipe.recipes_of(config, {})
    (job,) = rl_jobs([Cell.of_base("tiny", 0)], recipes, tmp_path)
    grpo = importlib.import_module(job.recipe)
    assert grpo.SMOKE["weaken"] and parse(grpo.Config, job.command(), smoke=grpo.SMOKE).weaken == 0
