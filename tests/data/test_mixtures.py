"""Mixtures of long traces and short solutions: the same problems in every arm, nested sizes, exact shares."""

import json

import pytest

from kit.data.toy import make_pairs, write_rows
from kit.data.traces import pick_response, read_traces
from kit.evaluate.benchmarks import BENCHMARKS
from kit.evaluate.reflection_and_loops import reflects
from kit.grade.verdict import grade

SHARES = {1.0: 40, 0.75: 30, 0.5: 20, 0.25: 10, 0.0: 0}  # -> long traces of 40


@pytest.fixture
def source(tmp_path):
    write_rows(tmp_path / "pairs.jsonl", make_pairs(60, seed=0))
    return str(tmp_path / "pairs.jsonl")


def is_long(trace):
    return trace.response.startswith("<think>")


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_problems_are_the_same_whatever_the_share_and_the_sizes_are_nested(source, shuffle):
    made = {share: read_traces(source, limit=40, shuffle=shuffle, long_share=share)[0] for share in SHARES}
    problems = [trace.problem for trace in made[1.0]]
    assert all([trace.problem for trace in traces] == problems for traces in made.values())
    for share, traces in made.items():
        assert sum(map(is_long, traces)) == SHARES[share]
        assert any(reflects(trace.response) for trace in traces) == bool(SHARES[share])
        assert read_traces(source, limit=20, shuffle=shuffle, long_share=share)[0] == traces[:20]
    # spread, so that every subset has its share
    assert list(map(is_long, made[0.5]))[:6] == [False, True] * 3


def test_without_shuffling_the_order_is_the_files_which_is_read_no_further_than_needed(source, tmp_path):
    rows = make_pairs(60, seed=0)
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write("not JSON\n")
    traces, drop_counts = read_traces(source, limit=7, shuffle=False)
    assert [trace.problem for trace in traces] == [row["problem"] for row in rows[:7]]
    assert drop_counts.kept == 7 and not drop_counts.bad_rows
    with pytest.raises(ValueError, match="not JSON"):
        read_traces(source, shuffle=False)


def test_the_solution_comes_from_openr1s_own_column_and_a_row_without_one_is_malformed(tmp_path):
    rows = [
        {
            "problem": f"{n}+1?",
            "solution": f"short {n}",
            "answer": str(n + 1),
            "generations": [f"<think>x</think>\\boxed{{{n + 1}}}"],
            "correctness_math_verify": [True],
            "is_reasoning_complete": [True],
        }
        for n in range(4)
    ]
    rows[3]["correctness_math_verify"] = [False]  # its problem is in no arm
    path = tmp_path / "openr1.jsonl"
    write_rows(path, rows)
    half, drop_counts = read_traces(str(path), shuffle=False, long_share=0.5)
    assert [trace.response.split()[0] for trace in half] == ["short", "<think>x</think>\\boxed{2}", "short"]
    assert drop_counts.dropped.total() == 1
    del rows[1]["solution"]
    write_rows(path, rows)
    assert len(read_traces(str(path))[0]) == 3  # long traces alone need none
    with pytest.raises(ValueError, match="no field solution"):
        read_traces(str(path), long_share=0.5)
    with pytest.raises(ValueError, match=r"long_share is 1\.5 but must be in 0\.\.1"):
        read_traces(str(path), long_share=1.5)


def test_every_toy_trace_and_solution_is_right_and_none_of_its_problems_is_measured():
    held_out = {question.problem for question in BENCHMARKS["toy"].read().questions}
    rows = make_pairs(200, seed=3, exclude=held_out)
    assert rows[:50] == make_pairs(50, seed=3, exclude=held_out) != make_pairs(50, seed=4, exclude=held_out)
    assert len({row["problem"] for row in rows}) == 200
    for row in rows:
        assert row["problem"] not in held_out
        total = sum(int(word) for word in row["problem"].rstrip("?").replace("-", "+-").split("+"))
        assert row["answer"] == str(total) and pick_response(row)[0] == row["trace"]
        assert grade(str(total), row["solution"]).verdict == "correct"
    assert json.loads(json.dumps(rows)) == rows
