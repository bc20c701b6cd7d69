"""recipes/evaluate.py and recipes/bench/sampler.py as a person runs them: processes, no network."""

import html
import json

import pytest
import torch
from children import run_recipe
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from kit import models
from kit.evaluate.results import read_result
from kit.models import folder, qlora
from kit.models.nf4 import quantise_decoder
from kit.models.shipped import TINY

QUICK = ["--smoke", "--num_questions", "6", "--max_new_tokens", "64"]


def samples(run):
    rows = read_result(run / "samples" / "toy.jsonl").rows
    return {(row["question"], row["sample"]): row["text"] for row in rows}


@pytest.mark.slow
def test_smoke_measures_tables_and_reports_and_a_resume_repeats_it(tmp_path):
    done = run_recipe("evaluate", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "evaluate" / "001"
    written = {"config.json", "results.json", "report.html", "caps.png", "length.png"}
    assert {path.name for path in run.iterdir()} >= written
    (figures,) = json.loads((run / "results.json").read_text())
    found = read_result(run / "samples" / "toy.jsonl")
    assert figures == json.loads(json.dumps(found.summary()))
    assert (len(found.rows), figures["num_questions"]) == (12, 6)
    header, line = (text.split() for text in done.stdout.splitlines()[-5:-3])
    assert header[:2] == ["benchmark", "accuracy"] and line[0] == "toy"
    assert line[1] == f"{100 * found.accuracy:.1f}"

    lines = (run / "samples" / "toy.jsonl").read_text().splitlines(keepends=True)
    # a kill in the middle of a line
    (run / "samples" / "toy.jsonl").write_text("".join(lines[:5]) + lines[5][:40])
    again = run_recipe("evaluate", *QUICK, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert {(row["question"], row["sample"]): row["text"] for row in found.rows} == samples(run)
    assert again.stdout.splitlines()[-4:] == done.stdout.splitlines()[-4:]


@pytest.mark.slow
def test_two_runs_are_compared_and_others_only_when_forced(tmp_path):
    for out, flags in (("a", []), ("b", ["--seed", "1"])):
        done = run_recipe("evaluate", *QUICK, "--out", out, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    same = run_recipe("evaluate", "--compare", "a, a", cwd=tmp_path)
    assert "toy: difference +0.0 points ± 34.6 (95 %, paired over 6 questions)" in same.stdout
    refused = run_recipe("evaluate", "--compare", "a,b", cwd=tmp_path)
    assert refused.returncode == 2
    assert "seed 0 and 1" in refused.stderr and "--force" in refused.stderr
    assert run_recipe("evaluate", "--compare", "a,b", "--force", cwd=tmp_path).returncode == 0
    assert "takes two run folders" in run_recipe("evaluate", "--compare", "a", cwd=tmp_path).stderr
    assert "c holds no run (no config" in run_recipe("evaluate", "--compare", "a,c", cwd=tmp_path).stderr
    (tmp_path / "tuned" / "after").mkdir(parents=True)
    assert "tuned is a fine-tuning run" in run_recipe("evaluate", "--compare", "a,tuned", cwd=tmp_path).stderr


def test_the_steps_of_arithmetic_answers_are_printed_reported_and_compared(tmp_path):
    flags = ["--smoke", "--benchmarks", "arithmetic", "--num_questions", "4", "--max_new_tokens", "64"]
    done = run_recipe("evaluate", *flags, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("arithmetic: "))
    assert "answers perform " in line and "p^n is" in line and "a residual of" in line
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Arithmetic, step by step" in page and line in html.unescape(page)
    compared = run_recipe("evaluate", "--compare", "run,run", cwd=tmp_path).stdout
    assert line.replace("arithmetic:", "arithmetic before:") in compared
    assert line.replace("arithmetic:", "arithmetic after:") in compared


def test_a_folder_of_adapters_is_evaluated_with_its_base_and_differs_from_it(tmp_path):
    model, tokenizer = models.load("tiny", device="cpu", attention="kit")
    quantise_decoder(model, torch.device("cpu"))
    qlora.add_adapters(model, base="tiny")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    folder.save_model(tmp_path / "adapters", model, tokenizer)
    assert (tmp_path / "adapters" / "adapter_config.json").is_file()
    done = run_recipe("evaluate", *QUICK, "--model", "./adapters", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = read_result(tmp_path / "run" / "samples" / "toy.jsonl")
    assert found.accuracy < 0.5  # the shipped model alone is nearly always right


def test_a_folder_of_pefts_adapters_is_evaluated_with_its_base_and_differs_from_it(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(TINY)
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    )
    ids = torch.arange(6, 60)[None]
    for _ in range(3):  # up the loss: it unlearns
        (-adapted(input_ids=ids, labels=ids).loss).backward()
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data -= 10 * parameter.grad
                parameter.grad = None
    adapted.save_pretrained(tmp_path / "adapters")
    done = run_recipe("evaluate", *QUICK, "--model", "./adapters", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = read_result(tmp_path / "run" / "samples" / "toy.jsonl")
    assert found.accuracy < 0.5  # the shipped model alone is nearly always right


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "recipes/evaluate.py --smoke"),
        (["--smoke", "--max_new_tokens", "5000"], "made for 1024 in all"),
    ],
)
def test_what_cannot_run_says_what_to_do(flags, message, tmp_path):
    done = run_recipe("evaluate", *flags, cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.slow
def test_the_samplers_bench_checks_every_engines_answers(tmp_path):
    done = run_recipe("bench/sampler", "--smoke", "--json", "figures.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["name"] for row in figures["rows"]] == ["ours", "generate_batch", "generate"]
    assert [row["answers_as_expected"] for row in figures["rows"]] == [8, 8, 8]
    assert "ours against generate_batch: " in done.stdout
    refused = run_recipe("bench/sampler", "--smoke", "--engines", "fast", cwd=tmp_path)
    assert "engines is 'fast' but must be ours, generate_batch or generate" in refused.stderr
