"""Traces of one's own: sampled, verified, written in OpenR1's schema, and trained on; no network."""

import json
import re

import pytest
from children import run_recipe

from kit.config import parse
from kit.data.toy import make_rows
from kit.data.traces import read_traces
from kit.evaluate.results import Result
from kit.grade.verdict import grade
from kit.recipes import evaluate, make_traces
from kit.recipes.make_traces import Config, summary, traces_of

HEADER = dict.fromkeys(
    (
        "model",
        "prompt",
        "temperature",
        "top_p",
        "top_k",
        "max_new_tokens",
        "seed",
        "dtype",
        "torch",
        "transformers",
    ),
    "x",
)


def row(question, sample, tokens, verdict="correct", finished=True):
    said = {"problem": f"{question}?", "answer": "7", "text": f"{sample}: \\boxed{{7}}"}
    return {
        "question": question,
        "sample": sample,
        "tokens": tokens,
        "verdict": verdict,
        "finished": finished,
    } | said


ROWS = (
    row("b", 2, 5), row("a", 1, 9, "wrong"), row("b", 0, 9), row("b", 1, 3), row("a", 0, 4, finished=False),
    row("c", 0, 4, "unknown"), row("b", 3, 1, "wrong"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("first", "order"), [("sampled", [0, 1, 2]), ("shortest", [1, 2, 0]), ("longest", [0, 2, 1])]
)
def test_the_right_and_whole_answers_of_a_problem_are_kept_in_the_order_asked_for(first, order):
    (found,) = traces_of(Result("answers", ROWS, HEADER), Config(first=first, model="m", problems="p.jsonl"))
    assert (found["problem"], found["answer"], found["source"], found["num_sampled"]) == (
        "b?",
        "7",
        "p.jsonl",
        4,
    )
    assert found["generations"] == [f"{sample}: \\boxed{{7}}" for sample in order]
    assert found["made_by"]["samples"] == order and found["made_by"]["model"] == "m"
    assert found["num_tokens"] == [{0: 9, 1: 3, 2: 5}[sample] for sample in order]


def test_the_share_that_was_kept_is_told_with_the_reasons():
    assert summary(ROWS, 3, 1) == (
        "kept        3 of 7 answers (42.9%), for 1 of 3 problems (33.3%): 3 right, 2 wrong, 1 cut off, "
        "1 undecided"
    )


def test_the_plan_that_the_docstring_names_says_whether_it_fits_without_any_file(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = re.search("`recipes/evaluate.py (.*)`", make_traces.__doc__)[1].split()
    evaluate.main(parse(evaluate.Config, [*flags, "--model", "tiny", "--max_new_tokens", "64"]))
    assert "fits 6 GB: yes" in capsys.readouterr().out


FLAGS = ["--smoke", "--problems=p.jsonl", "--num_samples=3", "--out=run"]


def write_problems(folder):
    rows = [*make_rows("short", 4, seed=77), {"problem": "1+1?", "answer": "999"}, {"problem": "no answer"}]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))


@pytest.mark.slow
def test_traces_are_made_resumed_to_the_same_file_and_read_by_the_training_recipes(tmp_path):
    write_problems(tmp_path)
    done = run_recipe("make_traces", *FLAGS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "left out    p.jsonl:6" in done.stdout and "20 were asked for, p.jsonl has 5" in done.stdout
    assert re.search(r"kept +[0-9]+ of 15 answers .* for 4 of 5 problems \(80.0%\)", done.stdout)
    path = tmp_path / "run" / "traces.jsonl"
    made = path.read_bytes()
    rows = [json.loads(line) for line in made.decode().splitlines()]
    assert "999" not in {row["answer"] for row in rows} and {row["made_by"]["model"] for row in rows} == {
        "tiny"
    }
    assert all(grade(row["answer"], text).verdict == "correct" for row in rows for text in row["generations"])
    traces, counts = read_traces(str(path))
    assert len(traces) == 4 and not counts.dropped.total()

    samples = tmp_path / "run" / "samples" / "answers.jsonl"
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:-5]))
    path.unlink()
    again = run_recipe("make_traces", *FLAGS, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "10 answers are kept, 5 are to come" in again.stdout and path.read_bytes() == made


def test_a_model_that_is_never_right_ends_with_what_to_change(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"problem": "1+1?", "answer": "999"}\n')
    done = run_recipe("make_traces", *FLAGS, cwd=tmp_path)
    assert done.returncode == 2 and "no answer of tiny is right and whole" in done.stderr
    assert "0 of 3 answers (0.0%), for 0 of 1 problems" in done.stdout
    assert (tmp_path / "run" / "samples" / "answers.jsonl").is_file()
