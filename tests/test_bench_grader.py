"""The grader's benchmark makes pairs whose right answers are right, and reports what it timed."""

import importlib.util
import json
import random

import pytest

from kit.grade import grade


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend("recipes")
    return importlib.import_module("bench_grader")


def test_every_rewriting_keeps_the_answer_and_every_wrong_one_is_wrong(bench):
    pairs = bench.make_pairs(bench.read_answers(bench.Config()), random.Random(0))
    assert len(pairs) > 250
    assert {pair.kind for pair in pairs} >= {"the same", "another's", "a number changed", "in a sentence", *bench.REWRITES}
    for pair in pairs:
        verdict = grade(pair.gold, pair.response, deadline=60).verdict
        if pair.kind in ("a number changed", "another's"):
            assert verdict == "wrong" or pair.kind == "another's", pair
        elif pair.gold != r"\sin 30^\circ":  # without its degree sign it is another number
            assert verdict == "correct", pair


def test_a_short_run_writes_its_figures(bench, tmp_path, capsys):
    result = bench.main(bench.Config(**bench.SMOKE, json=str(tmp_path / "grader.json")))
    written = json.loads((tmp_path / "grader.json").read_text())
    assert written["first"] == result["first"]
    assert len(written["pairs"]) == result["num_pairs"]
    assert written["first"]["our_median_us"] > 0
    installed = importlib.util.find_spec("math_verify") is not None
    assert ("ratio_of_medians_on_hardest" in result["again"]) == installed
    assert ("Math-Verify is not installed" in capsys.readouterr().out) != installed
