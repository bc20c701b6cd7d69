import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kit import models
from kit.benchmarks import parse_benchmarks
from kit.chat import ChatFormat
from kit.evaluate import REFLECTION, Result, evaluate, fingerprint, mean_accuracy, paired_difference, read_result
from kit.generate import SamplingParams

PARAMS = SamplingParams(max_new_tokens=60)
HOT = SamplingParams(temperature=1.5, top_p=1.0, max_new_tokens=60)  # else the model is too sure of itself to tell samples apart


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = models.load("tiny", device="cpu")
    return model, ChatFormat(tokenizer, instruction="")


def toy(limit=6):
    return parse_benchmarks("toy", limit=limit)[0]


def row(question, verdict, tokens=10, finished=True, text="x"):
    return {"question": question, "verdict": verdict, "tokens": tokens, "finished": finished, "text": text}


def result(*rows, name="toy"):
    return Result(name, tuple(rows))


def test_accuracy_is_the_mean_over_questions_and_its_interval_counts_questions_not_samples():
    four = result(*(row(q, v) for q, v in [("a", "correct"), ("a", "wrong"), ("b", "correct"), ("b", "correct"), ("c", "wrong"),
                                           ("c", "unknown")]))  # fmt: skip
    assert four.accuracy == pytest.approx(0.5)
    variance = (0.5**2 + 1 + 2) / 7 - 0.5**2  # the shares are 0.5, 1 and 0; with two 0 and two 1 their mean is still 0.5
    assert four.interval == pytest.approx(1.96 * math.sqrt(variance / 7))
    assert four.unknown == 1
    assert four.num_questions == 3


def test_a_few_questions_all_alike_are_not_certain():
    none = result(*(row(str(i), "wrong") for i in range(8)))
    assert none.accuracy == 0
    assert 0.15 < none.interval < 0.25  # the exact upper bound for 0 of 8 is 0.31, one-sided at 97.5 %
    one = result(row("a", "correct"))
    assert paired_difference(one, one)[1] > 0.5


def test_length_truncation_and_reflection_are_shares_of_samples():
    some = result(row("a", "wrong", 10, True, "Let me RECHECK this"), row("a", "wrong", 30, False, "wait, no"))
    assert (some.mean_tokens, some.truncated, some.reflection) == (20, 0.5, 0.5)
    assert "50.0 % truncated" in str(some)


@pytest.mark.parametrize("text", ["re-evaluate", "Reexamine", "double-check", "go over the steps", "reevaluation", "Think again"])
def test_the_papers_keywords_count_as_reflection(text):
    assert REFLECTION.search(f"so {text} it")


def test_wait_is_not_one_of_the_papers_keywords():
    assert not REFLECTION.search("Wait, hmm, alternatively check")


def test_the_difference_is_paired_by_question():
    before = result(row("a", "correct"), row("b", "wrong"), row("c", "wrong"))
    after = result(row("c", "correct"), row("b", "correct"), row("a", "correct"))
    difference, spread = paired_difference(before, after)
    assert difference == pytest.approx(2 / 3)
    variance = 4 / 5 - (2 / 5) ** 2  # the differences 0, 1, 1 and the added -1, 1
    assert spread == pytest.approx(1.96 * math.sqrt(variance / 5))
    with pytest.raises(ValueError, match="1 are the same"):
        paired_difference(before, result(row("a", "correct")))


def test_the_headline_is_the_unweighted_mean_over_benchmarks():
    assert mean_accuracy([result(row("a", "correct")), result(row("a", "wrong"), row("b", "wrong"), row("c", "wrong"))]) == 0.5


def test_every_sample_is_logged_with_what_decided_and_the_file_gives_the_same_result(tiny, tmp_path):
    found = evaluate(*tiny, toy(), PARAMS, tmp_path, num_samples=2, num_slots=4)
    assert len(found.rows) == 12
    assert {(r["question"], r["sample"]) for r in found.rows} == {(q.id, i) for q in toy().questions for i in (0, 1)}
    assert {"verdict", "rule", "tier", "gold", "prediction", "tokens", "finished", "text"} <= found.rows[0].keys()
    assert read_result(tmp_path / "toy.jsonl") == found
    assert found.accuracy > 0  # the shipped model solves some of its own task
    header = json.loads((tmp_path / "toy.jsonl").read_text().splitlines()[0])["header"]
    assert header["model"] == fingerprint(tiny[0])
    assert header["temperature"] == 0.6


def test_samples_of_another_model_or_decoding_are_not_mixed_in(tiny, tmp_path):
    evaluate(*tiny, toy(2), PARAMS, tmp_path, num_samples=1)
    with pytest.raises(ValueError, match=r"temperature was 0.6, is 1.0"):
        evaluate(*tiny, toy(2), SamplingParams(temperature=1.0, max_new_tokens=60), tmp_path, num_samples=1)


def test_a_result_without_samples_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no samples"):
        read_result(tmp_path / "toy.jsonl")


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_evaluate import HOT, toy
from kit import models
from kit.chat import ChatFormat
from kit.evaluate import evaluate
model, tokenizer = models.load("tiny", device="cpu")
evaluate(model, ChatFormat(tokenizer, instruction=""), toy(30), HOT, Path({out!r}), num_samples=2, num_slots={slots})
"""


def child(out, slots):
    code = CHILD.format(tests=str(Path(__file__).parent), out=str(out), slots=slots)
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)


def test_killed_and_resumed_with_other_slots_it_equals_an_unbroken_run(tmp_path):
    whole = child(tmp_path / "whole", 8)
    assert whole.wait() == 0, whole.stderr.read().decode()
    path = tmp_path / "broken" / "toy.jsonl"
    broken = child(tmp_path / "broken", 1)
    while broken.poll() is None and not (path.exists() and path.read_text().count("\n") >= 10):
        time.sleep(0.001)
    broken.send_signal(signal.SIGKILL)
    broken.wait()
    assert 10 <= path.read_text().count("\n") < 61, "killed too late to test anything"
    resumed = child(tmp_path / "broken", 5)
    assert resumed.wait() == 0, resumed.stderr.read().decode()

    def rows(name):
        found = read_result(tmp_path / name / "toy.jsonl").rows
        return sorted(
            ({k: v for k, v in r.items() if k != "mean_logprob"} for r in found), key=lambda r: (r["question"], r["sample"])
        )

    assert rows("whole") == rows("broken")
    assert len(rows("whole")) == 60
    assert len({row["text"] for row in rows("whole")}) > 30  # some of the 30 questions have two different answers
