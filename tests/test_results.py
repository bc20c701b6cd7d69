import math

import pytest

from kit.results import Result, check_comparable, mean_accuracy, paired_bootstrap, paired_difference, read_result


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


def test_a_result_without_samples_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no samples"):
        read_result(tmp_path / "toy.jsonl")
