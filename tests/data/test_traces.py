import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import real_data

from kit.data import documents as data
from kit.data.chat import ChatFormat
from kit.data.documents import load_documents, make_documents, tokenize
from kit.data.formats import NO_COMPLETE
from kit.data.mixtures import TooLong
from kit.data.responses import BY_LLAMA, NO_CORRECT, PADDED, UNUSABLE, Trace, pick_response
from kit.data.toy import make_rows, make_tokenizer
from kit.data.traces import read_traces
from kit.journal import write_rows

GOOD = "<think>1+1=2</think>\\boxed{2}"
BAD = "<think>1+1=3</think>\\boxed{3}"
OPEN = GOOD + "<think>1+1 is \\boxed{2}, or"  # a thought that never closes


@pytest.fixture
def chat():
    return ChatFormat(make_tokenizer(), instruction="")


def openr1(*generations, correct=None, llama=None, complete=None, finish=None, answer="2"):
    """A row in OpenR1-Math-220k's schema."""
    return {
        "problem": "1+1?",
        "answer": answer,
        "generations": list(generations),
        "correctness_math_verify": correct,
        "correctness_llama": llama,
        "is_reasoning_complete": complete,
        "finish_reasons": finish,
    }


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (openr1(BAD, GOOD, correct=[False, True]), (GOOD, "")),
        (openr1(GOOD, GOOD + " ", correct=[True, True], complete=[False, True]), (GOOD + " ", "")),
        (openr1(GOOD, GOOD + " ", correct=[True, True], finish=["length", "stop"]), (GOOD + " ", "")),
        (openr1(BAD, GOOD), (GOOD, "")),  # no flags: the grader decides
        (openr1(BAD, GOOD, correct=[None, None]), (GOOD, "")),
        (openr1(BAD, correct=[True]), (BAD, "")),  # the data set's flag is believed
        (openr1(GOOD, correct=[False]), (None, "have no correct trace")),
        (openr1(GOOD, correct=[True], complete=[False]), (None, "have no complete trace")),
        (openr1(OPEN, GOOD, correct=[True, True]), (GOOD, "")),
        (openr1(OPEN, correct=[True], complete=[True]), (None, "have no complete trace")),
        ({"problem": "1+1?", "solution": GOOD, "answer": 2}, (GOOD, "")),
        ({"problem": "1+1?", "trace": OPEN, "answer": 2}, (None, "have no complete trace")),
        ({"problem": "1+1?", "trace": BAD, "solution": GOOD, "answer": "2"}, (None, "have no correct trace")),
    ],
)
def test_one_correct_complete_response_is_picked(row, expected):
    assert pick_response(row) == expected


@pytest.mark.parametrize("verify", ["none", False])
def test_without_verification_the_first_complete_response_is_taken(verify):
    assert pick_response(openr1(BAD, GOOD, correct=[False, True]), verify=verify) == (BAD, "")
    row = openr1(GOOD, BAD, correct=[True, False], complete=[False, True])
    assert pick_response(row, verify=verify) == (BAD, "")
    assert pick_response({"problem": "x", "solution": "s"}, verify=verify) == ("s", "")
    assert pick_response({"problem": "x", "solution": OPEN}, verify=verify) == (
        None,
        "have no complete trace",
    )


ONLY_LLAMA = (  # rows of which Llama accepted the second trace, which neither Math-Verify nor our grader did
    openr1(BAD, BAD + " ", correct=[False, False], llama=[False, True]),
    openr1(BAD, BAD + " ", correct=[None, None], llama=[False, True]),
    openr1(BAD, BAD + " ", correct=None, llama=[None, True]),
    openr1(BAD, BAD + " ", correct=[], llama=["False", "True"]),
)


@pytest.mark.parametrize("row", ONLY_LLAMA)
def test_a_trace_that_llama_alone_accepted_counts_if_it_may_and_is_named_either_way(row):
    assert pick_response(row) == pick_response(row, verify=True) == (BAD + " ", BY_LLAMA)
    assert pick_response(row, verify="math") == (None, BY_LLAMA)
    assert pick_response(row | {"is_reasoning_complete": [True, False]}) == (None, NO_CORRECT)
    assert pick_response(row | {"correctness_llama": None}) == (None, NO_CORRECT)


def test_what_math_verify_accepted_goes_before_what_llama_accepted():
    row = openr1(BAD, GOOD, correct=[False, True], llama=[True, False])
    assert pick_response(row) == pick_response(row, verify="math") == (GOOD, "")
    row = openr1(BAD, GOOD, correct=[None, None], llama=[True, False])  # our grader stands in for Math-Verify
    assert pick_response(row) == (GOOD, "")


def test_another_word_for_verify_is_refused_with_the_three_before_any_row_is_read(tmp_path):
    for verify in ("yes", "", "LLAMA", None, 2):
        with pytest.raises(ValueError, match=f"verify is {verify!r} but must be math .*, llama .* or none"):
            read_traces(str(tmp_path / "there is no such file.jsonl"), verify=verify)
        with pytest.raises(ValueError, match="must be math"):
            pick_response({"trace": GOOD, "answer": "2"}, verify=verify)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"correct": ["False", "true"]}, (GOOD, "")),
        ({"correct": ["FALSE", " True "]}, (GOOD, "")),
        ({"correct": [0, 1]}, (GOOD, "")),
        ({"correct": ["0", "1"]}, (GOOD, "")),
        ({"correct": [0.0, 1.0]}, (GOOD, "")),
        ({"correct": ["false", "0"]}, (None, NO_CORRECT)),
        ({"correct": ["None", ""]}, (GOOD, "")),  # not known: our grader decides
        ({"correct": [True, True], "complete": ["False", "True"]}, (GOOD, "")),
        ({"correct": [True, True], "complete": [0, "0"]}, (None, NO_COMPLETE)),
        ({"correct": [True, True], "finish": ["LENGTH", "Stop"]}, (GOOD, "")),
    ],
)
def test_a_flag_written_as_text_or_number_is_read_as_what_it_says(flags, expected):
    assert pick_response(openr1(BAD, GOOD, **flags)) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (openr1(BAD, GOOD, correct=[False]), (GOOD, "")),  # the second is not known: our grader decides
        (openr1(BAD, BAD, correct=[False]), (None, NO_CORRECT)),
        (openr1(BAD, GOOD, correct=[]), (GOOD, "")),
        (openr1(BAD, GOOD, correct=[False, True], complete=[True], finish=["stop"]), (GOOD, "")),
        (openr1(BAD, GOOD, correct=[True, True], complete=[False], finish=[]), (GOOD, "")),
        (openr1(BAD, GOOD, correct=[True, True], finish=["length"]), (GOOD, "")),
        (openr1(BAD, BAD + " ", correct=[False, False], llama=[True]), (BAD, BY_LLAMA)),
    ],
)
def test_lists_shorter_than_generations_leave_the_others_unknown(row, expected):
    assert pick_response(row) == expected


@pytest.mark.parametrize("unusable", ["", " \n", None, [GOOD], "a\0b", "\ud800"])
def test_a_generation_without_usable_text_costs_itself_only_and_is_counted(tmp_path, unusable):
    row = openr1(unusable, BAD, GOOD, correct=[True, False, True], complete=[True, True, True])
    assert pick_response(row) == (GOOD, "")
    assert pick_response(row | {"correctness_math_verify": None}) == (GOOD, "")
    assert pick_response(row, verify="none") == (BAD, "")
    assert pick_response(row | {"is_reasoning_complete": [True, True, False]}) == (None, NO_CORRECT)
    write_rows(tmp_path / "a.jsonl", [row, openr1(GOOD, correct=[True]) | {"problem": "2?"}])
    traces, counts = read_traces(str(tmp_path / "a.jsonl"))
    assert len(traces) == 2 and counts.noted == Counter({UNUSABLE: 1}) and not counts.bad_rows


def test_what_llama_decided_and_which_lists_were_short_stands_in_the_drop_statistics(tmp_path):
    rows = [
        openr1(GOOD, BAD, correct=[True, False], complete=[True, True]),
        *ONLY_LLAMA,  # the last has an empty list
        openr1(BAD, GOOD, correct=[False, True], llama=[]),
        openr1(BAD, GOOD, correct=[False, False], complete=[True]),
        {"problem": "x", "trace": GOOD, "answer": "2"},
    ]
    write_rows(tmp_path / "a.jsonl", [row | {"problem": f"{i}?"} for i, row in enumerate(rows)])

    traces, counts = read_traces(str(tmp_path / "a.jsonl"))
    assert len(traces) == 7 and counts.dropped == {NO_CORRECT: 1} and not counts.bad_rows
    assert counts.noted == {BY_LLAMA: 4, PADDED: 3}
    assert str(counts) == (
        f"7 traces kept, 1 dropped: 1 {NO_CORRECT}. Of the rows read, 4 {BY_LLAMA}; 3 {PADDED}. "
        "Format: 7 OpenR1; 1 problem, trace"
    )
    traces, counts = read_traces(str(tmp_path / "a.jsonl"), verify="math")
    assert len(traces) == 3 and counts.dropped == {BY_LLAMA: 4, NO_CORRECT: 1}
    assert f". Of the rows read, 3 {PADDED}. Format: " in str(counts)


def test_who_decides_changes_the_documents_though_they_share_a_cache(tmp_path, chat):
    rows = [
        openr1(BAD, GOOD, correct=[False, True]),
        openr1(BAD, BAD + ",", correct=[False, False], llama=[False, True]),
    ]
    write_rows(tmp_path / "a.jsonl", [row | {"problem": f"{i}+1?"} for i, row in enumerate(rows)])

    def responses(verify):
        options = {
            "row_tokens": 200,
            "verify": verify,
            "shuffle": False,
            "cache_dir": str(tmp_path / "cache"),
        }
        documents, _ = load_documents(str(tmp_path / "a.jsonl"), chat, **options)
        return [chat.decode(document.ids[document.prompt_len :].tolist()) for document in documents]

    for _ in range(2):  # the second time from the cache
        assert responses("math") == [GOOD]
        assert responses("llama") == [GOOD, BAD + ","]
        assert responses("none") == [BAD, BAD]
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "x"}, "no field trace or solution"),
        ({"problem": "x", "solution": 3 * [1]}, "field solution is a list, not text"),
        ({"problem": "x", "solution": "  "}, "field solution is empty"),
        ({"problem": "x", "solution": "a\0b", "answer": "1"}, "NUL byte"),
        ({"problem": "x", "solution": "\ud800", "answer": "1"}, "surrogate"),
        ({"problem": "x", "solution": "s"}, "no field answer"),
        (openr1(GOOD, correct=[True, False]), "correctness_math_verify has 2 entries but generations has 1"),
        (openr1(GOOD, complete="yes"), "is_reasoning_complete has a str"),
        (openr1(GOOD, complete=["yes"]), r"is_reasoning_complete\[0\] is 'yes', which says neither"),
        (openr1(BAD, GOOD, correct=[False, 0.5]), r"correctness_math_verify\[1\] is 0.5, which says neither"),
        (openr1(GOOD, llama=[[True]]), r"correctness_llama\[0\] is \[True\], which says neither"),
        (openr1("", correct=[True]), r"generations\[0\] is empty"),
        (openr1(None, " ", 3 * [1]), r"generations\[0\] is null"),
        (openr1(), "an empty list"),
        ({"generations": "text"}, "generations is a str"),
    ],
)
def test_a_malformed_row_says_which_field_and_what_is_wrong(row, message):
    with pytest.raises(ValueError, match=message):
        pick_response(row)


def test_bad_rows_are_named_with_file_and_line_and_too_many_stop_the_run(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"problem": f"{i}?", "solution": GOOD, "answer": "2"}) for i in range(3)]
    broken = ['{"problem"', '{"problem": "x"}', '{"problem": "", "solution": "s"}']
    path.write_text("\n".join([lines[0], *broken[:2], lines[1], broken[2], lines[2]]))
    traces, drop_counts = read_traces(str(path), max_bad_rows=3)
    assert len(traces) == 3
    places = [entry.split(": ")[0] for entry in drop_counts.bad_rows]
    assert places == [f"{path}:{number}" for number in (2, 3, 5)]
    assert drop_counts.dropped["are malformed"] == 3
    message = r"3 bad rows but max_bad_rows is 2[\s\S]*rows.jsonl:5: field problem is empty"
    with pytest.raises(ValueError, match=message):
        read_traces(str(path), max_bad_rows=2)


def test_a_problem_that_stands_twice_is_kept_once(tmp_path):
    write_rows(tmp_path / "a.jsonl", make_rows("short", 5, seed=0) * 2)
    traces, drop_counts = read_traces(str(tmp_path / "a.jsonl"))
    assert len(traces) == 5
    assert drop_counts.dropped == Counter({"repeat a problem": 5})


def test_the_same_problem_in_other_white_space_is_kept_once(tmp_path):
    spaced = ["1 + 1 =?", "1 +  1 =?", " 1\t+\n1 =?\r\n", "1\u00a0+\u20031 =?", "\ufeff1 + 1\u200b =?"]
    others = ["1+1=?", "1 + 11 =?"]  # space between words is not nothing: 1 1/2 is not 11/2
    rows = [{"problem": problem, "trace": GOOD, "answer": "2"} for problem in spaced + others]
    write_rows(tmp_path / "a.jsonl", rows)
    traces, counts = read_traces(str(tmp_path / "a.jsonl"), shuffle=False)
    assert [trace.problem for trace in traces] == [spaced[0], *others]
    assert counts.dropped == {"repeat a problem": 4}


def test_subsets_are_nested_whatever_size_order_or_memory_limit(tmp_path, chat):
    rows = make_rows("long", 300, seed=0)
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "b.jsonl", rows[::-1])

    def problems(name, n, seed=0):
        documents, _ = load_documents(str(tmp_path / name), chat, row_tokens=200, num_traces=n, seed=seed)
        return [tuple(document.ids.tolist()) for document in documents]

    everything = problems("a.jsonl", 0)
    # 8 and 16 are read under a limit, 0 is not; many traces are too long, and all skip the same ones
    for n in (1, 8, 16, 128):
        assert problems("a.jsonl", n) == everything[:n]
    assert problems("b.jsonl", 16) == everything[:16]
    assert problems("a.jsonl", 16, seed=1) != everything[:16]
    assert len(everything) < 300


def test_a_file_that_is_read_again_because_its_traces_are_long_says_so(tmp_path, chat, capsys):
    write_rows(tmp_path / "a.jsonl", make_rows("long", 900, seed=0))
    load_documents(str(tmp_path / "a.jsonl"), chat, row_tokens=40, num_traces=8)
    assert re.search(r"\d of the first 73 traces can be used; reading more", capsys.readouterr().out)


def test_if_most_traces_are_too_long_the_order_is_searched_to_its_end(tmp_path, chat):
    write_rows(tmp_path / "a.jsonl", make_rows("long", 900, seed=0))
    options = {"row_tokens": 40}
    everything, _ = load_documents(str(tmp_path / "a.jsonl"), chat, **options)
    few = len(everything) - 1
    assert few < 90  # so that the first look, at few + few // 8 + 64 traces, cannot be enough
    some, drop_counts = load_documents(str(tmp_path / "a.jsonl"), chat, num_traces=few, **options)
    assert [d.ids.tolist() for d in some] == [d.ids.tolist() for d in everything[:few]]
    assert drop_counts.kept + drop_counts.dropped.total() == 900


def test_a_trace_of_exactly_row_tokens_is_kept(tmp_path, chat):
    write_rows(tmp_path / "a.jsonl", make_rows("long", 9, seed=0))
    longest = max(map(len, load_documents(str(tmp_path / "a.jsonl"), chat, row_tokens=1024)[0]))
    assert load_documents(str(tmp_path / "a.jsonl"), chat, row_tokens=longest)[1].kept == 9
    assert load_documents(str(tmp_path / "a.jsonl"), chat, row_tokens=longest - 1)[1].kept < 9


def test_what_is_too_long_is_counted_and_never_cut(tmp_path, chat):
    write_rows(tmp_path / "a.jsonl", make_rows("long", 60, seed=0))
    documents, drop_counts = load_documents(str(tmp_path / "a.jsonl"), chat, row_tokens=100)
    kept, dropped = len(documents), drop_counts.dropped["are longer than 100 tokens"]
    assert 0 < dropped < 60
    assert kept + dropped == 60 == drop_counts.kept + drop_counts.dropped.total()
    assert all(len(document) <= 100 for document in documents)
    assert all(document.ids[-1] == chat.tokenizer.eos_token_id for document in documents)
    said = f"{kept} traces kept, {dropped} dropped: {dropped} are longer than 100 tokens"
    assert str(drop_counts) == f"{said}. Format: problem, trace"


def test_every_row_is_accounted_for_when_a_subset_is_taken(tmp_path, chat):
    write_rows(tmp_path / "a.jsonl", make_rows("long", 200, seed=0))
    _, drop_counts = load_documents(str(tmp_path / "a.jsonl"), chat, row_tokens=120, num_traces=20)
    assert drop_counts.kept == 20
    assert drop_counts.kept + drop_counts.dropped.total() == 200


def test_a_number_of_traces_means_up_to_so_many_and_the_counts_say_how_many_there_were(tmp_path, chat):
    write_rows(tmp_path / "a.jsonl", make_rows("long", 20, seed=0))
    everything, _ = load_documents(str(tmp_path / "a.jsonl"), chat, row_tokens=1024)
    for wanted in (21, 30, 220_000):
        found, counts = load_documents(str(tmp_path / "a.jsonl"), chat, row_tokens=1024, num_traces=wanted)
        assert [document.ids.tolist() for document in found] == [d.ids.tolist() for d in everything]
        said = f"20 traces kept ({wanted:,} were asked for, but no more qualify), 0 dropped"
        assert str(counts) == f"{said}. Format: problem, trace"
    for wanted in (0, 19, 20):
        _, counts = load_documents(str(tmp_path / "a.jsonl"), chat, row_tokens=1024, num_traces=wanted)
        assert "asked for" not in str(counts)


def test_if_no_trace_fits_a_row_that_is_an_error(tmp_path, chat):
    write_rows(tmp_path / "a.jsonl", make_rows("long", 20, seed=0))
    with pytest.raises(
        ValueError, match=r"row_tokens is 5 and no trace .*; raise --row_tokens or mend the data$"
    ):
        load_documents(str(tmp_path / "a.jsonl"), chat, row_tokens=5)


def test_if_all_rows_are_malformed_the_error_names_the_first_in_one_line_and_not_their_length(tmp_path, chat):
    (tmp_path / "a.jsonl").write_text(
        '{"problem": "1+1?", "trace": "2", "answer": "2"}\n' + "7\n" * 5 + "{\n"
    )
    with pytest.raises(ValueError, match=r"^no trace of .*; mend the data$") as refused:
        load_documents(
            str(tmp_path / "a.jsonl"), chat, row_tokens=900, long_share=0.5, max_bad_rows=7, verify="none"
        )
    named = re.findall(r"a\.jsonl:([0-9]): (.*?)(?: \||; mend)", str(refused.value))
    assert [line for line, _ in named] == ["1", "2", "3", "4", "5"] and "solution" in named[0][1]


def test_prompt_and_response_are_tokenised_as_the_sampler_sees_them(chat):
    document = make_documents([Trace("1+1?", f" {GOOD}\n", "here")], chat)[0]
    ids = document.ids.tolist()
    assert ids[: document.prompt_len] == chat.encode([chat.prompt("1+1?")])[0]
    assert chat.tokenizer.decode(ids[document.prompt_len :]) == GOOD + "<eos>"
    assert document.ids.dtype == torch.int32


def test_a_short_trace_is_not_taken_for_one_more_trace_in_the_cache(tmp_path, chat):
    a, b = (Trace(row["problem"], row["trace"], "x") for row in make_rows("long", 2, seed=0))
    for traces, count in (([replace(a, short=b)], 1), ([a, b], 2), ([a, replace(b, short=a)], 2)):
        documents, _ = tokenize(traces, chat, row_tokens=1_000, cache_dir=str(tmp_path))
        assert len(documents) == count
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_the_cache_gives_back_the_same_documents_and_is_keyed_by_content(tmp_path, chat, monkeypatch):
    traces = [Trace(row["problem"], row["trace"], "x") for row in make_rows("long", 40, seed=0)]
    cache = str(tmp_path / "cache")
    options = {"row_tokens": 150, "num_traces": 0, "cache_dir": cache}
    first, too_long = tokenize(traces, chat, **options)
    calls = []
    monkeypatch.setattr(data, "_tokenize", lambda *args: calls.append(args) or ([], TooLong()))
    again, too_long_again = tokenize(traces, chat, **options)
    assert not calls
    assert too_long == too_long_again and too_long.dropped > 0 == too_long.shortened
    assert [(d.ids.tolist(), d.prompt_len) for d in again] == [(d.ids.tolist(), d.prompt_len) for d in first]
    other = ChatFormat(make_tokenizer(), instruction="think")
    changed = [Trace(traces[0].problem, traces[0].response + " ", "x"), *traces[1:]]
    tokenize(traces, other, **options)
    tokenize(changed, chat, **options)
    tokenize(traces, chat, **options | {"row_tokens": 151})
    tokenize(traces, chat, **options | {"num_traces": 3})
    tokenize([replace(trace, short=traces[0]) for trace in traces], chat, **options)
    assert len(calls) == 5


def flipped(content: bytes, place: int) -> bytes:
    """Flip one bit."""
    place %= len(content)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:50], "deserializing header"),
        (lambda content: content[:-1], "not fully covered"),
        (lambda content: b"", "header"),
        (lambda content: flipped(content, -3), ""),  # a bit of the last tensor
        (lambda content: flipped(content, len(content) * 3 // 4), "does not hold what was written"),  # an id
    ],
)
def test_a_damaged_cache_file_is_named_and_replaced(tmp_path, chat, capsys, damage, said):
    traces = [Trace(row["problem"], row["trace"], "x") for row in make_rows("long", 4, seed=0)]
    first, _ = tokenize(traces, chat, row_tokens=400, cache_dir=str(tmp_path))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again, _ = tokenize(traces, chat, row_tokens=400, cache_dir=str(tmp_path))
    warning = capsys.readouterr().out
    assert warning.startswith(f"the token cache {file} cannot be used (") and said in warning
    assert [d.ids.tolist() for d in again] == [d.ids.tolist() for d in first]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [whole]


@pytest.mark.parametrize("place", ["a file", "a folder of the file's name"])
def test_a_cache_that_cannot_be_written_is_a_warning_with_a_remedy(tmp_path, chat, capsys, place):
    """Nor can a full disk's. The run goes on, and leaves nothing half-written."""
    traces = [Trace(row["problem"], row["trace"], "x") for row in make_rows("long", 4, seed=0)]
    cache = tmp_path / "cache"
    expected, _ = tokenize(traces, chat, row_tokens=400, cache_dir=str(cache))
    (file,) = cache.iterdir()
    file.unlink()
    if place == "a file":
        cache.rmdir()
        cache.write_text("mine")
    else:
        file.mkdir()
        (file / "mine").touch()
    found, _ = tokenize(traces, chat, row_tokens=400, cache_dir=str(cache))
    assert [d.ids.tolist() for d in found] == [d.ids.tolist() for d in expected]
    warning = capsys.readouterr().out
    assert f"the token cache {file} cannot be written" in warning and "pass --cache_dir with" in warning
    assert cache.read_text() == "mine" if place == "a file" else list(cache.iterdir()) == [file]


def test_real_openr1_rows_are_read_and_only_flagged_correct_ones_kept():
    path = real_data("openr1_gsm8k.jsonl")
    traces, drop_counts = read_traces(str(path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    right = {}
    for row in rows:
        flagged = zip(row["generations"], row["correctness_math_verify"], strict=True)
        right[row["problem"]] = [generation for generation, ok in flagged if ok]
    assert len(traces) + drop_counts.dropped.total() == len(rows)
    assert all(trace.response in right[trace.problem] for trace in traces)
    assert len(traces) > 400
