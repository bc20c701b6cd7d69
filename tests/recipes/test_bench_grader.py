"""The grader's benchmark makes pairs whose right answers are right, and reports what it timed."""

import importlib.util
import json
import random

import pytest

from kit.grade.verdict import grade


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend("recipes")
    return importlib.import_module("grader")


def test_every_rewriting_keeps_the_answer_and_every_wrong_one_is_wrong(bench):
    pairs = bench.make_pairs(bench.read_answers(bench.Config()), random.Random(0))
    assert len(pairs) > 250
    assert {pair.kind for pair in pairs} >= {
        "the same",
        "another's",
        "a number changed",
        "in a sentence",
        *bench.REWRITES,
    }
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


def test_the_hardest_are_the_slowest_pairs_that_both_decide(bench):
    pairs = [
        bench.Pair("7", "7", "the same", "correct", "correct", *([1e-6] * 2), *([1e-4] * 2))
        for _ in range(18)
    ]
    pairs.append(bench.Pair("8", "8", "the same", "correct", "correct", 1e-3, 1e-3, 2e-3, 2e-3))
    # one side alone decides it
    pairs.append(bench.Pair("9", "9", "the same", "unknown", "wrong", 5.0, 5.0, 1e-3, 1e-3))
    figures = bench.summarise(pairs, 0.05, peer=True)["first"]
    assert figures["ratio_of_medians_on_hardest"] == pytest.approx(2)
    assert figures["ratio_of_medians"] == pytest.approx(100)
    assert figures["our_median_us"] == pytest.approx(1)
