import json

import pytest
from conftest import real_data

from kit.benchmarks import BENCHMARKS, PAPER, parse_benchmarks
from kit.grade import grade


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_papers_three_have_its_sample_counts():
    assert {name: (BENCHMARKS[name].num_samples, BENCHMARKS[name].num_questions) for name in PAPER} == {
        "math500": (4, 500), "aime24": (8, 30), "amc23": (8, 40),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("math500", "math500.jsonl", 500),
        ("aime24", "aime24.jsonl", 30),
        ("amc23", "amc23.jsonl", 40),
        ("gsm8k", "gsm8k_test.jsonl", 1319),
    ],
)
def test_real_files_are_read_whole_and_every_gold_is_graded_correct_against_itself(name, file, count):
    (benchmark,) = parse_benchmarks(f"{name}={real_data(file)}")
    assert len(benchmark.questions) == count
    assert len({question.id for question in benchmark.questions}) == count
    for question in benchmark.questions:
        assert grade(question.answer, f"so \\boxed{{{question.answer}}}").verdict == "correct", question.answer


def test_the_shipped_problems_are_read_and_limited():
    (toy,) = parse_benchmarks("toy")
    assert len(toy.questions) == toy.num_questions == 100
    (few,) = parse_benchmarks("toy", limit=3)
    assert few.questions == toy.questions[:3]


def test_gsm8ks_answer_is_what_follows_the_hashes(tmp_path):
    rows = [{"question": "How many?", "answer": "so 1 + 1\n#### 1,002"}]
    (gsm8k,) = parse_benchmarks(f"gsm8k={write(tmp_path / 'g.jsonl', rows)}")
    assert gsm8k.questions[0].answer == "1,002"


def test_a_questions_id_names_its_text():
    (toy,) = parse_benchmarks("toy", limit=2)
    assert toy.questions[0].id != toy.questions[1].id


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"problem": "x"}], r"f.jsonl:1: aime24 needs text in problem and an answer in answer"),
        ([{"problem": "", "answer": "1"}], r"f.jsonl:1: aime24 needs"),
        ([{"problem": "x", "answer": "1", "url": "2022_AIME_I"}], "holds no question for aime24"),
    ],
)
def test_a_file_without_the_questions_is_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        parse_benchmarks(f"aime24={write(tmp_path / 'f.jsonl', rows)}")


def test_an_unknown_benchmark_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no benchmark 'aime25'; the kit knows math500, aime24"):
        parse_benchmarks("aime25")
