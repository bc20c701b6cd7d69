import pytest
from conftest import real_data

from kit.data.chat import ChatFormat
from kit.data.documents import load_documents
from kit.data.overlap import count_overlaps, runs_of_words
from kit.data.toy import make_tokenizer
from kit.evaluate.benchmarks import BENCHMARKS, parse_benchmarks, problems_at_hand
from kit.journal import write_rows

ASKED = "Tom has three red apples and gives two of them to Ann. How many apples has Tom?"


@pytest.mark.parametrize(
    ("problem", "overlaps"),
    [
        (ASKED, True),
        ("tom HAS three\nred   apples, and gives two!", True),  # eight words
        ("has three red apples and gives two of 7", True),
        ("Tom has three red apples and gives one", False),  # seven
        ("Ann has three red apples and gives 2 of them", False),
        ("has three red apples and gives two", False),  # shorter than eight: only the same problem counts
        ("7+5-3?", True),
        (" 7+5-3? ", True),
        ("7-5+3?", False),
        ("What is 7+5-3?", False),
        ("", False),
    ],
)
def test_a_problem_overlaps_if_eight_words_in_a_row_are_the_same(problem, overlaps):
    counts = count_overlaps([problem], {"mine": [ASKED, "7+5-3?"], "other": ["1?"], "far": None})
    assert counts == {"mine": int(overlaps), "other": 0, "far": None}


def test_a_text_of_n_words_has_n_less_7_runs():
    text = " ".join(map(str, range(20)))
    assert len(runs_of_words(text)) == 13 and runs_of_words("1 2 3 4 5 6 7 8") == {"1 2 3 4 5 6 7 8"}


def test_the_overlap_with_each_benchmark_stands_in_the_drop_statistics_with_those_not_checked(tmp_path):
    problems = [ASKED, f"Again: {ASKED}", "1+1?"]
    write_rows(tmp_path / "a.jsonl", [{"problem": p, "trace": "\\boxed{2}", "answer": "2"} for p in problems])
    chat = ChatFormat(make_tokenizer(), instruction="")
    benchmarks = {"mine": [ASKED, "2+2?"], "other": [], "far": None, "further": None}
    options = {"row_tokens": 200, "benchmarks": benchmarks}
    _, counts = load_documents(str(tmp_path / "a.jsonl"), chat, **options)
    shared = "Problems that share 8 words in a row with a benchmark's: mine 2, other 0"
    assert str(counts).endswith(f". {shared}. Not checked for overlap: far, further")
    _, counts = load_documents(str(tmp_path / "a.jsonl"), chat, shuffle=False, num_traces=1, **options)
    assert counts.overlaps["mine"] == 1
    _, counts = load_documents(str(tmp_path / "a.jsonl"), chat, row_tokens=200)
    assert str(counts).endswith("Format: problem, trace")


def test_benchmarks_that_a_run_reads_and_those_without_a_download_are_at_hand(tmp_path):
    write_rows(tmp_path / "q.jsonl", [{"problem": "1+1?", "answer": "2"}])
    found = problems_at_hand(parse_benchmarks(f"mine={tmp_path / 'q.jsonl'}"))
    assert found["mine"] == ["1+1?"] and {*found} == {"mine", *BENCHMARKS}
    assert [name for name, problems in found.items() if problems is None] == [
        "math500",
        "aime24",
        "amc23",
        "gsm8k",
    ]
    assert [len(found[name]) for name in ("arithmetic", "toy")] == [400, 100]


def test_traces_on_gsm8ks_test_problems_are_seen():
    path, rows = real_data("gsm8k_test.jsonl"), real_data("openr1_gsm8k.jsonl")
    benchmarks = problems_at_hand(parse_benchmarks(f"gsm8k={path}"))
    chat = ChatFormat(make_tokenizer(), instruction="")
    options = {"row_tokens": 16_384, "num_traces": 20, "max_bad_rows": 20, "benchmarks": benchmarks}
    documents, counts = load_documents(str(rows), chat, **options)
    assert counts.overlaps["gsm8k"] == len(documents) == 20 and counts.overlaps["toy"] == 0
