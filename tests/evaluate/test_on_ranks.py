"""Evaluation on several ranks: the samples and figures of one process, however many there are."""

import time
from pathlib import Path

import pytest
from children import start_ranks, wait

from kit import ranks
from kit.command import guard
from kit.data.chat import ChatFormat
from kit.data.documents import make_documents
from kit.data.responses import Trace
from kit.data.toy import make_pairs
from kit.evaluate.benchmarks import BENCHMARKS
from kit.evaluate.during_training import DuringTraining
from kit.evaluate.measure import evaluate
from kit.evaluate.results import read_result, read_results
from kit.evaluate.sample_log import OF_RANK, SampleLog
from kit.generate.sampling import SamplingParams
from kit.journal import Journal
from kit.models import load

HOT = SamplingParams(temperature=1.5, top_p=1.0, max_new_tokens=60)  # so that samples of one question differ


def measure(folder):
    """Ask 7 questions, 2 samples each, one after another, so that it can be killed between two of them."""
    ranks.BEAT_EVERY, ranks.LOST_AFTER, ranks.GRACE = 0.1, 5.0, 0.1

    def program(_):
        ranks.join("cpu")
        model, tokenizer = load("tiny", device="cpu")
        chat, toy = ChatFormat(tokenizer, instruction=""), BENCHMARKS["toy"].read(limit=7)
        evaluate(model, chat, toy, HOT, Path(folder), num_samples=2, num_slots=1)
        ranks.leave()

    guard(program, [], alone="")


def texts(result):
    return {(row["question"], row["sample"]): row["text"] for row in result.rows}


@pytest.mark.slow
def test_samples_depend_neither_on_the_number_of_ranks_nor_on_one_that_is_killed(tmp_path):
    measure(tmp_path / "whole")
    whole = texts(read_result(tmp_path / "whole" / "toy.jsonl"))
    assert len(whole) == 14

    folder = tmp_path / "broken"
    first, second = start_ranks(2, __file__, "measure", str(folder))
    of_second = folder / f"toy{OF_RANK}1.jsonl"
    while second.poll() is None and not (of_second.exists() and of_second.read_text().count("\n") > 2):
        time.sleep(0.001)
    second.kill()
    assert first.wait() == ranks.ENDED
    assert "rank 1 has been silent" in first.stderr
    assert {path.name for path in folder.glob("*.jsonl")} == {"toy.jsonl", of_second.name}
    (joined,) = read_results(folder).values()  # as a report of the unfinished run does
    kept = texts(joined)
    assert 2 < len(kept) < 14
    drawn = [file.read_text().count("\n") - 1 for file in folder.glob("*.jsonl")]  # without the headers
    assert sum(drawn) == len(kept)  # each by one rank only
    assert kept.items() <= whole.items()

    children = start_ranks(3, __file__, "measure", str(folder))
    for child in children:
        wait(child)
    assert f"toy: {len(kept)} answers are kept, {14 - len(kept)} are to come" in children[0].stdout
    assert [path.name for path in folder.glob("*.jsonl")] == ["toy.jsonl"]
    assert len((folder / "toy.jsonl").read_text().splitlines()) == 15  # no sample was drawn twice
    assert texts(read_result(folder / "toy.jsonl")) == whole


def test_samples_of_another_rank_below_another_header_are_refused(tmp_path):
    SampleLog(tmp_path / "toy.jsonl").begin({"seed": 0})
    SampleLog(tmp_path / f"toy{OF_RANK}1.jsonl").begin({"seed": 1})
    with pytest.raises(ValueError, match="the files of other ranks beside it have other headers"):
        read_results(tmp_path)


def measure_during(folder):
    ranks.join("cpu")
    model, tokenizer = load("tiny", device="cpu")
    chat = ChatFormat(tokenizer, instruction="")
    held_out = make_documents(
        [Trace(row["problem"], row["trace"], "") for row in make_pairs(9, seed=0)], chat
    )
    part, options = [BENCHMARKS["toy"].read(limit=3)], {"row_tokens": 400, "num_slots": 2}
    during = DuringTraining(model, chat, part, HOT, Path(folder), 2, held_out, **options)
    for step in (0, 1, 2):
        during(step)
    ranks.leave()


def test_a_measurement_during_training_is_that_of_one_process_bit_for_bit(tmp_path):
    measure_during(tmp_path / "one")
    for child in start_ranks(2, __file__, "measure_during", str(tmp_path / "two")):
        wait(child)
    one, two = (Journal(tmp_path / name / "during.jsonl").read() for name in ("one", "two"))
    assert [row["step"] for row in one] == [0, 2]
    assert one == two
