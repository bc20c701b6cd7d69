"""Mixtures of long traces and short solutions: the same problems in every arm, nested sizes, exact shares."""

import json
from pathlib import Path

import pytest

from kit.data.chat import ChatFormat
from kit.data.documents import load_documents
from kit.data.responses import pick_response
from kit.data.toy import make_pairs, make_tokenizer, num_tokens
from kit.data.traces import read_traces
from kit.evaluate.benchmarks import BENCHMARKS
from kit.evaluate.reflection_and_loops import reflects
from kit.grade.verdict import grade
from kit.journal import write_rows

SHORT = "so it is \\boxed{{{}}}"
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


@pytest.fixture
def chat():
    return ChatFormat(make_tokenizer(), instruction="")


def responses(documents, chat):
    return [chat.decode(document.ids[document.prompt_len :].tolist()) for document in documents]


def test_a_long_trace_that_no_row_holds_leaves_its_problem_with_the_short_one_and_is_counted(tmp_path, chat):
    rows = make_pairs(40, seed=0)
    write_rows(tmp_path / "pairs.jsonl", rows)
    length = max(num_tokens(row["problem"], row["solution"]) for row in rows)
    options = {"row_tokens": length, "cache_dir": str(tmp_path / "cache"), "num_traces": 30}
    options |= {"long_share": 0.5, "shuffle": False}
    fits = [num_tokens(row["problem"], row["trace"]) <= length for row in rows[:30]]
    kept = [
        row["trace"] if place % 2 and fits[place] else row["solution"] for place, row in enumerate(rows[:30])
    ]
    num_shortened = fits[1::2].count(False)
    assert 0 < num_shortened < 15
    for _ in range(2):  # the second time from the cache
        documents, counts = load_documents(str(tmp_path / "pairs.jsonl"), chat, **options)
        assert responses(documents, chat) == kept
        said = f"{num_shortened} have a long trace that no row holds, and keep their short one"
        assert said in str(counts)
        assert not any(count for why, count in counts.dropped.items() if "longer than" in why)
    with pytest.raises(ValueError, match=r"no trace of .* survives"):  # nor does the short one fit
        load_documents(str(tmp_path / "pairs.jsonl"), chat, row_tokens=10, long_share=0.5)


@pytest.mark.parametrize("shuffle", [True, False])
def test_short_traces_of_a_file_are_those_of_the_same_problems_with_the_same_roles(source, tmp_path, shuffle):
    rows = make_pairs(60, seed=0)
    own = [row | {"trace": SHORT.format(row["answer"])} for row in rows]
    if shuffle:  # a wrong one is no more kept than a wrong long one
        own[7]["trace"] = SHORT.format(-1)
    write_rows(tmp_path / "own.jsonl", own[::-1])
    options = {"shuffle": shuffle, "long_share": 0.25}
    made, counts = read_traces(source, limit=40, short_traces=str(tmp_path / "own.jsonl"), **options)
    plain = read_traces(source, limit=40, **options)[0]
    lost = [trace.problem for trace in plain if shuffle and trace.problem == rows[7]["problem"]]
    assert counts.dropped["have no short trace"] == len(lost)
    assert [trace.problem for trace in made] == [t.problem for t in plain if t.problem not in lost]
    assert sum(map(is_long, made)) == len(made) // 4
    golds = {row["problem"]: row["answer"] for row in rows}
    for trace in made:
        short = trace.short if is_long(trace) else trace
        assert (short.problem, short.response) == (trace.problem, SHORT.format(golds[trace.problem]))


def test_a_problem_without_one_gets_the_next_short_trace_of_a_problem_that_has_no_long_one(source, tmp_path):
    others = make_pairs(50, seed=9, exclude={row["problem"] for row in make_pairs(60, seed=0)})
    rows = [*make_pairs(60, seed=0)[:4], *others]
    write_rows(tmp_path / "own.jsonl", [row | {"trace": SHORT.format(row["answer"])} for row in rows])
    options = {"short_traces": str(tmp_path / "own.jsonl"), "long_share": 0.25}
    made, counts = read_traces(source, **options)
    problems = [trace.problem for trace in made]
    assert len(made) == 54 and counts.dropped["have no short trace"] == 6
    assert counts.noted["have a short trace of another problem beside their long one"] == 50
    assert len(set(problems)) == 54 and sum(map(is_long, made)) == 54 // 4
    assert {row["problem"] for row in others} & {*problems}
    assert read_traces(source, limit=20, **options)[0] == made[:20]  # nested


def test_more_of_the_order_is_read_if_problems_at_its_beginning_have_no_short_trace(tmp_path, chat):
    source = str(tmp_path / "long.jsonl")
    write_rows(Path(source), make_pairs(200, seed=0))
    *_, first, second = read_traces(source)[0]  # the last two of the order
    answers = {row["problem"]: row["answer"] for row in make_pairs(200, seed=0)}
    rows = [{"problem": x.problem, "answer": answers[x.problem]} for x in (first, second)]
    write_rows(tmp_path / "own.jsonl", [row | {"trace": SHORT.format(row["answer"])} for row in rows])
    options = {"short_traces": str(tmp_path / "own.jsonl"), "long_share": 0.5, "row_tokens": 512}
    (document,), _ = load_documents(source, chat, num_traces=1, **options)
    everything, counts = load_documents(source, chat, **options)
    assert len(everything) == 2 and counts.dropped["have no short trace"] == 198
    assert document.ids.tolist() == everything[0].ids.tolist()


def test_bad_rows_of_the_short_file_are_named_and_a_mixture_that_cannot_be_is_refused(source, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"problem": "1+1?"}\n')
    options = {"short_traces": str(tmp_path / "own.jsonl"), "long_share": 0.5}
    with pytest.raises(ValueError, match=r"own\.jsonl:1: no field trace or solution"):
        read_traces(source, **options)
    traces, counts = read_traces(source, max_bad_rows=1, **options)
    assert traces == [] and counts.dropped["are malformed"] == 1 and "own.jsonl:1" in counts.bad_rows[0]
    message = r"short_traces is own.jsonl but long_share is 1, so .*--long_share 0.25"
    with pytest.raises(ValueError, match=message):
        read_traces(source, short_traces="own.jsonl")
