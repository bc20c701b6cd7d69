"""The grader's cases: each line of cases/*.jsonl holds a gold, a prediction, the verdict on them, and why.

Optional fields: `options` of grade(); the `tier` that decides (if absent, it must be below 2); the `rule`
that decides; `paper`, the verdict by the paper's rules. contested.jsonl lists the public cases whose label we
do not follow.
"""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from kit.grade.paper import grade_as_paper
from kit.grade.rules import Rule
from kit.grade.verdict import Options, equal, gold_answer, grade

FILES = sorted(Path(__file__).with_name("cases").glob("*.jsonl"))
CASES = {
    f"{path.stem}: {case['gold']} ~ {case['prediction']} {case.get('options', '')}": case
    for path in FILES
    for case in map(json.loads, path.read_text(encoding="utf-8").splitlines())
}


def is_decided_by(rule: Rule, found: str) -> bool:
    """Whether a verdict's rule is this one, alone or followed by a detail ("too large: ...")."""
    return found == rule.value or found.startswith((f"{rule.value}, ", f"{rule.value}: "))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_case(case):
    options = case.get("options", {})
    found = grade(case["gold"], case["prediction"], deadline=30, **options)
    assert found.verdict == case["verdict"], (case["why"], found)
    assert found.tier == case["tier"] if "tier" in case else found.tier < 2, found
    assert found.rule == case.get("rule", found.rule)
    assert any(is_decided_by(rule, found.rule) for rule in Rule), found

    if found.extracted is not None:
        sides = gold_answer(case["gold"]), found.extracted
        verdicts = [equal(*pair, options=Options(**options), deadline=30) for pair in (sides, sides[::-1])]
        assert verdicts[0] == verdicts[1]

    if "paper" in case:
        paper = grade_as_paper(case["gold"], case["prediction"], deadline=60)
        assert paper.verdict == case["paper"], (case["why"], paper)


def test_every_rule_has_a_case_that_names_it():
    named = [case["rule"] for case in CASES.values() if "rule" in case]
    unneeded = [rule for rule in Rule if not any(is_decided_by(rule, text) for text in named)]
    assert not unneeded, "add a case whose `rule` is this one, or remove the rule"


def test_every_answer_equals_itself():
    for case in CASES.values():
        for answer in (case["gold"], case["prediction"]):
            assert equal(answer, answer)[0] == "correct"


def test_verdict_on_two_golds_does_not_depend_on_the_side():
    golds = sorted({case["gold"] for case in CASES.values() if len(case["gold"]) < 60})
    for a, b in [*pairwise(golds), *zip(golds, golds[7:], strict=False)]:
        assert equal(a, b, deadline=30) == equal(b, a, deadline=30), (a, b)


def test_no_case_stands_twice():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES)
    assert len(CASES) == lines
