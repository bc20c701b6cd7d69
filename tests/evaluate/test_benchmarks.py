import json

import pyarrow
import pyarrow.parquet
import pytest
from conftest import real_data

from kit import paper
from kit.evaluate.benchmarks import BENCHMARKS, ids_hash, parse_benchmarks
from kit.evaluate.settings import BenchmarkSettings
from kit.grade.verdict import grade


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_papers_three_have_its_sample_counts():
    counts = {
        name: (BENCHMARKS[name].num_samples, BENCHMARKS[name].num_questions) for name in paper.BENCHMARKS
    }
    assert counts == {"math500": (4, 500), "aime24": (8, 30), "amc23": (8, 40)}


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
        verdict = grade(question.answer, f"so \\boxed{{{question.answer}}}").verdict
        assert verdict == "correct", question.answer


def test_a_folder_of_local_copies_is_enough_and_golds_do_not_change_the_ids(tmp_path):
    folder = real_data("aime24.jsonl").parent
    aime, gsm8k = parse_benchmarks(f"aime24={folder},gsm8k={folder}")
    assert aime.source == str(folder / "aime24.jsonl")
    assert gsm8k.source == str(folder / "gsm8k_test.jsonl")
    rows = [{"problem": f"  {q.problem}\n", "answer": int(q.answer)} for q in reversed(aime.questions)]
    assert any(question.answer.startswith("0") for question in aime.questions)
    (copy,) = parse_benchmarks(f"aime24={write(tmp_path / 'aime24.jsonl', rows)}")
    assert ids_hash(copy.questions) == ids_hash(aime.questions) == BENCHMARKS["aime24"].ids_hash


def test_the_arithmetic_problems_are_generated_and_are_the_ones_the_table_names():
    (arithmetic,) = parse_benchmarks("arithmetic")
    assert len(arithmetic.questions) == arithmetic.num_questions == 400
    assert arithmetic.num_samples == 4
    assert ids_hash(arithmetic.questions) == arithmetic.ids_hash
    first = arithmetic.questions[0]
    assert first.problem.startswith("Compute the answer to this arithmetic expression: ")
    assert grade(first.answer, f"It is \\boxed{{{first.answer}}}.").verdict == "correct"
    assert parse_benchmarks("arithmetic", limit=2)[0].questions == arithmetic.questions[:2]


def test_other_questions_under_a_benchmarks_name_are_refused_with_both_hashes(tmp_path):
    (toy,) = parse_benchmarks("toy")
    rows = [{"problem": question.problem, "answer": question.answer} for question in toy.questions]
    path = write(tmp_path / "toy.jsonl", rows)
    assert parse_benchmarks(f"toy={path}")[0].questions == toy.questions
    rows[7]["problem"] = "1+1?"
    path = write(tmp_path / "toy.jsonl", rows)
    message = rf"holds 100 questions as toy does.*should be {toy.ids_hash}; pass toy=FILE"
    with pytest.raises(ValueError, match=message):
        parse_benchmarks(f"toy={path}")
    # requested with a file and a limit
    assert parse_benchmarks(f"toy={path}", limit=100)[0].questions[7].problem == "1+1?"
    assert len(parse_benchmarks(f"toy={write(tmp_path / 'part.jsonl', rows[:9])}")[0].questions) == 9


def test_a_hub_copy_must_be_whole_and_the_same_even_with_a_limit(tmp_path, monkeypatch):
    """There is no network in tests: the reader of the hub is replaced by what it would give."""
    (toy,) = parse_benchmarks("toy")
    rows = [{"problem": question.problem, "answer": question.answer} for question in toy.questions]
    monkeypatch.setattr(
        "kit.evaluate.benchmarks.read_rows",
        lambda source, bad: ((f"{source}[{i}]", row) for i, row in enumerate(rows)),
    )
    assert parse_benchmarks("toy=owner/toy", limit=3)[0].questions == toy.questions[:3]
    rows[0]["problem"] = "2+2?"
    with pytest.raises(ValueError, match="owner/toy holds 100 questions"):
        parse_benchmarks("toy=owner/toy", limit=3)
    del rows[0]
    with pytest.raises(ValueError, match="toy has 100 questions but owner/toy gave 99"):
        parse_benchmarks("toy=owner/toy")


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
        ([{"problem": "x"}], r"f.jsonl:1: not a question for aime24: no field answer or gt_answer"),
        ([{"problem": "", "answer": "1"}], r"f.jsonl:1: not a question for aime24: field problem is empty"),
        ([{"problem": "x", "answer": "1", "url": "2022_AIME_I"}], "holds no question for aime24"),
    ],
)
def test_a_file_without_the_questions_is_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        parse_benchmarks(f"aime24={write(tmp_path / 'f.jsonl', rows)}")


def test_an_arithmetic_problem_whose_steps_cannot_be_checked_is_refused_by_its_place(tmp_path):
    rows = [{"problem": "Compute: 3*(4+5) = ?", "answer": 27}, {"problem": "How many eggs?", "answer": 3}]
    assert (
        parse_benchmarks(f"arithmetic={write(tmp_path / 'a.jsonl', rows[:1])}")[0].questions[0].answer == "27"
    )
    with pytest.raises(
        ValueError,
        match=r"b\.jsonl:2: .* arithmetic: 'How many eggs' does not end with an arithmetic expression",
    ):
        parse_benchmarks(f"arithmetic={write(tmp_path / 'b.jsonl', rows)}")


def test_an_unknown_benchmark_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no benchmark 'aime25'; the kit knows math500, aime24.* MINE=FILE"):
        parse_benchmarks("aime25")


def test_the_papers_evaluation_is_its_questions_times_its_samples():
    assert BenchmarkSettings("math500,aime24,amc23").count_samples() == 500 * 4 + 30 * 8 + 40 * 8
    few = BenchmarkSettings("math500=math500.jsonl, aime24", num_questions=100, num_samples=2)
    assert few.count_samples() == 100 * 2 + 30 * 2


def test_your_own_questions_count_as_many_as_the_file_holds(tmp_path):
    own = tmp_path / "q.jsonl"
    own.write_text("".join(f'{{"problem": "{i}+1?", "answer": {i + 1}}}\n' for i in range(7)))
    for limit, expected in ((0, 7), (5, 5)):
        found = BenchmarkSettings(f"toy,mine={own}", num_questions=limit).count_samples()
        assert found == 4 * (limit or 100) + 4 * expected


OWN = [{"question": "1+1?", "answer": 2}, {"problem": "a half of 1?", "answer": "\\frac{1}{2}"}]


def test_your_own_questions_are_read_from_each_kind_of_file_under_the_name_you_chose(tmp_path):
    write(tmp_path / "q.jsonl", OWN)
    (tmp_path / "q.json").write_text(json.dumps(OWN))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"problem": "1+1?", "answer": "2"}, OWN[1]]), tmp_path / "q.parquet"
    )
    for suffix in ("jsonl", "json", "parquet"):
        source = str(tmp_path / f"q.{suffix}")
        own, toy = parse_benchmarks(f"my-Quiz.v2={source}, toy", limit=7)
        assert (own.name, own.source, own.num_samples, own.num_questions) == ("my-Quiz.v2", source, 4, 2)
        assert [(question.problem, question.answer) for question in own.questions] == [
            ("1+1?", "2"),
            ("a half of 1?", "\\frac{1}{2}"),
        ]
        assert len(toy.questions) == 7
        assert parse_benchmarks(f"mine={source}", limit=1)[0].questions == own.questions[:1]


@pytest.mark.parametrize(
    ("line", "mistake"),
    [
        ('{"problem": "2+2?"}', r"no field answer or .* \(fields: problem\)"),
        ('{"answer": 4}', r"no field problem or question or .* \(fields: answer\)"),
        ('{"problem": "2+2?", "answer": 4', "not JSON: Expecting ',' delimiter, column 32"),
        ("problem,answer", "not JSON: Expecting value, column 1"),
        ('["2+2?", 4]', "a row is an object with fields, this is a list"),
        ('{"problem": " ", "answer": 4}', "field problem is empty"),
        ('{"problem": "2+2?", "answer": ""}', "field answer is empty"),
        ('{"problem": "2+2?", "answer": [4]}', "field answer is a list, not text or a number"),
        ('{"problem": "2+2?", "answer": true}', "field answer is a bool, not text or a number"),
        ('{"problem": "2+2?", "answer": null}', "field answer is null"),
        ('{"problem": "2+2?", "answer": NaN}', "field answer is nan, which is not a number"),
        ('{"problem": "1+1? ", "answer": 3}', r"the same problem as in \S+q\.jsonl:1; delete one of the two"),
    ],
)
def test_a_mistake_in_your_own_questions_is_named_by_its_line_with_what_a_row_is(tmp_path, line, mistake):
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"problem": "1+1?", "answer": 2}}\n\n{line}\n{{"problem": "3+3?", "answer": 6}}\n')
    message = rf'q\.jsonl has 1 mistake; .* such as {{"problem": .*}}\n  \S+q\.jsonl:3: {mistake}$'
    with pytest.raises(ValueError, match=message):
        parse_benchmarks(f"mine={path}", limit=1)  # all are checked, whatever the limit


def test_of_many_mistakes_the_first_are_named_in_order_and_the_others_counted(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("x\n" + '{"problem": "1+1?"}\n' * 7)
    with pytest.raises(ValueError, match="has 8 mistakes") as error:
        parse_benchmarks(f"mine={path}")
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[1] for line in lines[:-1]] == ["1", "2", "3", "4", "5"]
    assert lines[-1] == "  and 3 more"


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_any_question_of_yours_is_refused(tmp_path, content):
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"q\.jsonl is empty; write one object per row, such as {"):
        parse_benchmarks(f"mine={tmp_path / 'q.jsonl'}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("my/quiz=q.jsonl", r"'my/quiz' cannot name your questions.* such as mine=q\.jsonl"),
        ("=q.jsonl", "'' cannot name your questions"),
        (".mine=q.jsonl", "'.mine' cannot name your questions"),
        ("übung=q.jsonl", "cannot name your questions"),
        ("Con=q.jsonl", "'Con' cannot name your questions"),
        ("x" * 65 + "=q.jsonl", "cannot name your questions"),
        ("Toy=q.jsonl", "there is no benchmark 'Toy'; the kit knows math500"),
        ("mine=", "there is no benchmark 'mine'"),
        ("mine=q.jsonl,MINE=q.jsonl", "MINE is in it twice"),
        ("toy,toy=q.jsonl", "toy is in it twice"),
        ("mine=q.csv", r"your own questions are read from a \.jsonl, \.json, \.parquet file"),
        ("mine=owner/questions", "there is no benchmark 'mine', and your own questions are read from a"),
        ("mine=absent.jsonl", r"no file absent\.jsonl here"),
    ],
)
def test_a_name_or_a_file_that_cannot_be_used_says_why(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "q.jsonl", OWN)
    with pytest.raises(ValueError, match=message):
        parse_benchmarks(text)


def test_a_benchmark_named_twice_in_the_same_words_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "q.jsonl", OWN)
    assert [found.name for found in parse_benchmarks("toy, mine=q.jsonl,toy,mine=q.jsonl")] == ["toy", "mine"]
    assert BenchmarkSettings("toy,toy", num_questions=5, num_samples=2).count_samples() == 10
    assert BenchmarkSettings("toy", num_questions=5, num_samples=2).count_samples() == 10


@pytest.mark.parametrize("limit", [0, 1])
def test_a_problem_that_is_twice_in_a_file_of_a_known_benchmark_is_refused_as_in_your_own(tmp_path, limit):
    file = write(tmp_path / "toy.jsonl", [*OWN, {"problem": "1+1?  ", "answer": 2}])
    with pytest.raises(ValueError, match=r"toy\.jsonl:3: the same problem as in \S+toy\.jsonl:1; delete one"):
        parse_benchmarks(f"toy={file}", limit=limit)
