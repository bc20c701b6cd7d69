"""What a checkpoint, a finished model or a finished evaluation counts on is flushed to the disk before it."""

import os

import pytest
import test_rl_loop
import test_train_loop

from kit import models
from kit.data.chat import ChatFormat
from kit.evaluate.benchmarks import parse_benchmarks
from kit.evaluate.measure import evaluate
from kit.generate.sampling import SamplingParams
from kit.train import checkpoint


@pytest.fixture
def synced(monkeypatch):
    """Record inode -> size when it was last flushed."""
    found, fsync = {}, os.fsync

    def record(descriptor):
        found[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return lambda path: found.get(path.stat().st_ino) == path.stat().st_size > 0


@pytest.mark.parametrize(
    ("run_training", "logs"),
    [
        (test_train_loop.run_training, ["metrics.jsonl"]),
        (test_rl_loop.run_training, ["metrics.jsonl", "rollouts.jsonl"]),
    ],
    ids=["fine-tuning", "reinforcement learning"],
)
def test_the_steps_are_on_the_disk_before_their_checkpoint_and_the_model(
    tmp_path, monkeypatch, synced, run_training, logs
):
    seen = []

    def before(write):
        def checked(*arguments, **keywords):
            seen.append([synced(tmp_path / "run" / name) for name in logs])
            return write(*arguments, **keywords)

        return checked

    for name in ("save", "finish"):
        monkeypatch.setattr(checkpoint, name, before(getattr(checkpoint, name)))
    run_training(tmp_path / "run", steps=6)
    assert seen == [[True] * len(logs)] * 2


def test_a_finished_evaluation_is_on_the_disk(tmp_path, synced):
    model, tokenizer = models.load("tiny", device="cpu")
    (toy,) = parse_benchmarks("toy", limit=2)
    chat, params = ChatFormat(tokenizer, instruction=""), SamplingParams(max_new_tokens=20)
    evaluate(model, chat, toy, params, tmp_path, num_samples=2)
    assert synced(tmp_path / "toy.jsonl")
