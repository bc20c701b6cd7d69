"""Small files in the layouts of well-known data sets: what is recognised, kept, dropped, refused."""

import re
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from kit.data import formats
from kit.data.formats import EMPTY, GIVEN, NO_COMPLETE, NO_TURNS, NOT_TEXT, ORDER, parse_columns
from kit.data.responses import NO_CORRECT, UNCHECKED
from kit.data.traces import read_traces
from kit.journal import write_rows

THOUGHT = "<think>\n1+1 is 2.\n</think>\n\n\\boxed{2}"
SYSTEM = "You add."
# format -> (rows as their data set has them, [turns that are read of each])
USUAL = [("user", "1+1?"), ("assistant", THOUGHT)]
LONG = [*USUAL, ("user", "And 2+2?"), ("assistant", "\\boxed{4}")]
SHARE = {"user": "human", "assistant": "gpt", "system": "system"}


def messages(turns):
    return [{"role": role, "content": text} for role, text in turns]


def share(turns):
    return [{"from": SHARE[role], "value": text} for role, text in turns]


THINKING = {"thinking_trajectories": [" 1+1 is 2.\n"], "attempt": "\\boxed{2}\n"}
DEEPSEEK = {"deepseek_thinking_trajectory": "1+1 is 2.", "deepseek_attempt": "\\boxed{2}"}
GEMINI = {"gemini_thinking_trajectory": "Two.", "gemini_attempt": "2", "gemini_grade": "No"}
S1K = {"solution": "2", "question": "1+1?", "cot_type": "math", "source_type": "x", "metadata": "{}"}
OPEN = {"problem": "1+1?", "deepseek_reasoning": "1+1 is 2.", "deepseek_solution": "\\boxed{2}"}
FORMATS = {
    "s1K": [(S1K | {"cot": None} | THINKING, USUAL)],
    "s1K-1.1": [(S1K | GEMINI | DEEPSEEK | {"deepseek_grade": "Yes"}, USUAL)],
    "OpenThoughts": [(OPEN | {"ground_truth_solution": "2", "domain": "math", "test_cases": None}, USUAL)],
    "messages": [
        ({"messages": messages([("system", SYSTEM), *USUAL])}, [("system", SYSTEM), *USUAL]),
        ({"messages": messages(LONG)}, LONG),
    ],
    "ShareGPT": [
        ({"system": SYSTEM, "conversations": share(USUAL)}, [("system", SYSTEM), *USUAL]),
        ({"system": "", "conversations": share(LONG)}, LONG),
    ],
    "Alpaca": [
        ({"instruction": "1+1?", "input": "", "output": THOUGHT}, USUAL),
        (
            {"instruction": "Add.", "input": "1 1", "output": "2"},
            [("user", "Add.\n\n1 1"), ("assistant", "2")],
        ),
    ],
    "prompt, completion": [({"prompt": "1+1?", "completion": THOUGHT}, USUAL)],
    "LIMO": [({"question": "1+1?", "solution": THOUGHT, "answer": "2"}, USUAL)],
    "question, trace": [({"question": "1+1?", "trace": THOUGHT, "answer": "2", "messages": []}, USUAL)],
}


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write_rows(path, rows)
    return str(path)


def read(path, rows, **options):
    return read_traces(write(path, rows), shuffle=False, **options)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_recognised_by_its_columns_and_named(tmp_path, name, suffix):
    rows, expected = zip(*FORMATS[name], strict=True)
    traces, counts = read(tmp_path / f"a{suffix}", rows)
    # the second row of some asks the same first question, and more after it
    assert [trace.turns for trace in traces] == list(expected)
    assert counts.formats == {name: len(rows)} and str(counts).endswith(f". Format: {name}")
    checked = name in ("LIMO", "question, trace")
    assert counts.noted == ({} if checked else {UNCHECKED: len(rows)}) and not counts.dropped


def test_a_null_in_the_first_row_is_a_bad_row_and_hides_no_format(tmp_path):
    rows = [
        {"problem": "x", "trace": None, "answer": "5"},
        {"problem": "2+3?", "trace": "\\boxed{5}", "answer": "5"},
    ]
    traces, counts = read(tmp_path / "a.jsonl", rows, max_bad_rows=1)
    assert [trace.problem for trace in traces] == ["2+3?"] and len(counts.bad_rows) == 1


def test_the_formats_of_a_mixed_file_are_counted_and_a_problem_is_kept_once_whatever_its_format(tmp_path):
    rows = [row for pairs in FORMATS.values() for row, _ in pairs]
    traces, counts = read(tmp_path / "a.jsonl", rows)
    assert [trace.asked for trace in traces] == ["1+1?", f"1+1?\n{THOUGHT}\nAnd 2+2?", "Add.\n\n1 1"]
    assert counts.dropped == {"repeat a problem": len(rows) - 3}
    assert counts.formats == Counter({name: len(pairs) for name, pairs in FORMATS.items()})
    assert "Format: 2 messages; 2 ShareGPT; 2 Alpaca; 1 s1K; " in str(counts)


def test_an_answer_beside_a_conversation_of_one_turn_is_checked(tmp_path):
    rows = [
        {"messages": messages([("user", f"{i}?"), ("assistant", f"\\boxed{{{i}}}")]), "answer": answer}
        for i, answer in enumerate(["0", "5", 2])
    ]
    traces, counts = read(tmp_path / "a.jsonl", rows)
    assert [trace.problem for trace in traces] == ["0?", "2?"] and counts.dropped == {NO_CORRECT: 1}
    assert len(read(tmp_path / "a.jsonl", rows, verify="none")[0]) == 3
    assert UNCHECKED not in read(tmp_path / "a.jsonl", rows, verify="none")[1].noted


@pytest.mark.parametrize(
    ("turns", "why"),
    [
        ([], NO_TURNS),
        ("1+1?", NO_TURNS),
        (["1+1?", "2"], NOT_TEXT),
        (messages([("user", "1?"), ("assistant", " \n")]), EMPTY),
        (messages([("user", "1?"), ("assistant", ""), ("user", "?"), ("assistant", "2")]), EMPTY),
        (messages([("user", ""), ("assistant", "2")]), EMPTY),
        (messages([("user", "1?"), ("assistant", None)]), NOT_TEXT),
        (messages([("user", "1?"), ("assistant", 2)]), NOT_TEXT),
        (messages([("user", [{"type": "text", "text": "1?"}]), ("assistant", "2")]), NOT_TEXT),
        (messages([("assistant", "2"), ("user", "1?")]), ORDER),
        (messages([("assistant", "Hello."), ("user", "1?"), ("assistant", "2")]), ORDER),
        (messages([("user", "1?")]), ORDER),
        (messages([("system", SYSTEM)]), ORDER),
        (messages([("system", " ")]), ORDER),
        (messages([("user", "1?"), ("system", SYSTEM), ("assistant", "2")]), ORDER),
        (messages([("system", SYSTEM), ("system", SYSTEM), ("user", "1?"), ("assistant", "2")]), ORDER),
        (messages([("user", "1?"), ("user", "1?"), ("assistant", "2")]), ORDER),
        (messages([("user", "1?"), ("tool", "2"), ("assistant", "2")]), ORDER),
        ([{"speaker": "user", "text": "1?"}], NOT_TEXT),
        (messages([("user", "1?"), ("assistant", "<think>or")]), NO_COMPLETE),
        (
            messages([("user", "1?"), ("assistant", "<think>or"), ("user", "?"), ("assistant", "2")]),
            NO_COMPLETE,
        ),
    ],
)
def test_a_conversation_that_cannot_be_trained_on_is_dropped_and_its_reason_counted(tmp_path, turns, why):
    good = {"messages": messages(USUAL)}
    traces, counts = read(tmp_path / "a.jsonl", [good, {"messages": turns}])
    assert len(traces) == 1 and counts.dropped == {why: 1} and not counts.bad_rows


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (S1K | THINKING | {"thinking_trajectories": []}, EMPTY),
        (S1K | THINKING | {"thinking_trajectories": [None]}, NOT_TEXT),
        (S1K | THINKING | {"attempt": " "}, EMPTY),
        (OPEN | {"deepseek_reasoning": 7}, NOT_TEXT),
        ({"instruction": ["1+1?"], "input": "", "output": "2"}, NOT_TEXT),
        ({"instruction": "1+1?", "output": ""}, EMPTY),
        ({"prompt": messages(LONG[:3]), "completion": messages(LONG[3:])}, GIVEN),
        ({"prompt": messages(USUAL[:1]), "completion": THOUGHT}, NO_TURNS),
        ({"prompt": "1+1?", "completion": messages(USUAL[1:])}, NOT_TEXT),
    ],
)
def test_a_row_of_another_format_is_dropped_for_the_same_reasons(tmp_path, row, why):
    traces, counts = read(tmp_path / "a.jsonl", [row])
    assert traces == [] and counts.dropped == {why: 1} and not counts.bad_rows


def test_prompt_and_completion_may_be_lists_of_messages(tmp_path):
    turns = [("system", SYSTEM), *USUAL]
    rows = [{"prompt": messages(turns[:2]), "completion": messages(turns[2:])}]
    assert read(tmp_path / "a.jsonl", rows)[0][0].turns == turns


def test_a_turn_with_half_a_surrogate_pair_is_a_malformed_row(tmp_path):
    rows = [{"messages": messages(USUAL)}, {"messages": messages([("user", "\ud800"), ("assistant", "2")])}]
    _, counts = read(tmp_path / "a.jsonl", rows, max_bad_rows=1)
    assert counts.dropped == {"are malformed": 1} and "half a surrogate pair" in counts.bad_rows[0]


@pytest.mark.parametrize(
    ("row", "guess"),
    [
        ({"question": "1+1?", "response": "2"}, "problem=question,trace=response"),
        ({"id": 1, "Question": "1+1?", "model_output": "2"}, "problem=Question,trace=COLUMN"),
        ({"a": "1+1?", "b": "2"}, "problem=COLUMN,trace=COLUMN"),
        ({"question": "1+1?", "answer": "2"}, "problem=question,trace=answer"),
    ],
)
def test_unknown_columns_are_refused_in_one_line_with_the_columns_that_would_help(tmp_path, row, guess):
    with pytest.raises(ValueError) as caught:
        read(tmp_path / "a.jsonl", [row] * 30, max_bad_rows=20)
    said = str(caught.value)
    assert f"a.jsonl has the columns {', '.join(row)}, which" in said and "\n" not in said
    assert f"--columns {guess}, or" in said


def test_rows_of_unknown_columns_below_known_ones_are_bad_rows(tmp_path):
    rows = [FORMATS["LIMO"][0][0], {"question": "1?", "response": "1"}]
    traces, counts = read(tmp_path / "a.jsonl", rows, max_bad_rows=1)
    assert len(traces) == 1 and counts.dropped == {"are malformed": 1}


def test_columns_that_are_named_are_used_alone(tmp_path):
    row = {"q": {"text": "1+1?"}, "r": THOUGHT, "gold": 2, "s": SYSTEM, "solution": "3", "generations": ["3"]}
    columns = "problem=q.text, trace=r,answer=gold,system=s"
    traces, counts = read(tmp_path / "a.jsonl", [row], columns=columns)
    assert traces[0].turns == [("system", SYSTEM), *USUAL] and counts.noted == {}
    assert str(counts).endswith("Format: problem=q.text, trace=r, answer=gold, system=s")
    traces, counts = read(tmp_path / "a.jsonl", [row | {"gold": 3}], columns=columns)
    assert traces == [] and counts.dropped == {NO_CORRECT: 1}
    traces, counts = read(tmp_path / "a.jsonl", [row], columns="problem=q.text,trace=r")
    assert traces[0].turns == USUAL and counts.noted == {UNCHECKED: 1}
    traces, _ = read(tmp_path / "a.jsonl", [{"chat": share(LONG)}], columns="messages=chat")
    assert traces[0].turns == LONG


def test_named_columns_that_the_data_lack_are_refused_with_those_that_it_has(tmp_path):
    row = {"q": "1?", "r": "1"}
    message = (
        r"--columns names response but the first row of .*a.jsonl has the columns q, r; name some of these"
    )
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.jsonl", [row], columns="problem=q,trace=response")


@pytest.mark.parametrize(
    "text",
    [
        "problem",
        "problem=",
        "problem=q",
        "trace=r",
        "problem=q,trace=r,trace=s",
        "problem=q,trace=r,x=y",
        ",",
        "=q",
    ],
)
def test_a_columns_setting_that_cannot_be_is_refused_with_one_that_can(text):
    with pytest.raises(ValueError, match=re.escape(f"columns is {text!r} but must be name=COLUMN")):
        parse_columns(text)
    assert parse_columns("") == {}


def test_the_solutions_of_a_mixture_keep_the_turns_before_them(tmp_path):
    row = {"messages": messages([("system", SYSTEM), *USUAL]), "solution": "2."}
    traces, _ = read(tmp_path / "a.jsonl", [row], long_share=0.5)
    assert [trace.turns[0] for trace in traces] == [("system", SYSTEM)] and traces[0].response == "2."


def test_the_formats_of_the_file_are_those_of_the_table_in_its_docstring():
    named = re.findall(r"^    (\S.*?)  ", formats.__doc__, flags=re.MULTILINE)
    known = [found.name for found in (*formats.THINKING, *formats.CONVERSATIONS) if found.name != "s1K-1.1"]
    assert named == ["OpenR1", "LIMO", *known]
