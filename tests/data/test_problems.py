import json

import pytest
from conftest import real_data

from kit.data.problems import Question, read_prompts
from kit.data.rows import BadRows


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_the_shapes_that_prompts_come_in_are_all_read(tmp_path):
    verl = {
        "prompt": [{"role": "user", "content": "x"}],
        "reward_model": {"ground_truth": "6"},
        "extra_info": {"question": "3+3?"},
    }
    rows = [{"problem": "1+1?", "answer": "2"}, {"question": "2+2?", "gt_answer": 4}, verl]
    found = read_prompts(write(tmp_path / "prompts.jsonl", rows), BadRows(0))
    assert [(q.problem, q.answer) for q in found] == [("1+1?", "2"), ("2+2?", "4"), ("3+3?", "6")]
    assert len({q.id for q in found}) == 3


def test_rows_without_problem_or_gold_answer_are_named_and_counted_and_stop_the_run_when_many(tmp_path):
    rows = [
        {"problem": "1+1?", "answer": "2"},
        {"problem": "2+2?", "answer": " "},
        {"problem": "3+3?"},
        {"answer": "1"},
    ]
    source = write(tmp_path / "prompts.jsonl", rows)
    bad = BadRows(3)
    assert len(read_prompts(source, bad)) == 1
    assert "prompts.jsonl:2: field answer is empty" in bad.found[0]
    assert (
        "prompts.jsonl:3: no field answer or gt_answer or " in bad.found[1]
        and "(fields: problem)" in bad.found[1]
    )
    assert len(bad.found) == 3
    with pytest.raises(ValueError, match=r"2 bad rows but max_bad_rows is 1"):
        read_prompts(source, BadRows(1))


def test_a_file_of_another_shape_says_what_it_has(tmp_path):
    source = write(tmp_path / "prompts.jsonl", [{"text": "abc"}])
    with pytest.raises(ValueError, match=r"no field problem or question or .*\(fields: text\)"):
        read_prompts(source, BadRows(0))


def test_a_file_without_answers_is_refused_with_a_row_that_would_do_and_what_its_first_row_lacks(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"problem": "2+3?"}, {"problem": "1?"}])
    with pytest.raises(
        ValueError, match=r'such as \{"problem": .*; the first bad row: .*:1: .*answer'
    ) as refused:
        read_prompts(source, BadRows(5))
    assert "levels" not in str(refused.value)


@pytest.mark.parametrize("levels", ["4", "4-1", "easy"])
def test_malformed_levels_are_refused(levels, tmp_path):
    source = write(tmp_path / "p.jsonl", [{"problem": "1", "answer": "1"}])
    with pytest.raises(ValueError, match=r"levels is '.*' but must be two numbers such as 1-4"):
        read_prompts(source, BadRows(0), levels=levels)


def test_levels_are_kept_from_text_and_numbers_and_a_row_without_one_is_bad(tmp_path):
    levels = ["Level 1", 4, 5.0, "Level 5", None]
    rows = [{"problem": f"{i}", "answer": "1", "level": level} for i, level in enumerate(levels)]
    bad = BadRows(1)
    found = read_prompts(write(tmp_path / "p.jsonl", rows), bad, levels="1-4")
    assert [question.problem for question in found] == ["0", "1"]
    assert "field level is null" in bad.found[0]
    with pytest.raises(ValueError, match="has 5 rows but no prompt of levels 2-3"):
        read_prompts(write(tmp_path / "p.jsonl", rows), BadRows(1), levels="2-3")


def test_real_math_prompts_by_level():
    source = str(real_data("math_train_prompts.json"))
    bad = BadRows(4)  # four rows have no answer
    assert len(read_prompts(source, bad)) == 7_474 - len(bad.found) == 7_470
    assert len(read_prompts(source, BadRows(4), levels="1-4")) == 564 + 1_345 + 1_584 + 1_681 - 2


def test_a_question_is_named_by_its_words_whatever_the_space_around_and_between_them():
    one, other = (
        Question.of({"problem": " 1 + 1?\n", "answer": 2}),
        Question.of({"question": "1 +\n1?", "gt_answer": " 2 "}),
    )
    assert one.id == other.id and one.answer == other.answer == "2"
    assert one.problem == "1 + 1?" and other.problem == "1 +\n1?"
    unseen = Question.of({"problem": "\ufeff1\u00a0+ 1\u200b?", "answer": 2})
    assert unseen.id == one.id != Question.of({"problem": "1 +1?", "answer": 2}).id


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": None, "question": 3 * [1]}, "field question is a list, not text"),
        ({"problem": "a\0b"}, "field problem contains a NUL byte"),
        ({"extra_info": {"question": " "}}, "field extra_info.question is empty"),
        (
            {"extra_info": "x"},
            r"no field problem or question or extra_info.question \(fields: extra_info, answer\)",
        ),
        ({"problem": True}, "field problem is a bool, not text"),
        ({"problem": None}, "field problem is null"),
        ({"problem": float("nan")}, "field problem is nan, which is not a number"),
        ({}, r"\(fields: none\)"),
    ],
)
def test_a_row_without_a_usable_problem_says_which_field_and_what_is_wrong(row, message):
    with pytest.raises(ValueError, match=message):
        Question.of(row | {"answer": "1"} if row else row)
