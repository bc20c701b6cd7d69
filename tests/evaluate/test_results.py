import json
import math

import pytest

from kit.evaluate.results import (
    Result,
    check_comparable,
    mean_accuracy,
    paired_difference,
    read_result,
)
from kit.run import Journal


def row(question, verdict, tokens=10, finished=True, text="x", **more):
    return {
        "question": question,
        "verdict": verdict,
        "tokens": tokens,
        "finished": finished,
        "text": text,
        **more,
    }


def result(*rows, name="toy", **header):
    return Result(name, tuple(rows), header)


def test_accuracy_is_the_mean_over_questions_and_its_interval_counts_questions_not_samples():
    of_a = [row("a", "correct"), row("a", "wrong")]
    of_b = [row("b", "correct"), row("b", "correct")]
    some = result(*of_a, *of_b, row("c", "wrong"), row("c", "unknown"))
    assert some.accuracy == pytest.approx(0.5)
    # the shares are 0.5, 1 and 0; with two 0 and two 1 their mean is still 0.5
    variance = (0.5**2 + 1 + 2) / 7 - 0.5**2
    assert some.interval == pytest.approx(1.96 * math.sqrt(variance / 7))
    assert some.unknown == 1
    assert some.num_questions == 3


def test_a_few_questions_all_alike_are_not_certain():
    none = result(*(row(str(i), "wrong") for i in range(8)))
    assert none.accuracy == 0
    assert 0.369 < none.interval < 0.38  # 0.369: the upper end of Clopper and Pearson's exact interval
    one = result(row("a", "correct"))
    assert paired_difference(one, one)[1] > 0.5


def test_length_truncation_and_reflection_are_shares_of_samples():
    some = result(
        row("a", "wrong", 10, True, "Let me RECHECK this"), row("a", "wrong", 30, False, "wait, no")
    )
    assert (some.mean_tokens, some.truncated, some.reflection) == (20, 0.5, 0.5)
    assert "50.0 % truncated" in str(some)


def test_the_difference_is_paired_by_question():
    before = result(row("a", "correct"), row("b", "wrong"), row("c", "wrong"))
    after = result(row("c", "correct"), row("b", "correct"), row("a", "correct"))
    difference, spread = paired_difference(before, after)
    assert difference == pytest.approx(2 / 3)
    variance = 4 / 5 - (2 / 5) ** 2  # the differences 0, 1, 1 and the added -1, 1
    assert spread == pytest.approx(1.96 * math.sqrt(variance / 5) + 2 / 3 - 2 / 5)
    with pytest.raises(ValueError, match="1 are the same"):
        paired_difference(before, result(row("a", "correct")))


def test_the_headline_is_the_unweighted_mean_over_benchmarks():
    small, large = result(row("a", "correct")), result(*(row(question, "wrong") for question in "abc"))
    assert mean_accuracy({"toy": small, "mine": large}) == 0.5
    assert mean_accuracy({"toy": small, "math500": large}) == large.accuracy != 0.5


def test_a_result_without_samples_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no samples"):
        read_result(tmp_path / "toy.jsonl")


def test_a_killed_logs_half_line_is_left_out_and_the_header_is_read(tmp_path):
    journal = Journal(tmp_path / "toy.jsonl")
    journal.append({"header": {"model": "abc", "max_new_tokens": 100}})
    complete = {"sample": 0, "problem": "1+1?", "answer": "2", "prediction": "2"}
    journal.append(row("a", "correct", **complete))
    with journal.path.open("a") as file:
        file.write('{"question": "b", "verd')
    found = read_result(journal.path)
    assert (found.header["model"], len(found.rows)) == ("abc", 1)


def test_pass_at_k_is_the_mean_over_questions_of_the_samples_there_are():
    verdicts = {
        "a": ("correct", "wrong", "wrong"),
        "b": ("wrong", "wrong", "wrong"),
        "c": ("correct", "correct", "unknown"),
    }
    some = result(*(row(question, verdict) for question, three in verdicts.items() for verdict in three))
    assert some.num_samples == 3
    assert some.pass_at(1) == pytest.approx(some.accuracy)
    assert some.pass_at(2) == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert some.pass_at(3) == pytest.approx(2 / 3)
    variance = (4 / 9 + 0 + 1 + 2) / 7 - ((5 / 3 + 2) / 7) ** 2  # 2/3, 0 and 1 with two 0 and two 1
    shift = 5 / 9 - (5 / 3 + 2) / 7
    assert some.pass_interval(2) == pytest.approx(1.96 * math.sqrt(variance / 7) + shift)
    with pytest.raises(ValueError, match="k is 4 but there are 3 samples"):
        some.pass_at(4)


def test_lengths_are_split_by_verdict_and_undecided_ones_are_in_neither():
    of_a, of_b = [row("a", "correct", 10), row("a", "wrong", 30)], [row("b", "wrong", 50)]
    some = result(*of_a, *of_b, row("b", "unknown", 1_000))
    assert [some.lengths(v).count for v in ("", "correct", "wrong")] == [4, 1, 2]
    assert (some.lengths("correct").mean, some.lengths("wrong").mean) == (10, 40)
    assert some.token_efficiency == pytest.approx(1_000 * 0.25 / 272.5)


def test_accuracy_of_finished_samples_leaves_the_cut_off_ones_out():
    of_a, of_b = [row("a", "correct"), row("a", "wrong", finished=False)], [row("b", "wrong")] * 2
    some = result(*of_a, *of_b, row("c", "wrong", finished=False))
    assert some.accuracy == pytest.approx(1 / 6)
    assert some.accuracy_of_finished == pytest.approx(1 / 2)
    assert result(row("a", "wrong", finished=False)).accuracy_of_finished is None


def test_loops_and_missing_answers_are_shares_of_samples():
    some = result(
        row("a", "wrong", text="so " + "again and " * 40, prediction=None), row("a", "wrong", prediction="3")
    )
    assert (some.looping, some.without_answer) == (0.5, 0.5)


def test_a_cut_response_is_graded_again_by_what_stands_before_the_cut():
    early = "The answer is \\boxed{7}. " + "And so on. " * 9
    late = "Let us think. " * 8 + "\\boxed{7}"
    changed = "First I say \\boxed{7}. " + "No. " * 20 + "\\boxed{8}"
    rows = [
        row(str(i), verdict, 40, text=text, answer="7", cuts={"16": 30, "32": 60})
        for i, (text, verdict) in enumerate([(early, "correct"), (late, "correct"), (changed, "wrong")])
    ]
    rows.append(row("3", "correct", 16, text="\\boxed{7}", answer="7", cuts={}))
    found = result(*rows, max_new_tokens=64)
    assert found.caps == [16, 32, 64]
    # early, the one that had not changed its mind yet, and the short one
    assert found.accuracy_at(16) == pytest.approx(3 / 4)
    assert found.accuracy_at(64) == found.accuracy == pytest.approx(3 / 4)  # early, late, short
    alone = [result(row, max_new_tokens=64) for row in rows]
    assert [one.accuracy_at(16) for one in alone] == [one.accuracy_at(32) for one in alone] == [1, 0, 1, 1]
    assert [one.accuracy_at(64) for one in alone] == [1, 1, 0, 1]


def test_caps_are_five_powers_of_two_up_to_the_limit():
    assert result(max_new_tokens=16_384).caps == [1_024, 2_048, 4_096, 8_192, 16_384]
    assert result(max_new_tokens=200).caps == [16, 32, 64, 128, 200]
    assert result(max_new_tokens=16).caps == [16]
    assert result().caps == []


def test_the_papers_accuracy_is_shown_if_every_row_has_its_verdict():
    both = [row("a", "wrong", paper_verdict="correct"), row("b", "correct", paper_verdict="correct")]
    assert (result(*both).accuracy, result(*both).paper_accuracy) == (0.5, 1.0)
    assert result(*both, row("c", "wrong")).paper_accuracy is None


HEADER = {"prompt": "p", "temperature": 0.6, "torch": "2.13.0"}


def test_results_with_other_settings_are_not_compared_unless_forced():
    before = result(row("a", "correct"), row("b", "wrong"), model="x", **HEADER)
    same = result(row("a", "correct"), row("b", "correct"), model="y", **HEADER)
    paired_difference(before, same)
    other = result(*same.rows, **HEADER | {"temperature": 1.0, "dtype": "torch.float32"})
    with pytest.raises(ValueError, match=r"temperature 0.6 and 1.0; dtype None and 'torch.float32'.*--force"):
        paired_difference(before, other)
    assert paired_difference(before, other, force=True) == paired_difference(before, same)
    check_comparable(before, same)


def test_the_difference_pairs_questions_whatever_their_order():
    before = result(*(row(str(i), "wrong" if i < 10 else "correct") for i in range(20)))
    after = result(*(row(str(i), "wrong" if i < 10 else "correct") for i in reversed(range(20))))
    # every difference is 0: what is left of the interval is the two added questions, one better and one worse
    assert paired_difference(before, after) == (0, pytest.approx(1.96 * math.sqrt(2 / 22 / 22)))
    after = result(*(row(str(i), "wrong" if i < 15 else "correct") for i in reversed(range(20))))
    difference, spread = paired_difference(before, after)
    assert difference == -0.25 and 0.2 < spread < 0.25


def test_an_unfinished_result_is_not_compared_even_if_forced():
    rows = [row(question, "correct") for question in ("a", "a", "b", "b")]
    whole, cut = (result(*some, num_samples=2) for some in (rows, rows[:3]))
    assert paired_difference(whole, whole)[0] == 0
    for stage, pair in (("before", (cut, whole)), ("after", (whole, cut)), ("before", (cut, cut))):
        with pytest.raises(ValueError, match=f"toy {stage} is unfinished: 3 of 4 answers; finish it with"):
            paired_difference(*pair, force=True)
    with pytest.raises(ValueError, match="toy after is unfinished: 2 of 4 answers"):  # a question is missing
        paired_difference(whole, result(*rows[:2], num_samples=2))
    other = result(*rows[:2], num_samples=2, questions="of another file")
    with pytest.raises(ValueError, match="2 questions before and 1 after, of which 1 are the same"):
        paired_difference(whole, other, force=True)


def test_the_summary_is_plain_json_and_holds_every_figure():
    rows = [row(str(i), "wrong", 20, False, prediction=None, answer="7", cuts={"16": 1}) for i in range(3)]
    found = json.loads(json.dumps(result(*rows, max_new_tokens=20).summary(), allow_nan=False))
    assert found["tokens"]["correct"] == {"count": 0, "mean": None, "median": None, "p90": None}
    assert found["accuracy_at"] == {"16": 0, "20": 0}
    assert found["pass_at"]["1"][0] == found["accuracy"] == 0
    assert found["accuracy_of_finished"] is None
    assert found["truncated"] == found["without_answer"] == 1


SAMPLE = {"sample": 0, "problem": "1+1?", "answer": "2", "prediction": "2"}


def test_samples_that_two_processes_have_both_written_are_counted_once(tmp_path, capsys):
    journal = Journal(tmp_path / "toy.jsonl")
    journal.append({"header": {"model": "abc"}})
    second = SAMPLE | {"sample": 1}
    rows = [row("a", "correct", **SAMPLE), row("a", "wrong", **second), row("b", "wrong", **SAMPLE)]
    for one in [*rows, rows[0], rows[0], rows[2]]:
        journal.append(one)
    found = read_result(journal.path)
    assert list(found.rows) == rows and found.accuracy == 0.25 and found.num_samples == 1
    said = capsys.readouterr().err
    assert f"{journal.path}: 3 of its rows (the first: line 5) have the question and sample of" in said


@pytest.mark.parametrize("name", [*row("a", "correct", **SAMPLE)])
def test_a_sample_without_one_of_its_fields_is_named(tmp_path, name):
    whole = row("a", "correct", **SAMPLE)
    (tmp_path / "toy.jsonl").write_text(
        json.dumps(whole) + "\n" + json.dumps({key: whole[key] for key in whole if key != name}) + "\n"
    )
    with pytest.raises(
        ValueError, match=rf"toy\.jsonl:2 is not a sample: it has no `{name}`; delete that line"
    ):
        read_result(tmp_path / "toy.jsonl")


def test_a_sample_without_an_answer_in_its_text_is_one(tmp_path):
    journal = Journal(tmp_path / "toy.jsonl")
    journal.append(row("a", "wrong", **SAMPLE | {"prediction": None}))
    assert read_result(journal.path).without_answer == 1.0
