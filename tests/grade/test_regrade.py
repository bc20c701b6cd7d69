"""Regrading lists what changes, writes only what was asked for, and shows where a peer disagrees."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kit import models
from kit.data.chat import ChatFormat
from kit.evaluate.benchmarks import parse_benchmarks
from kit.evaluate.measure import evaluate
from kit.evaluate.results import read_result
from kit.generate.sampling import SamplingParams
from kit.grade import regrade

ROOT = Path(__file__).resolve().parents[2]
HEADER = {"header": {"model": "abc", "seed": 0}}


def sample(number, answer, text, **fields):
    return {
        "question": "q1",
        "sample": number,
        "problem": "?",
        "answer": answer,
        "tokens": 5,
        "text": text,
        **fields,
    }


ROWS = [
    HEADER,
    sample(0, "5", r"\boxed{5}", verdict="correct", paper_verdict="correct"),
    # an older grader forgave the factor
    sample(1, "5", r"\boxed{500}", verdict="correct", paper_verdict="correct"),
    sample(2, r"\frac12", "\\boxed{0.5} \ud800 π", verdict="wrong"),
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def samples(tmp_path):
    return write(tmp_path / "math500.jsonl", ROWS)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_changed_verdicts_are_counted_and_listed_and_nothing_is_written_unasked(samples, capsys):
    content = samples.read_bytes()
    counts = regrade.main([str(samples)])
    assert counts == {"samples": 3, "changed": 2, "paper_changed": 1}
    printed = capsys.readouterr().out
    assert "3 samples, 2 verdicts changed, 1 of the paper's" in printed
    assert "q1/1: correct -> wrong, paper correct -> correct; gold '5', prediction '500'" in printed
    assert "q1/2: wrong -> correct, paper None -> correct" in printed
    assert "q1/0" not in printed
    assert samples.read_bytes() == content
    assert list(samples.parent.iterdir()) == [samples]


def test_a_new_file_holds_the_new_verdicts_and_every_other_field(samples, tmp_path):
    content = samples.read_bytes()
    regrade.main([str(samples), "--out", str(tmp_path / "new.jsonl")])
    assert samples.read_bytes() == content
    header, *rows = rows_of(tmp_path / "new.jsonl")
    assert header == HEADER
    assert [row["verdict"] for row in rows] == ["correct", "wrong", "correct"]
    assert [row["paper_verdict"] for row in rows] == ["correct", "correct", "correct"]
    assert all(
        row[name] == old[name]
        for row, old in zip(rows, ROWS[1:], strict=True)
        for name in ("problem", "tokens", "answer")
    )
    assert regrade.main([str(tmp_path / "new.jsonl")])["changed"] == 0


def test_in_place_replaces_the_file_and_leaves_no_scratch(samples):
    regrade.main([str(samples), "--in_place"])
    assert [row["verdict"] for row in rows_of(samples)[1:]] == ["correct", "wrong", "correct"]
    assert list(samples.parent.iterdir()) == [samples]


def test_rows_without_the_raw_answer_are_graded_against_their_normal_form_and_said_so(tmp_path, capsys):
    row = {"question": "q", "sample": 0, "gold": "5", "verdict": "wrong", "text": "5"}
    assert regrade.main([str(write(tmp_path / "old.jsonl", [row]))])["changed"] == 1
    assert "1 rows have no `answer`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "5", "answer": "5"}\n{"te', r"s.jsonl:2 is half a line: .*resume it first"),
        ('{"text": "5", "answer": "5"}\nnot\n', r"s.jsonl:2 is not JSON"),
        ('{"answer": "5"}\n', r"s.jsonl:1 is not a sample"),
        ('{"text": "5"}\n', r"s.jsonl:1 is not a sample"),
        ("[1]\n", r"s.jsonl:1 is not a sample"),
    ],
)
def test_a_file_that_holds_no_samples_is_refused_and_left_alone(tmp_path, content, message):
    path = tmp_path / "s.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        regrade.main([str(path), "--in_place"])
    assert path.read_text() == content


def test_mistakes_on_the_command_line_are_named(samples, tmp_path):
    with pytest.raises(ValueError, match=r"no file .*none.jsonl here"):
        regrade.main([str(tmp_path / "none.jsonl")])
    with pytest.raises(ValueError, match="exclude each other"):
        regrade.main([str(samples), "--out", "x.jsonl", "--in_place"])
    with pytest.raises(ValueError, match=r"math500\.jsonl exists; pass the name of a new file"):
        regrade.main([str(samples), "--out", str(samples)])
    with pytest.raises(ValueError, match=r"no peer 'me'.*math-verify"):
        regrade.main([str(samples), "--compare", "me"])


def test_what_an_evaluation_writes_is_regraded_without_a_change(tmp_path):
    model, tokenizer = models.load("tiny", device="cpu")
    (toy,) = parse_benchmarks("toy", limit=3)
    evaluate(
        model,
        ChatFormat(tokenizer, instruction=""),
        toy,
        SamplingParams(max_new_tokens=60),
        tmp_path,
        num_samples=2,
    )
    path = tmp_path / "toy.jsonl"
    assert regrade.main([str(path)]) == {"samples": 6, "changed": 0, "paper_changed": 0}
    before = read_result(path)
    regrade.main([str(path), "--in_place"])
    assert read_result(path) == before
    assert {row["answer"] for row in before.rows} == {question.answer for question in toy.questions}
    assert {row["paper_verdict"] for row in before.rows} <= {"correct", "wrong"}


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def test_the_command_line_prints_one_line_for_a_mistake(samples):
    done = command("-m", "kit.grade", "regrade", str(samples))
    assert (done.returncode, "2 verdicts changed" in done.stdout) == (0, True), done.stderr
    done = command("-m", "kit.grade", "regrade", "none.jsonl")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no file none.jsonl here")
    assert done.stderr.count("\n") == 1


def test_an_answer_that_begins_with_minus_is_graded_after_two_dashes_which_the_error_says():
    done = command("-m", "kit.grade", r"-\frac{1}{2}", "3")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.endswith("; put -- before an answer that begins with -\n")
    done = command("-m", "kit.grade", "--", r"-\frac{1}{2}", "-0.5")
    assert re.search("^verdict +correct$", done.stdout, re.MULTILINE), done.stderr


def test_a_missing_peer_is_an_error_that_names_the_package(samples):
    code = "import sys; sys.modules['math_verify'] = None; from kit.grade import regrade; "
    done = command("-c", code + f"regrade.main([{str(samples)!r}, '--compare', 'math-verify'])")
    assert "pip install 'math-verify[antlr4_13_2]'" in done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed (extra `test`)"
)
def test_where_math_verify_disagrees_is_listed(tmp_path, capsys):
    rows = [
        sample(0, "5", r"\boxed{5}"),
        sample(1, "5", r"\boxed{6}"),
        sample(2, "2", r"\boxed{1} and \boxed{2}"),
    ]
    # the peer calls two tiny numbers equal
    rows.append(sample(3, r"\frac{1}{2004!}", r"\boxed{\frac{1}{2006!}}"))
    counts = regrade.main([str(write(tmp_path / "s.jsonl", rows)), "--compare", "math-verify"])
    printed = capsys.readouterr().out
    assert "q1/3: ours wrong" in printed
    assert "q1/0: ours" not in printed
    assert f"math-verify disagrees on {counts['disagreements']} of 4" in printed


def test_the_samples_of_a_run_that_is_going_are_regraded_so_far_and_only_in_place_is_refused(samples):
    with samples.open("ab") as file:
        file.write(b'{"question": "q1", "sam')
    content = samples.read_bytes()
    assert regrade.main([str(samples)])["samples"] == 3
    with pytest.raises(ValueError, match=r"math500\.jsonl:5 is half a line: .*resume it first"):
        regrade.main([str(samples), "--in_place"])
    assert samples.read_bytes() == content
    assert list(samples.parent.iterdir()) == [samples]
