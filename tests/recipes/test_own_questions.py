"""Your own questions in every recipe that measures, as a person runs them: processes, no network."""

import json

import pytest
from children import run_recipe

from kit.data.toy import make_rows
from kit.evaluate.results import read_result

NAME, QUESTIONS, SAMPLES = "my-quiz", 3, 4  # samples: the default of your own questions


@pytest.fixture
def benchmarks(tmp_path):
    """Return the flags that evaluate three problems of the toy, in tmp_path/q.jsonl, as your own."""
    write(tmp_path / "q.jsonl", make_rows("short", QUESTIONS, seed=77, min_operands=4))
    return [f"--benchmarks={NAME}=q.jsonl", "--num_samples=0"]


def write(path, rows):
    lines = [json.dumps({"question": row["problem"], "answer": int(row["answer"])}) for row in rows]
    path.write_text("\n".join(lines) + "\n")


def run(recipe, *flags, cwd):
    done = run_recipe(recipe, "--smoke", *flags, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_evaluate_reports_compares_and_resumes_them_and_refuses_a_file_that_has_changed(tmp_path, benchmarks):
    told = run("evaluate", *benchmarks, "--out=run", cwd=tmp_path)
    assert f"{NAME} {QUESTIONS} x {SAMPLES} samples" in told
    samples = tmp_path / "run" / "samples" / f"{NAME}.jsonl"
    found = read_result(samples)
    assert (found.benchmark, len(found.rows)) == (NAME, QUESTIONS * SAMPLES)
    assert NAME in (tmp_path / "run" / "report.html").read_text()
    compared = run_recipe("evaluate", "--compare=run,run", cwd=tmp_path)
    assert f"{NAME}: difference +0.0 points" in compared.stdout

    lines = samples.read_text().splitlines(keepends=True)
    samples.write_text("".join(lines[:-2]))
    run("evaluate", *benchmarks, "--out=run", "--resume", cwd=tmp_path)
    texts = [
        {(row["question"], row["sample"]): row["text"] for row in of.rows}
        for of in (found, read_result(samples))
    ]
    assert texts[0] == texts[1]
    write(tmp_path / "q.jsonl", make_rows("short", QUESTIONS, seed=78, min_operands=4))
    refused = run_recipe("evaluate", "--smoke", *benchmarks, "--out=run", "--resume", cwd=tmp_path)
    assert refused.returncode and "in q.jsonl are no longer those of the samples" in refused.stderr


@pytest.mark.slow
def test_finetuning_measures_them_before_and_after(tmp_path, benchmarks):
    run("gemma3_1b_8k", *benchmarks, "--num_traces=8", "--max_steps=1", "--out=run", cwd=tmp_path)
    for stage in ("before", "after"):
        assert len(read_result(tmp_path / "run" / stage / f"{NAME}.jsonl").rows) == QUESTIONS * SAMPLES
    assert NAME in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_reinforcement_learning_measures_them_before_and_after(tmp_path, benchmarks):
    small = ("--steps=1", "--batch_prompts=2", "--minibatch_prompts=2", "--out=run")
    run("grpo_qwen2_5_0_5b", *benchmarks, *small, cwd=tmp_path)
    for stage in ("before", "after"):
        assert len(read_result(tmp_path / "run" / stage / f"{NAME}.jsonl").rows) == QUESTIONS * SAMPLES
    assert NAME in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_a_sweep_plans_and_measures_them_in_every_cell(tmp_path, benchmarks):
    sizes = ("--sizes=8", "--max_steps=1", "--out=run")
    planned = run("valley_sweep", *benchmarks, *sizes, "--plan", cwd=tmp_path)
    assert f"{QUESTIONS * SAMPLES} responses of" in planned
    run("valley_sweep", *benchmarks, *sizes, cwd=tmp_path)
    cell = tmp_path / "run" / "cells" / "tiny-full-8-seed0" / "after" / f"{NAME}.jsonl"
    assert len(read_result(cell).rows) == QUESTIONS * SAMPLES


@pytest.mark.parametrize("recipe", ["evaluate", "gemma3_1b_8k", "grpo_qwen2_5_0_5b", "valley_sweep"])
def test_a_mistake_in_them_ends_every_recipe_before_it_makes_a_folder(tmp_path, benchmarks, recipe):
    (tmp_path / "q.jsonl").write_text('{"problem": "1+1?"}\n')
    done = run_recipe(recipe, "--smoke", *benchmarks, cwd=tmp_path)
    assert done.returncode and "q.jsonl:1: no field answer" in done.stderr
    assert not (tmp_path / "runs").exists()
