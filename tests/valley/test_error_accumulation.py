"""p, p^n and what is left over, on answers whose mistakes were put there."""

import random

import pytest
from sample_rows import sample

from kit.data.toy import Chain, make_chain, short_trace
from kit.evaluate.results import Result
from kit.valley.error_accumulation import decompose, explain, length_alone
from kit.valley.reflection import reflection_of


def answer(chain: Chain, rng: random.Random, p: float, *, copies: int = 1, box: float = 1.0) -> str:
    """Work through a chain. p, box: chances of a right step and box. copies: of each step, as checks."""
    steps, value = [], chain.values[0]
    for operator, operand in zip(chain.operators, chain.operands, strict=True):
        true = value + operand if operator == "+" else value - operand
        stated = true if rng.random() < p else true + 1
        step = f"{value}{operator}{operand}={stated}"
        steps.append(step + f", recheck: {stated}+0={stated} ok" * (copies - 1))
        value = stated
    return ";".join(steps) + f".\\boxed{{{value if rng.random() < box else 'x'}}}"


def results(make, *, seeds=2, questions=60, operands=None):
    """Return seed -> a result whose texts are make(chain, rng)."""
    found = {}
    for seed in range(seeds):
        rows = []
        for q in range(questions):
            chain, rng = make_chain(random.Random(q), operands or 4 + q % 5), random.Random(f"{seed} {q}")
            for k in range(4):
                text = make(chain, rng)
                verdict = "correct" if text.endswith(f"{{{chain.answer}}}") else "wrong"
                of_text = {"problem": chain.problem, "text": text, "tokens": len(text)}
                rows.append(sample(str(q), verdict, sample=k, **of_text))
        found[seed] = Result("toy", tuple(rows))
    return found


BASE = decompose(0, results(lambda chain, rng: short_trace(chain)))


def test_errors_that_only_accumulate_leave_nothing_over():
    found = decompose(64, results(lambda chain, rng: answer(chain, rng, 0.8)))
    assert abs(found.step_accuracy.mean - 0.8) < found.step_accuracy.half
    assert 0.2 < found.predicted.mean < 0.4
    assert not found.residual.above_zero() and not found.residual.below_zero()
    assert found.causes["a sum is wrong"] == pytest.approx(1 - found.accuracy.mean)
    lines = explain(BASE, [found])
    assert "the same within chance" in lines[0]
    # answers are as long as before: it is p that fell
    assert "Length explains nothing of the fall" in lines[1]
    assert "a sum is wrong at 64 (100 %)" in lines[2]


def test_what_goes_wrong_with_the_format_is_left_over():
    found = decompose(64, results(lambda chain, rng: answer(chain, rng, 0.98, box=0.3)))
    assert found.residual.below_zero()
    lines = explain(BASE, [found])
    assert "a difference (-" in lines[0]
    assert "box differs at 64" in lines[2]


@pytest.mark.slow
def test_longer_answers_by_themselves_are_distinguished_from_worse_steps():
    """The base model errs in one equation in a hundred. Thirty times as many, no worse each, cost it."""
    base = decompose(0, results(lambda chain, rng: answer(chain, rng, 0.99)))
    longer = decompose(64, results(lambda chain, rng: answer(chain, rng, 0.99**30, copies=30)))
    assert longer.operations.mean == pytest.approx(30 * base.operations.mean)
    assert length_alone(base, longer) < 0.4 < 0.9 < base.accuracy.mean
    assert "explain most of the fall" in explain(base, [longer])[1]


def test_a_rise_is_not_explained_as_a_fall():
    weak = decompose(0, results(lambda chain, rng: answer(chain, rng, 0.7)))
    lines = " ".join(explain(weak, [decompose(64, results(lambda chain, rng: short_trace(chain)))]))
    assert "of the fall" not in lines and "goes wrong first" not in lines


def test_lengths_of_answers_with_and_without_a_recheck_are_compared_if_there_are_both():
    mixed = reflection_of(
        64, results(lambda chain, rng: answer(chain, rng, 1.0, copies=1 + (rng.random() < 0.5)), operands=5)
    )
    extra = len(", recheck: 12+0=12 ok") * 4
    assert mixed.tokens_longer.mean == pytest.approx(extra, abs=6)
    assert mixed.tokens_longer.low > 0
