"""Recipes under torchrun, as a person starts them: killed or stopped, and resumed with another number."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from children import ROOT, run_recipe

from kit.evaluate.results import read_results
from kit.journal import Journal

FLAGS = ["--smoke", "--num_questions", "3", "--out", "run"]
TUNING = [*FLAGS, "--num_traces", "24", "--epochs", "2", "--max_new_tokens", "64", "--checkpoint_every", "1"]
TUNING += ["--eval_every", "2", "--eval_questions", "3"]
RL = [*FLAGS, "--steps", "5", "--batch_prompts", "3", "--group_size", "4", "--minibatch_prompts", "2"]


class Torchrun:
    """A recipe in two processes or more."""

    def __init__(self, recipe: str, *flags: str, cwd: Path, ranks: int):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        own = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.files = [(cwd / name).open("w+") for name in ("stdout", "stderr")]
        streams = dict(zip(("stdout", "stderr"), self.files, strict=True))
        script = str(ROOT / "recipes" / f"{recipe}.py")
        self.process = subprocess.Popen([*command, script, *flags], cwd=cwd, env=os.environ | own, **streams)
        self.metrics = Journal(cwd / "run" / "metrics.jsonl")

    def wait_for_steps(self, number: int) -> None:
        while self.process.poll() is None and len(self.metrics.read()) < number:
            time.sleep(0.01)

    def kill_rank_1(self) -> None:
        own = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (second,) = (pid for pid in own if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
        os.kill(int(second), signal.SIGKILL)

    def end(self) -> tuple[int, str, str]:
        """Return the exit status, and what was printed."""
        status = self.process.wait()
        for file in self.files:
            file.seek(0)
        printed = [file.read() for file in self.files]
        for file in self.files:
            file.close()
        return status, *printed


@pytest.fixture
def torchrun():
    """Start a recipe under torchrun; it is ended with the test."""
    started = []
    yield lambda *words, cwd, ranks: started.append(Torchrun(*words, cwd=cwd, ranks=ranks)) or started[-1]
    for run in started:
        if run.process.poll() is None:
            run.process.terminate()  # it ends its workers
            run.process.wait()


def steps_of(run: Path) -> list[int]:
    return [row["step"] for row in Journal(run / "metrics.jsonl").read()]


@pytest.mark.slow
def test_fine_tuning_killed_on_two_ranks_goes_on_to_its_report_on_three(torchrun, tmp_path):
    run = tmp_path / "run"
    two = torchrun("gemma3_1b_8k", *TUNING, cwd=tmp_path, ranks=2)
    two.wait_for_steps(3)
    two.kill_rank_1()
    status, printed, _ = two.end()
    assert status == 1
    assert printed.count("run folder run") == 1  # rank 0's
    assert "ranks       2" in printed
    assert len(json.loads((run / "machine.json").read_text())["ranks"]) == 2
    assert not (run / "model").exists()
    before = read_results(run / "before")["toy"]

    three = torchrun("gemma3_1b_8k", *TUNING, "--resume", cwd=tmp_path, ranks=3)
    status, printed, errors = three.end()
    assert status == 0, errors
    assert printed.count("training    goes on after step") == printed.count("report file://") == 1
    steps = steps_of(run)
    assert steps == list(range(1, len(steps) + 1))
    measured = [row["step"] for row in Journal(run / "during.jsonl").read()]
    assert measured == [step for step in range(len(steps) + 1) if step % 2 == 0]
    after = read_results(run / "after")["toy"]
    assert read_results(run / "before")["toy"] == before
    assert before.num_samples == after.num_samples == 2
    assert [line for line in printed.splitlines() if line.startswith(("before", "after"))] == [
        f"before      {before}",
        f"after       {after}",
    ]


@pytest.mark.slow
def test_grpo_stopped_by_ctrl_c_on_two_ranks_keeps_its_step_and_goes_on_in_one_process(torchrun, tmp_path):
    run = tmp_path / "run"
    two = torchrun("grpo_qwen2_5_0_5b", *RL, cwd=tmp_path, ranks=2)
    two.wait_for_steps(1)
    two.process.send_signal(signal.SIGINT)  # which torchrun passes on
    _, _, errors = two.end()
    stopped = [line for line in errors.splitlines() if line.startswith("stopped ")]
    assert len(stopped) == 1, errors
    done = steps_of(run)
    assert f"checkpoint {done[-1]} kept. Go on with: torchrun --nproc_per_node 2" in stopped[0]
    assert stopped[0].endswith(" --resume --out run")
    assert (run / "checkpoints" / f"step_{done[-1]:07d}").is_dir()

    one = run_recipe("grpo_qwen2_5_0_5b", *RL, "--resume", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    assert steps_of(run) == [1, 2, 3, 4, 5]
    rollouts = Journal(run / "rollouts.jsonl").read()
    assert [row["step"] for row in rollouts] == [step for step in range(1, 6) for _ in range(4)]
    assert read_results(run / "after")["toy"].num_samples == 2
