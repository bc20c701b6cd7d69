"""Measurements during training: they change nothing in it, resume with it, and are what they say."""

import json
import os
import shutil
import signal
from dataclasses import dataclass

import pytest
import torch
from children import CtrlC

from kit.command import Stopped
from kit.data.chat import ChatFormat
from kit.data.documents import load_documents, make_documents
from kit.data.responses import Trace
from kit.data.toy import make_pairs
from kit.evaluate.benchmarks import BENCHMARKS
from kit.evaluate.during_training import DuringTraining, mean_loss
from kit.evaluate.results import read_result
from kit.generate.sampling import SamplingParams
from kit.journal import write_rows
from kit.models import load
from kit.models.backbone import head_weight, hidden_states
from kit.packing import PackedBatch
from kit.run import Journal, RunFolder
from kit.train.loop import TrainingPlan, train
from kit.train.savings import Savings

ROWS = make_pairs(30, seed=0)
PARAMS = SamplingParams(max_new_tokens=12)


@dataclass(frozen=True)
class Config:
    out: str
    resume: bool = False


def run_training(
    out,
    *,
    every=2,
    resume=False,
    dtype=torch.float32,
    stop_at=0,
    savings=None,
    write_report=None,
    steps=6,
    error=RuntimeError,
    chat_class=ChatFormat,
):
    """Train the tiny model; measure it every so many steps (0 = never). Return it and its measurements."""
    model, tokenizer = load("tiny", device="cpu")
    model, chat = model.to(dtype), chat_class(tokenizer, instruction="")
    traces = [Trace(row["problem"], row["trace"], "here") for row in ROWS]
    documents = make_documents(traces, chat)
    run = RunFolder.open(Config(str(out), resume))
    lengths = [len(document) for document in documents[:24]]
    plan = TrainingPlan.make(lengths, row_tokens=400, batch_traces=4, epochs=2, max_steps=steps)
    during = None
    if every:
        part = [BENCHMARKS["toy"].read(limit=3)]
        during = DuringTraining(
            model, chat, part, PARAMS, run.path, every, documents[24:],
            row_tokens=400, num_slots=2, write_report=write_report,
        )  # fmt: skip

    def after_step(step):
        if stop_at and step == stop_at:
            raise error("killed")
        if during:
            during(step)

    options = {"lr": 1e-3, "warmup_ratio": 0.1, "checkpoint_every": 3, "savings": savings}
    train(model, tokenizer, documents[:24], plan, run, after_step=after_step, **options)
    return model, Journal(run.path / "during.jsonl").read()


def assert_equal(a, b):
    assert all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bf16 weights are rounded at random
def test_the_weights_are_bit_equal_with_and_without(tmp_path, dtype):
    savings = Savings(tile_tokens=64)
    plain, none = run_training(tmp_path / "plain", every=0, dtype=dtype, savings=savings)
    watched, rows = run_training(tmp_path / "watched", every=2, dtype=dtype, savings=savings)
    assert none == [] and [row["step"] for row in rows] == [0, 2, 4, 6]
    assert_equal(plain, watched)
    losses = [Journal(tmp_path / name / "metrics.jsonl").read() for name in ("plain", "watched")]
    assert [row["loss"] for row in losses[0]] == [row["loss"] for row in losses[1]]


def test_a_step_whose_measurement_fails_is_kept_and_ctrl_c_in_one_says_so(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        run_training(tmp_path / "run", stop_at=5)
    assert (tmp_path / "run" / "checkpoints" / "step_0000005").is_dir()
    with pytest.raises(Stopped, match=r"while step 6 was measured, whose checkpoint is kept"):
        run_training(tmp_path / "run", stop_at=6, error=KeyboardInterrupt, resume=True)
    resumed, rows = run_training(tmp_path / "run", resume=True)
    unbroken, expected = run_training(tmp_path / "unbroken")
    assert rows == expected
    assert_equal(unbroken, resumed)


class CtrlCWhileSampling(ChatFormat):
    """Ctrl-C comes when the answers of the second measurement, after the base model's, are decoded."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.interrupt = CtrlC(at=4)

    def decode(self, ids):
        self.interrupt()
        return super().decode(ids)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_ends_a_measurement_at_once_and_its_step_is_kept(tmp_path):
    made = []

    def make_chat(*arguments, **options):
        made.append(CtrlCWhileSampling(*arguments, **options))
        return made[-1]

    with pytest.raises(Stopped, match=r"^while step 2 was measured, whose checkpoint is kept$"):
        run_training(tmp_path / "run", chat_class=make_chat)
    assert made[0].interrupt.left == 0  # no answer was decoded after it
    assert (tmp_path / "run" / "checkpoints" / "step_0000002").is_dir()
    resumed, rows = run_training(tmp_path / "run", resume=True)
    unbroken, expected = run_training(tmp_path / "unbroken")
    assert rows == expected
    assert_equal(unbroken, resumed)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_after_the_answers_of_the_first_measurement_stops_before_a_step(tmp_path):
    def interrupt(run, *, goes_on):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match=r"^before step 1 of 6$"):
        run_training(tmp_path / "run", write_report=interrupt)


def test_a_run_that_was_killed_goes_on_measuring_where_an_unbroken_one_does(tmp_path):
    unbroken, expected = run_training(tmp_path / "unbroken")
    with pytest.raises(RuntimeError, match="killed"):
        run_training(tmp_path / "broken", stop_at=5)
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "step_0000005")  # which a kill would not have left
    assert [row["step"] for row in Journal(tmp_path / "broken" / "during.jsonl").read()] == [0, 2, 4]
    resumed, rows = run_training(tmp_path / "broken", resume=True)
    assert rows == expected and len(rows) == 4
    assert_equal(unbroken, resumed)


def test_what_was_measured_after_the_last_checkpoint_is_measured_again(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        run_training(tmp_path / "run", stop_at=5)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_0000005")
    journal = Journal(tmp_path / "run" / "during.jsonl")
    stale = [row | ({"held_out_loss": 99.0} if row["step"] == 4 else {}) for row in journal.read()]
    journal.path.write_text("".join(json.dumps(row) + "\n" for row in stale))
    _, rows = run_training(tmp_path / "run", resume=True)
    assert [row["step"] for row in rows] == [0, 2, 4, 6] and rows[2]["held_out_loss"] < 99


def test_a_row_has_the_samples_own_figures_and_the_loss_by_definition(tmp_path):
    model, rows = run_training(tmp_path / "run")
    result = read_result(tmp_path / "run" / "during" / "step_000006" / "toy.jsonl")
    found = rows[-1]["benchmarks"]["toy"]
    assert len(result.rows) == result.num_questions == 3 and result.num_samples == 1
    names = ("accuracy", "interval", "mean_tokens", "truncated", "reflection", "paper_accuracy")
    assert found == {name: getattr(result, name) for name in names}
    first = read_result(tmp_path / "run" / "during" / "step_000000" / "toy.jsonl")
    assert {row["question"] for row in first.rows} == {row["question"] for row in result.rows}

    chat = ChatFormat(load("tiny", device="cpu")[1], instruction="")
    held_out = make_documents([Trace(row["problem"], row["trace"], "x") for row in ROWS[24:]], chat)
    losses = []
    double = model.double()
    for document in held_out:
        batch = PackedBatch.build([document])
        logits = hidden_states(double, batch) @ head_weight(double).T
        losses.append(
            torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")[batch.targets >= 0]
        )
    assert rows[-1]["held_out_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    double.train()
    assert mean_loss(double, held_out, 400) == pytest.approx(torch.cat(losses).mean().item(), rel=1e-12)
    assert double.training


def test_a_report_is_asked_for_after_every_measurement(tmp_path):
    calls = []
    run_training(tmp_path / "run", every=3, write_report=lambda path, **how: calls.append((path, how)))
    assert calls == [(tmp_path / "run", {"goes_on": True})] * 3


def test_held_out_traces_follow_those_that_are_trained_on_which_stay_the_same(tmp_path):
    chat = ChatFormat(load("tiny", device="cpu")[1], instruction="")
    write_rows(tmp_path / "a.jsonl", ROWS)
    options = {"row_tokens": 400, "num_traces": 20, "seed": 1}
    plain, counts = load_documents(str(tmp_path / "a.jsonl"), chat, **options)
    more, counts_of_more = load_documents(str(tmp_path / "a.jsonl"), chat, **options, held_out=6)
    assert len(plain) == counts.kept == counts_of_more.kept == 20 and len(more) == 26
    texts = [chat.tokenizer.decode(document.ids) for document in more]
    assert texts[:20] == [chat.tokenizer.decode(document.ids) for document in plain]
    assert len(set(texts)) == 26
    few, counts = load_documents(str(tmp_path / "a.jsonl"), chat, **options | {"num_traces": 28}, held_out=6)
    assert len(few) == 30 and counts.kept == 28  # two are left to hold out
