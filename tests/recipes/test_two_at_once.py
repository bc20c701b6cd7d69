"""A run that is going is left alone by a second one and by whoever looks at it, as a person starts them."""

import json
import subprocess
import sys
import time

import pytest
from children import ROOT, run_recipe, start_recipe

EVALUATION = ["--smoke", "--num_questions=100", "--num_samples=30", "--num_slots=4", "--out=run"]
TRAINING = [
    "--smoke",
    "--num_questions=1",
    "--num_samples=1",
    "--max_new_tokens=8",
    "--epochs=50",
    "--out=run",
]


def rows_in(log):
    """Return the whole rows of a log."""
    return [json.loads(line) for line in log.read_bytes().split(b"\n")[:-1]] if log.exists() else []


def wait_for(child, log, count):
    while child.poll() is None and len(rows_in(log)) < count:
        time.sleep(0.01)
    assert child.poll() is None, f"it ended too soon to test anything: {child.stderr}"


def command(*words, cwd):
    """Run a module of the kit."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    options = {"cwd": cwd, "env": environment, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, "-m", *words], check=False, **options)


def refused_by(child, done):
    """Return whether a process was refused in one line that names the run that is going."""
    name = f"is in use by process {child._process.pid} on "
    return done.returncode == 2 and done.stderr.startswith("error: ") and name in done.stderr


@pytest.mark.slow
def test_a_second_evaluation_is_refused_and_looking_at_the_first_takes_nothing_from_it(tmp_path):
    log = tmp_path / "run" / "samples" / "toy.jsonl"
    first = start_recipe("evaluate", *EVALUATION, cwd=tmp_path)
    wait_for(first, log, 20)
    before = rows_in(log)
    assert refused_by(first, run_recipe("evaluate", "--resume", "--out=run", cwd=tmp_path))
    assert refused_by(first, command("kit.grade", "regrade", str(log), "--in_place", cwd=tmp_path))
    for words in (("kit.report", "run"), ("kit.grade", "regrade", str(log))):
        done = command(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    wait_for(first, log, len(before) + 1)
    first.kill()

    killed = rows_in(log)
    assert killed[: len(before)] == before
    again = start_recipe("evaluate", "--resume", "--out=run", cwd=tmp_path)
    wait_for(again, log, len(killed) + 20)
    again.kill()
    header, *samples = rows_in(log)
    assert "header" in header and samples[: len(killed) - 1] == killed[1:]
    assert len({(row["question"], row["sample"]) for row in samples}) == len(samples)


@pytest.mark.slow
def test_a_second_training_is_refused_and_the_steps_of_the_first_stay(tmp_path):
    log = tmp_path / "run" / "metrics.jsonl"
    first = start_recipe("gemma3_1b_8k", *TRAINING, "--out=run", cwd=tmp_path)
    wait_for(first, log, 2)
    assert refused_by(first, run_recipe("gemma3_1b_8k", "--resume", "--out=run", cwd=tmp_path))
    wait_for(first, log, 4)
    first.kill()
    steps = [row["step"] for row in rows_in(log)]
    assert steps == list(range(1, len(steps) + 1))
