import json
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import CtrlC, call, start_ranks, train_unbroken_and_killed, wait
from test_train_loop import Config

from kit import ranks
from kit.command import Stopped
from kit.data.chat import ChatFormat
from kit.data.problems import Question, draw
from kit.data.toy import make_rows
from kit.models import load
from kit.models.families import family_of
from kit.models.layers import norm_of
from kit.report.rl import write_report
from kit.rl.grpo import Policy, rollout, update
from kit.rl.loop import train
from kit.rl.settings import Settings
from kit.run import RunFolder
from kit.train import checkpoint
from kit.train.savings import Savings

QUESTIONS = [
    Question(f"q{i}", row["problem"], row["answer"])
    for i, row in enumerate(make_rows("short", 7, seed=3, max_operands=4))
]
SIZES = {"group_size": 3, "max_new_tokens": 30, "row_tokens": 128, "minibatch_prompts": 2, "num_slots": 5}
SETTINGS = Settings(**SIZES, temperature=2.0, kl_coef=0.05)
STEPS = 8


def make_policy(settings=SETTINGS, **options):
    model, tokenizer = load("tiny", device="cpu")
    options = {"lr": 3e-4, "savings": Savings(recompute=False)} | options
    return Policy(model, ChatFormat(tokenizer, instruction=""), settings, **options)


def run_training(out, *, resume=False, steps=STEPS, settings=SETTINGS, questions=QUESTIONS, **options):
    run = RunFolder.open(Config(str(out), resume))
    return train(
        make_policy(settings, **options), questions, run, steps=steps, batch_prompts=3, checkpoint_every=3
    )


def start(out, resume):
    return call(__file__, "run_training", out, resume=resume)


def test_killed_by_sigkill_and_resumed_it_ends_bit_equal_to_an_unbroken_run(tmp_path):
    train_unbroken_and_killed(start, tmp_path, lines=5, newest_checkpoint="step_0000003")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]
    files = [
        [(tmp_path / n / name).read_text().splitlines() for name in ("metrics.jsonl", "rollouts.jsonl")]
        for n in ("whole", "broken")
    ]
    assert files[0][1] == files[1][1]  # every sample that was written
    rows = [[untimed(json.loads(line)) for line in run[0]] for run in files]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == list(range(1, STEPS + 1))
    assert sum(row["updates"] for row in rows[0]) >= STEPS / 2


def test_running_out_of_memory_is_reported_with_the_checkpoint_to_continue_from(tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"

    def run_out(question, completions):
        # in the fifth step, after the checkpoint
        if metrics.exists() and len(metrics.read_text().splitlines()) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return [len(completion.ids) % 2 for completion in completions]

    with pytest.raises(
        ValueError,
        match=r"step 5 ran out of memory: no plan was made\. "
        r"Pass --resume with a smaller --num_slots; .*checkpoint is .*step_0000003$",
    ) as error:
        run_training(tmp_path / "run", reward=run_out)
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)


class CtrlCWhileDrawn(list):
    """Questions; while the first prompt of the second step is drawn, Ctrl-C comes."""

    def __init__(self, questions):
        super().__init__(questions)
        self.interrupt = CtrlC(at=4)

    def __getitem__(self, i):
        self.interrupt()
        return super().__getitem__(i)


def stop_the_last_rank(out):
    here = ranks.join("cpu")
    is_last = here.rank == here.count - 1
    with pytest.raises(Stopped) as stopped:
        run_training(out, questions=CtrlCWhileDrawn(QUESTIONS) if is_last else QUESTIONS)
    print(stopped.value)
    ranks.leave()


@pytest.mark.parametrize("count", [1, 2])
def test_ctrl_c_between_an_update_and_the_next_rollout_keeps_the_step_and_stops_all_ranks(count, tmp_path):
    for child in start_ranks(count, __file__, "stop_the_last_rank", str(tmp_path)):
        wait(child)
        assert child.stdout.endswith("in the rollout of step 2 of 8, checkpoint 1 kept\n")
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step_0000001"


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_after_the_last_step_leaves_the_finished_policy(tmp_path, monkeypatch):
    close = Policy.close
    monkeypatch.setattr(Policy, "close", lambda policy: os.kill(os.getpid(), signal.SIGINT) or close(policy))
    with pytest.raises(Stopped, match="after the last step, with the model saved"):
        run_training(tmp_path, steps=1)
    assert (tmp_path / "model").is_dir()


MOMENTS = {  # of the second checkpoint, after 6 steps -> steps of the newest one after the kill
    "before the checkpoint": 3,
    "before its rename": 3,
    "before the older one is deleted": 6,
    "after the checkpoint": 6,
}


def run_until_killed(out, moment):
    """Train until the process kills itself, at a moment between a line of metrics and its checkpoint."""
    save, publish, calls = checkpoint.save, checkpoint.publish, []

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def save_and_die(*arguments, **keywords):
        calls.append("checkpoint")
        if len(calls) < 2:
            return save(*arguments, **keywords)
        if moment == "before the checkpoint":
            die()
        if moment == "before its rename":
            checkpoint.publish = die
        if moment == "before the older one is deleted":
            checkpoint.publish = lambda *paths: (publish(*paths), die())
        save(*arguments, **keywords)
        die()

    checkpoint.save = save_and_die
    run_training(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    wait(start(str(folder), False))
    return folder


@pytest.mark.parametrize(
    ("moment", "lost"), [*((moment, 0) for moment in MOMENTS), ("after the checkpoint", 2)]
)
def test_no_kill_between_metrics_and_checkpoint_skips_or_repeats_a_prompt(moment, lost, whole, tmp_path):
    """A kill loses no line of metrics that was written; a machine that crashes may lose the last ones."""
    out = tmp_path / "run"
    child = call(__file__, "run_until_killed", str(out), moment)
    assert child.wait() == -signal.SIGKILL, child.stderr
    assert checkpoint.latest(out / "checkpoints").name == f"step_{MOMENTS[moment]:07d}"
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 6
    (out / "metrics.jsonl").write_text("".join(lines[: len(lines) - lost]))
    wait(start(str(out), True))
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, out)]
    assert weights[0] == weights[1]
    rows = [
        [untimed(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, out)
    ]
    missing = range(7 - lost, 7) if MOMENTS[moment] == 6 else ()
    assert rows[1] == [row for row in rows[0] if row["step"] not in missing]


def untimed(row):
    return {name: value for name, value in row.items() if "second" not in name}


def test_a_run_writes_metrics_samples_model_and_report_and_is_not_repeated(tmp_path, capsys):
    folder = run_training(tmp_path / "run", steps=2)
    log = capsys.readouterr()
    number = r"[\d.]+"
    line = rf"step 2 of 2: reward {number}; length \d+; KL {number}e-\d\d; [\d,]+ tokens/s sampled"
    assert re.fullmatch(line, log.out.splitlines()[1])
    assert re.fullmatch(rf"GRPO: 2 of 2 steps in 0:\d\d:\d\d; reward {number}, [\d,]+ tokens/s\n", log.err)
    names = {path.name for path in (tmp_path / "run").iterdir()} - {"checkpoints"}
    assert names == {".lock", "config.json", "machine.json", "metrics.jsonl", "rollouts.jsonl", "model"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0].keys() >= {
        "reward_mean", "reward_std", "reward: correctness",
        "no_signal", "entropy", "length", "truncated", "kl",
        "ratio_min", "ratio_mean", "ratio_max", "clipped_low", "clipped_high",
        "sampler_ratio_mean", "rollout_tokens_per_second", "update_tokens_per_second",
    }  # fmt: skip
    report = write_report(tmp_path / "run").read_text()
    assert "2 steps: mean reward" in report and "data:image/png;base64," in report and "not plotted" in report
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert run_training(tmp_path / "run", steps=2, resume=True) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_step_in_which_nothing_can_be_learned_is_logged_and_leaves_the_weights(tmp_path, capsys):
    nothing = {"nothing": lambda question, completions: [0.0] * len(completions)}
    policy = make_policy(replace(SETTINGS, kl_coef=0.0), reward=nothing)
    before = [p.clone() for p in policy.model.parameters()]
    train(policy, QUESTIONS, RunFolder.open(Config(str(tmp_path / "run"))), steps=1, batch_prompts=3)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
    assert "no update in 2 mini-batches" in capsys.readouterr().out


def test_a_policy_that_diverges_stops_the_run_and_names_the_last_checkpoint(tmp_path):
    message = r"step \d+: loss is|nothing can be learned from .*log-prob not finite.*lower --lr"
    with pytest.raises(ValueError, match=message):
        run_training(tmp_path / "run", lr=1e38)


def test_an_update_that_is_not_finite_is_not_applied_and_the_last_checkpoint_is_named(tmp_path):
    metrics, before = tmp_path / "run" / "metrics.jsonl", []

    def reward(question, completions):
        """After the rollout of the fifth step, spoil its update."""
        if not before and metrics.exists() and len(metrics.read_text().splitlines()) == 4:
            before.extend(p.detach().clone() for p in policy.model.parameters())
            norm = norm_of(policy.model.model.norm, family_of(policy.model.config))
            norm.register_forward_pre_hook(lambda _, args: (args[0] * float("nan"),))
        return [len(completion.ids) % 2 for completion in completions]

    policy = make_policy(replace(SETTINGS, kl_coef=0.0), reward=reward)
    run = RunFolder.open(Config(str(tmp_path / "run")))
    message = r"step 5: loss is nan and .* nothing of this step is kept\..*lower --lr; .*step_0000003$"
    with pytest.raises(ValueError, match=message):
        train(policy, QUESTIONS, run, steps=STEPS, batch_prompts=3, checkpoint_every=3)
    assert all(torch.equal(x, y) for x, y in zip(before, policy.model.parameters(), strict=True))
    assert len(metrics.read_text().splitlines()) == 4


@pytest.mark.parametrize("changed", ["questions", "steps", "lr"])
def test_a_finished_policy_belongs_to_its_run(tmp_path, changed):
    settings = {"steps": 3 if changed == "steps" else 2, "lr": 1e-4 if changed == "lr" else 3e-4}
    folder = run_training(tmp_path / "run", steps=2)
    questions = [*QUESTIONS[:-1], replace(QUESTIONS[-1], answer="7")] if changed == "questions" else QUESTIONS
    policy = make_policy(lr=settings.pop("lr"))
    run = RunFolder.open(Config(str(tmp_path / "run"), resume=True))
    with pytest.raises(ValueError, match=f"{folder} is not the model that this run trains"):
        train(policy, questions, run, **settings, batch_prompts=3)


def test_the_stream_of_prompts_has_each_once_per_epoch_in_another_order_each_time():
    first, second = (draw(QUESTIONS, start, 7, seed=0) for start in (0, 7))
    assert sorted(q.id for q in first) == sorted(q.id for q in second) == sorted(q.id for q in QUESTIONS)
    assert first != second
    assert draw(QUESTIONS, 5, 4, seed=0) == [*first[5:], *second[:2]]
    assert draw(QUESTIONS, 0, 7, seed=1) != first


def test_the_reward_of_a_weakened_model_rises():
    """The toy task, from a start that is right a third of the time. Deterministic on a CPU."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
    from grpo_qwen2_5_0_5b import weaken

    settings = Settings(
        group_size=8, max_new_tokens=60, row_tokens=2048, minibatch_prompts=8, num_slots=128, kl_coef=0.0
    )
    model, tokenizer = load("tiny", device="cpu")
    weaken(model, 0.2, seed=0)
    policy = Policy(
        model, ChatFormat(tokenizer, instruction=""), settings, lr=1e-4, savings=Savings(recompute=False)
    )
    rows = make_rows("short", 500, seed=9, min_operands=3, max_operands=5)
    questions = [Question(row["problem"], row["problem"], row["answer"]) for row in rows]
    rewards = []
    for _ in range(8):
        episodes = rollout(policy, draw(questions, policy.drawn, 16, seed=0))
        rewards.append(update(policy, episodes)["reward_mean"])
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 0.1
