"""Run the recipes as a person does: real processes, the shipped model and traces, no network."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from children import call, run_recipe, wait

from kit import paper as stated
from kit.config import as_flags, parse
from kit.data.toy import TEMPLATE
from kit.machine import GIB

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ["gemma3_1b_8k", "qwen2_5_0_5b_8k", "llama3_2_1b_8k"]


def flags_of(settings: dict) -> list[str]:
    return as_flags(settings).split()


QUICK_SETTINGS = {"num_traces": 24, "epochs": 1, "num_questions": 4, "max_new_tokens": 64}
QUICK = ["--smoke", *flags_of(QUICK_SETTINGS)]
RL_SETTINGS = {"steps": 2, "batch_prompts": 4, "group_size": 4, "minibatch_prompts": 2, "num_questions": 4}
RL = ["--smoke", *flags_of(RL_SETTINGS)]


def write_template(folder: Path) -> str:
    """Write the toy's chat template with a remark, and return its path."""
    (folder / "own.jinja").write_text(TEMPLATE + "{# of this run #}")
    return str(folder / "own.jinja")


@pytest.mark.slow
def test_smoke_measures_trains_measures_again_and_reports(tmp_path):
    script = str(ROOT / "recipes" / "gemma3_1b_8k.py")
    flags = [*QUICK, "--chat_template", write_template(tmp_path)]
    command = [sys.executable, script, *flags]  # as from a shell, with nothing imported yet
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "gemma3_1b_8k" / "001"
    for line in (
        "traces kept",
        "optimizer steps of",
        "before      toy:",
        "after       toy:",
        "toy: accuracy ",
    ):
        assert line in done.stdout
    assert "report file://" in done.stdout
    data = {"config.json", "drop_counts.json", "metrics.jsonl", "before", "after", "model"}
    report = {"report.html", "loss.png", "accuracy.png"}
    assert {path.name for path in run.iterdir()} >= data | report
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert (run / "model" / "chat_template.jinja").read_text() == (tmp_path / "own.jinja").read_text()
    before, after = ((run / stage / "toy.jsonl").read_text().splitlines()[0] for stage in ("before", "after"))
    models = [json.loads(line)["header"]["model"] for line in (before, after)]
    assert models[0] != models[1]  # the second one was trained

    again = run_recipe("gemma3_1b_8k", *flags, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr

    def measured(run):
        return [line for line in run.stdout.splitlines() if line.startswith(("before", "after"))]

    assert measured(again) == measured(done)
    other = run_recipe("gemma3_1b_8k", *flags, "--resume", "--lr", "0.5", cwd=tmp_path)
    assert "lr was 0.003, is 0.5" in other.stderr


@pytest.mark.parametrize("recipe", TRAINING)
def test_without_a_gpu_a_recipe_says_what_it_needs_and_both_ways_out(recipe, tmp_path):
    done = run_recipe(recipe, cwd=tmp_path)
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stderr
    assert f"recipes/{recipe}.py --smoke" in done.stderr
    assert f"recipes/{recipe}.py --device cpu" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_whose_settings_were_chosen_for_a_card_is_resumed_as_it_was(tmp_path):
    small = flags_of({"gpu_gb": "0.6178", "desktop_gb": 0, "max_steps": 3})
    first = run_recipe("gemma3_1b_8k", *QUICK, *small, "--faster", cwd=tmp_path)
    assert first.returncode == 0 and "--update_in_backward" in first.stdout, first.stderr
    again = run_recipe("gemma3_1b_8k", "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    other = run_recipe("gemma3_1b_8k", "--resume", "--desktop_gb", "1", "--gpu_gb", "8", cwd=tmp_path)
    assert other.returncode == 2 and "gpu_gb was '0.6178', is '8'" in other.stderr


def test_the_other_models_recipes_differ_from_the_first_in_a_handful_of_lines():
    lines = [(ROOT / "recipes" / f"{recipe}.py").read_text().splitlines() for recipe in TRAINING[1:]]
    assert max(map(len, lines)) <= 30
    assert sum(a != b for a, b in zip(*lines, strict=True)) <= 6


def test_the_default_is_the_papers_setting(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import gemma3_1b_8k

    config = gemma3_1b_8k.Config()
    assert (config.num_traces, config.epochs, config.batch_traces, config.row_tokens) == (8_000, 4, 8, 16_384)
    assert (config.lr, config.warmup_ratio, config.temperature, config.top_p) == (5e-5, 0.05, 0.6, 0.95)
    assert (config.max_new_tokens, config.num_samples) == (16_384, 0)
    assert config.benchmarks == "math500,aime24,amc23"


@pytest.mark.slow
def test_a_trace_longer_than_the_models_context_is_refused_and_a_row_of_several_is_not(tmp_path):
    rows = [{"problem": "7+5?", "trace": "7+5=12." * n + "\\boxed{12}", "answer": "12"} for n in (1, 160)]
    rows[0]["problem"] = "5+7?"
    for name, kept in (("short", rows[:1]), ("long", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    flags = ["--smoke", "--row_tokens", "2048", "--num_questions", "2", "--max_new_tokens", "8", "--traces"]
    done = run_recipe("llama3_2_1b_8k", *flags, "long.jsonl", cwd=tmp_path)
    assert "row_tokens is 2048 and the longest trace has 1132 tokens, but tiny was made" in done.stderr
    assert "pass --row_tokens 1024" in done.stderr
    done = run_recipe("llama3_2_1b_8k", *flags, "short.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_tiny_base_recipe_writes_what_ships_and_the_same_bytes_every_time(tmp_path):
    written = []
    for number in ("001", "002"):
        done = run_recipe("train_tiny_base", "--smoke", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "runs/train_tiny_base" / number / "tiny"
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    first, second = written
    assert first == second
    assert set(first) == {path.name for path in (ROOT / "kit" / "models" / "shipped" / "tiny").iterdir()}


def bench(name, *flags):
    sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "recipes" / "bench")]
    module = importlib.import_module(name)
    if name == "loss":
        module.LOSSES = {loss: module.LOSSES[loss] for loss in TIMED_ALONE}
    module.main(parse(module.Config, flags, smoke=module.SMOKE))


TIMED_ALONE = ["the three matmuls alone", "ours"]  # each in a process of its own


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packing", "loss", "finetune"])
def test_a_bench_runs_and_writes_a_row_for_ours_and_for_each_peer_that_is_here(name, tmp_path):
    done = call(__file__, "bench", name, "--smoke", "--json", str(tmp_path / "figures.json"))
    wait(done)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert "nothing here was timed on a GPU" in figures["machine"]["gpu"]
    names = [row["name"] for row in figures["rows"]]
    if name == "loss":
        assert names == TIMED_ALONE
    else:
        ours = [row for row in names if row.startswith("ours")]
        assert ours and (len(names) == len(ours) + 1 or "TRL is not installed" in done.stdout)
    if name == "finetune":
        assert figures["rows"][0]["steps"] > 1


@pytest.mark.slow
def test_the_others_that_the_bench_of_the_loss_times_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "bench"))
    import loss

    ran = [loss.measure(name, loss.Config(**loss.SMOKE)) for name in loss.LOSSES if name not in TIMED_ALONE]
    assert len(ran) == 3 and all(row["seconds"] > 0 for row in ran)


def test_the_plan_needs_no_gpu_and_no_download_and_says_what_fits(tmp_path):
    flags = ["--plan", *flags_of({"model": "tiny", "row_tokens": 256, "json": "plan.json"})]
    done = run_recipe("gemma3_1b_8k", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "(simulated)" in done.stdout and "fits 6 GB: yes" in done.stdout
    assert "several rows per step" in done.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["simulated"] is True and plan["fits_gb"] == [6, 8, 12, 16, 24]
    assert sum(plan["owners"].values()) >= plan["peak"] > 0
    assert not (tmp_path / "runs").exists()


def test_a_card_too_small_for_a_model_is_told_before_any_download(tmp_path):
    done = run_recipe(
        "gemma3_1b_8k", "--gpu_gb", "0.5", "--model", "tiny", "--row_tokens", "256", cwd=tmp_path
    )
    assert done.returncode == 2
    assert (
        "gpu_gb is 0.5 and desktop_gb 0.7 but sampling from tiny, 1 answer of up to" in done.stderr
        and "largest owners are" in done.stderr
    )


@pytest.mark.slow
def test_the_memory_table_simulates_every_row_and_prints_it_as_the_readme_has_it(tmp_path):
    done = run_recipe("bench/memory_table", "--smoke", "--json", "table.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = {row["row"]: row["total"] / GIB for row in json.loads((tmp_path / "table.json").read_text())}
    assert len(figures) == 7 and figures["full, states on CPU"] < figures["full"]
    lines = done.stdout.splitlines()[-9:]
    assert lines[:2] == ["| | tiny |", "|---|---:|"]
    assert lines[2:] == [f"| {name} | {total:.2f} |" for name, total in figures.items()]


def test_what_update_in_backward_excludes_is_refused_before_anything_else_is_done(tmp_path):
    done = run_recipe("gemma3_1b_8k", "--smoke", "--update_in_backward", cwd=tmp_path)
    assert "max_grad_norm is 1 but update_in_backward" in done.stderr and "--max_grad_norm 0" in done.stderr
    done = run_recipe("gemma3_1b_8k", "--smoke", "--update_in_backward", "--max_grad_norm", "0", cwd=tmp_path)
    assert "batch_traces is 8 but update_in_backward" in done.stderr and "--batch_traces 1" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--verify", "yes"], "'yes' but must be math, llama or none (keep traces that Math-Verify accepts"),
        (["--no_verify"], "there is no --no_verify; did you mean --verify?"),
    ],
)
def test_another_word_for_who_accepts_a_trace_is_refused_before_anything_else_is_done(
    flags, message, tmp_path
):
    done = run_recipe("gemma3_1b_8k", "--smoke", *flags, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_rl_measures_samples_updates_measures_again_and_reports(tmp_path):
    flags = [*RL, "--chat_template", write_template(tmp_path)]
    done = run_recipe("grpo_qwen2_5_0_5b", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "grpo_qwen2_5_0_5b" / "001"
    assert (run / "model" / "chat_template.jinja").read_text() == (tmp_path / "own.jinja").read_text()
    for line in (
        "prompts with gold answers",
        "2 steps of 4 prompts x 4 answers, 2 updates each",
        "batch_prompts 4 (paper: ",
        "before      toy:",
        "step 2 of 2: reward",
        "after       toy:",
        "report file://",
    ):
        assert line in done.stdout
    files = {"config.json", "metrics.jsonl", "rollouts.jsonl", "model", "report.html"}
    assert {path.name for path in run.iterdir()} >= files
    again = run_recipe("grpo_qwen2_5_0_5b", *flags, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "step 1 of 2" not in again.stdout


def test_rl_without_a_gpu_says_both_ways_out_and_its_default_is_the_papers(tmp_path, monkeypatch):
    done = run_recipe("grpo_qwen2_5_0_5b", cwd=tmp_path)
    assert done.returncode == 2 and "needs an NVIDIA GPU" in done.stderr and "--device cpu" in done.stderr
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import grpo_qwen2_5_0_5b as recipe

    paper = recipe.Config()
    assert (paper.batch_prompts, paper.group_size, paper.minibatch_prompts) == (1_024, 8, 256)
    assert (paper.max_new_tokens, paper.temperature) == (8_192, 1.0)
    assert (paper.kl_coef, paper.lr, paper.advantage_scale) == (1e-4, 5e-7, "group-std")
    assert (paper.normaliser, paper.clip_low, paper.clip_high) == ("tokens", 0.2, 0.2)  # verl's
    assert (paper.dual_clip, paper.weight_decay, paper.undecided_is_wrong) == (3.0, 0.01, True)
    small = parse(
        recipe.Config, ["--preset", "rtx8", "--lr", "2e-6"], smoke=recipe.SMOKE, presets=recipe.PRESETS
    )
    assert (small.batch_prompts, small.lr) == (32, 2e-6)
    assert "lr 2e-06 (paper: 5e-07)" in stated.deviations(small)
    for name in recipe.PRESETS:  # a prompt of the data and its answer fit a row
        config = parse(recipe.Config, ["--preset", name], presets=recipe.PRESETS)
        assert config.max_new_tokens + 1_024 <= config.row_tokens and config.preset == name
    with pytest.raises(ValueError, match="did you mean rtx8"):
        parse(recipe.Config, ["--preset", "rtx9"], presets=recipe.PRESETS)


def test_the_plan_of_rl_needs_no_gpu_and_no_download(tmp_path):
    flags = [
        "--plan",
        "--model",
        "tiny",
        "--row_tokens",
        "256",
        "--max_new_tokens",
        "64",
        "--json",
        "plan.json",
    ]
    done = run_recipe("grpo_qwen2_5_0_5b", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits_gb"] == [6, 8, 12, 16, 24] and "answers of up to 64 tokens at once" in done.stdout


@pytest.mark.slow
def test_the_rl_bench_runs_both_in_turns_and_shows_the_fastest_beside_what_libraries_take(tmp_path):
    done = run_recipe("bench/grpo", "--smoke", "--repeats", "2", "--json", "figures.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    rows = found["rows"]
    assert rows[0]["name"] == "ours" and (len(rows) == 2 or "TRL is not installed" in done.stdout)
    for row in rows:
        assert len(row["all_seconds"]) == 2 and row["seconds"] == min(row["all_seconds"])
        assert not row["peak_gib"] <= found["libraries_gib"]  # nor where the system says neither
    turns = [line.split(":")[0].strip() for line in done.stdout.splitlines() if line.startswith("  turn ")]
    assert turns == ["turn 1"] * len(rows) + ["turn 2"] * len(rows)


def test_the_rl_bench_refuses_to_run_nothing(tmp_path):
    done = run_recipe("bench/grpo", "--repeats", "0", cwd=tmp_path)
    assert done.returncode != 0 and "repeats is 0 but must be >= 1" in done.stderr


def test_a_torch_without_a_loss_of_its_own_is_named_and_the_bench_of_the_loss_goes_on(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "bench"))
    import loss

    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    for name, function in loss.LOSSES.items():
        if "F.linear_cross_entropy" in name:
            with pytest.raises(NotImplementedError, match=r"has no F\.linear_cross_entropy; 2\.13 has"):
                function(hidden, weight, targets)
        else:
            function(hidden, weight, targets)
