import io
import json
import time

import pytest
import torch
from children import call, wait

from kit import models
from kit.data.chat import ChatFormat
from kit.evaluate.asking import Side, ask
from kit.evaluate.benchmarks import parse_benchmarks
from kit.evaluate.during_training import DuringTraining
from kit.evaluate.measure import _cuts, evaluate, fingerprint
from kit.evaluate.results import read_result
from kit.generate import engine
from kit.generate.graph import Eager
from kit.generate.sampler import Completion
from kit.generate.sampling import SamplingParams
from kit.grade.verdict import grade
from kit.run import digest

PARAMS = SamplingParams(max_new_tokens=60)
HOT = SamplingParams(temperature=1.5, top_p=1.0, max_new_tokens=60)  # so that samples of one question differ


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = models.load("tiny", device="cpu")
    return model, ChatFormat(tokenizer, instruction="")


def toy(limit=6):
    return parse_benchmarks("toy", limit=limit)[0]


def test_every_sample_is_logged_with_what_decided_and_the_file_gives_the_same_result(tiny, tmp_path):
    found = evaluate(*tiny, toy(), PARAMS, tmp_path, num_samples=2, num_slots=4)
    assert len(found.rows) == 12
    keys = {(row["question"], row["sample"]) for row in found.rows}
    assert keys == {(question.id, i) for question in toy().questions for i in (0, 1)}
    fields = {"verdict", "rule", "tier", "gold", "extracted", "extraction", "seconds", "finished"}
    for logged in found.rows:
        assert fields <= logged.keys()
        question = next(q for q in toy().questions if q.id == logged["question"])
        assert (logged["problem"], logged["answer"]) == (question.problem, question.answer)
        assert logged["prompt"] == digest(tiny[1].prompt(question.problem))
        verdict = grade(logged["answer"], logged["text"])  # every figure can be computed again from the file
        assert (verdict.verdict, verdict.prediction) == (logged["verdict"], logged["prediction"])
    assert read_result(tmp_path / "toy.jsonl") == found
    assert found.accuracy > 0  # the shipped model solves some of its own task
    header = json.loads((tmp_path / "toy.jsonl").read_text().splitlines()[0])["header"]
    assert header["model"] == fingerprint(tiny[0])
    assert header["temperature"] == 0.6


def test_samples_of_another_model_or_decoding_are_not_mixed_in(tiny, tmp_path):
    evaluate(*tiny, toy(2), PARAMS, tmp_path, num_samples=1)
    with pytest.raises(ValueError, match=r"temperature was 0.6, is 1.0"):
        evaluate(*tiny, toy(2), SamplingParams(temperature=1.0, max_new_tokens=60), tmp_path, num_samples=1)


def test_a_file_of_questions_that_has_changed_is_named_and_the_samples_stay(tiny, tmp_path):
    own = tmp_path / "q.jsonl"
    own.write_text('{"problem": "1+2?", "answer": 3}\n')
    found = evaluate(*tiny, parse_benchmarks(f"mine={own}")[0], PARAMS, tmp_path, num_samples=1)
    own.write_text('{"problem": "1+2?", "answer": 4}\n')
    with pytest.raises(ValueError, match=r"in \S+q\.jsonl are no longer .* \S+mine\.jsonl; restore the file"):
        evaluate(*tiny, parse_benchmarks(f"mine={own}")[0], PARAMS, tmp_path, num_samples=1)
    assert read_result(tmp_path / "mine.jsonl") == found


def test_a_problem_that_changed_in_its_white_space_alone_is_another_prompt(tiny, tmp_path):
    own = tmp_path / "q.jsonl"
    own.write_text('{"problem": "1+2 3?", "answer": 3}\n')
    evaluate(*tiny, parse_benchmarks(f"mine={own}")[0], PARAMS, tmp_path, num_samples=1)
    own.write_text('{"problem": "1+2  3?", "answer": 3}\n')
    with pytest.raises(ValueError, match="are no longer those of the samples"):
        evaluate(*tiny, parse_benchmarks(f"mine={own}")[0], PARAMS, tmp_path, num_samples=1)


def test_weights_or_logits_that_are_not_finite_stop_an_evaluation(tmp_path):
    model, tokenizer = models.load("tiny", device="cpu")
    chat, name = ChatFormat(tokenizer, instruction=""), "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 5] = float("nan")
        with pytest.raises(ValueError, match=rf"the model holds NaN or infinity in {name}:"):
            evaluate(model, chat, toy(2), PARAMS, tmp_path)
        assert not (tmp_path / "toy.jsonl").exists()
        model.get_parameter(name)[3, 5] = 0.0
        model.model.norm.weight.fill_(3e38)  # finite, but the logits are not
    with pytest.raises(ValueError, match="logits are NaN or infinite for 8 of 8 responses"):
        evaluate(model, chat, toy(2), PARAMS, tmp_path)
    assert len((tmp_path / "toy.jsonl").read_text().splitlines()) == 1  # the header, and no answer


def test_if_memory_runs_out_the_error_says_what_to_pass_and_finished_samples_are_kept(tiny, tmp_path):
    calls = []

    def allocate(*_):
        calls.append(1)
        if len(calls) == 45:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = tiny[0].get_input_embeddings().register_forward_hook(allocate)
    message = r"with 4 answers at once, .* takes 0\.00 GiB; pass --resume with a smaller --num_slots"
    with pytest.raises(ValueError, match=message) as error:
        evaluate(*tiny, toy(), PARAMS, tmp_path / "cut", num_samples=2, num_slots=4)
    handle.remove()
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
    kept = read_result(tmp_path / "cut" / "toy.jsonl").rows
    assert 0 < len(kept) < 12
    found = evaluate(*tiny, toy(), PARAMS, tmp_path / "cut", num_samples=2, num_slots=2)
    whole = evaluate(*tiny, toy(), PARAMS, tmp_path / "whole", num_samples=2, num_slots=4)
    texts, expected = (
        {(r["question"], r["sample"]): r["text"] for r in result.rows} for result in (found, whole)
    )
    assert texts == expected


@pytest.mark.parametrize("cap", [16, 32])
def test_accuracy_at_a_cap_is_that_of_a_run_with_that_limit(tiny, tmp_path, cap):
    """The log of a long run, cut, against a short run, text by text; answers end on both sides of the cut."""
    options = {"num_samples": 2, "num_slots": 20}
    long = evaluate(*tiny, toy(20), PARAMS, tmp_path / "long", **options)
    limited = SamplingParams(max_new_tokens=cap)
    short = evaluate(*tiny, toy(20), limited, tmp_path / "short", **options)
    texts = {(r["question"], r["sample"]): r["text"][: r["cuts"].get(str(cap))] for r in long.rows}
    assert texts == {(r["question"], r["sample"]): r["text"] for r in short.rows}
    assert long.accuracy_at(cap) == short.accuracy
    assert short.accuracy < long.accuracy == long.accuracy_at(60)
    assert long.caps == [16, 32, 60]
    with pytest.raises(ValueError, match="cap is 17 but the log says where the caps 16"):
        long.accuracy_at(17)


def test_a_cut_inside_a_character_of_several_bytes_leaves_it_out(tiny):
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")

    ids = list(("x" * 15 + "é and then some more").encode())  # the 16th token is the first byte of é
    completion = Completion(ids, [0.0] * len(ids), True, Bytes().decode(ids))
    assert _cuts(completion, Bytes()) == {"16": 15, "32": 31}


def measure(out, slots):
    model, tokenizer = models.load("tiny", device="cpu")
    evaluate(model, ChatFormat(tokenizer, instruction=""), toy(30), HOT, out, num_samples=2, num_slots=slots)


@pytest.mark.slow
def test_killed_and_resumed_with_other_slots_it_equals_an_unbroken_run(tmp_path):
    wait(call(__file__, "measure", tmp_path / "whole", 8))
    path = tmp_path / "broken" / "toy.jsonl"
    broken = call(__file__, "measure", tmp_path / "broken", 1)
    while broken.poll() is None and not (path.exists() and path.read_text().count("\n") >= 10):
        time.sleep(0.001)
    broken.kill()
    assert 10 <= path.read_text().count("\n") < 61, "killed too late to test anything"
    wait(call(__file__, "measure", tmp_path / "broken", 5))

    def rows(name):
        found = read_result(tmp_path / name / "toy.jsonl").rows
        kept = [{k: v for k, v in row.items() if k not in ("mean_logprob", "seconds")} for row in found]
        return sorted(kept, key=lambda row: (row["question"], row["sample"]))

    assert rows("whole") == rows("broken")
    assert len(rows("whole")) == 60
    assert len({row["text"] for row in rows("whole")}) > 30  # some of the 30 questions have two answers


def test_an_evaluation_without_graphs_says_so_to_the_sampler_and_its_log_is_the_same(
    tiny, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(engine, "steps_for", lambda *how: asked.append(how[-1]) or Eager())
    for i, switch in enumerate(({}, {"cuda_graphs": False})):
        evaluate(*tiny, toy(1), PARAMS, tmp_path / str(i), num_samples=1, **switch)
    assert asked == [True, False]
    logs = [(tmp_path / str(i) / "toy.jsonl").read_text().splitlines() for i in (0, 1)]
    assert logs[0][0] == logs[1][0]  # so a run may go on without them


def test_a_measurement_during_training_and_a_model_that_is_asked_hand_the_switch_on(
    tiny, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(engine, "steps_for", lambda *how: asked.append(how[-1]) or Eager())
    off = {"cuda_graphs": False}
    DuringTraining(*tiny, [toy(1)], PARAMS, tmp_path, 1, **off)(0)
    ask([Side("tiny", *tiny, **off)], "1+2?", PARAMS, out=io.StringIO())
    assert asked == [False, False]
