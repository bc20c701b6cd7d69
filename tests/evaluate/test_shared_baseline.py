"""A shared baseline is used only if it is what the run would have measured itself."""

import json
from dataclasses import replace

import pytest
from sample_rows import sample, write_samples

from kit.evaluate.benchmarks import BENCHMARKS
from kit.evaluate.shared_baseline import take_baseline

TOY = BENCHMARKS["toy"].read(limit=3)
SETTINGS = {"num_samples": 2, "seed": 0, "temperature": 0.6, "torch": "2.13"}
HEADER = {"model": "abc", "prompt": "p", "questions": "q", **SETTINGS}


def make_baseline(path, *, header=(), model="org/model", missing=0):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model": model}))
    rows = [sample(question.id, sample=i) for question in TOY.questions for i in range(2)]
    write_samples(path / "samples" / "toy.jsonl", rows[: len(rows) - missing], HEADER | dict(header))
    return path


def take(path, *, header=HEADER, model="org/model", adapted=False, benchmark=TOY):
    folder = path.parent / "run" / "before"
    return take_baseline(path, [(benchmark, header)], model=model, adapted=adapted, folder=folder)


def test_a_baseline_with_the_same_settings_is_copied_and_read(tmp_path):
    path = make_baseline(tmp_path / "baseline")
    found = take(path)
    assert found["toy"].accuracy == 1.0 and found["toy"].num_questions == 3
    copied = tmp_path / "run" / "before" / "toy.jsonl"
    assert copied.read_bytes() == (path / "samples" / "toy.jsonl").read_bytes()
    assert take(path)["toy"] == found["toy"]  # a resumed run takes it again


@pytest.mark.parametrize("key", HEADER)
def test_a_baseline_with_other_settings_is_refused_by_what_differs(key, tmp_path):
    path = make_baseline(tmp_path / "baseline", header={key: 7}.items())
    with pytest.raises(
        ValueError, match=f"was evaluated with other settings: {key} was 7, is {HEADER[key]!r}"
    ):
        take(path)
    assert not (tmp_path / "run").exists()


def test_a_key_that_only_one_of_the_headers_has_is_a_difference(tmp_path):
    path = make_baseline(tmp_path / "baseline", header={"top_k": 20}.items())
    with pytest.raises(ValueError, match="top_k was 20, is None"):
        take(path)


def test_a_file_of_questions_that_has_changed_is_named(tmp_path):
    path = make_baseline(tmp_path / "baseline", header={"questions": "other"}.items())
    with pytest.raises(ValueError, match=r"that is, q\.jsonl now holds other questions or answers; pass one"):
        take(path, benchmark=replace(TOY, source="q.jsonl"))


def test_a_quantised_model_is_compared_by_its_name_and_everything_else_as_ever(tmp_path):
    path = make_baseline(tmp_path / "baseline")
    quantised = HEADER | {"model": "of NF4"}
    assert take(path, header=quantised, adapted=True)["toy"].accuracy == 1.0
    with pytest.raises(ValueError, match="measured org/model but this run is of org/other"):
        take(path, header=quantised, adapted=True, model="org/other")
    with pytest.raises(ValueError, match=r"temperature was 0\.6, is 1\.0"):
        take(path, header=quantised | {"temperature": 1.0}, adapted=True)
    with pytest.raises(ValueError, match="model was 'abc', is 'of NF4'"):
        take(path, header=quantised)


@pytest.mark.parametrize("missing", [1, 2, 5])
def test_an_unfinished_baseline_is_refused(missing, tmp_path):
    path = make_baseline(tmp_path / "baseline", missing=missing)
    message = f"is unfinished, {missing} samples are missing; finish it with --resume"
    with pytest.raises(ValueError, match=message):
        take(path)


def test_a_baseline_without_the_benchmark_or_without_a_run_is_refused(tmp_path):
    path = make_baseline(tmp_path / "baseline")
    with pytest.raises(ValueError, match="holds no samples of gsm8k"):
        take(path, benchmark=replace(TOY, name="gsm8k"))
    with pytest.raises(ValueError, match="no run is there"):
        take(tmp_path / "none")
