"""The benchmarks as a table: where each one's problems are, which fields to read, how many samples per question.

Accuracy in the paper (section Evaluation) is avg@k over MATH-500, AIME24 and AMC23 and the unweighted mean of the three;
`arithmetic` is its synthetic task (section "Why it happens"). GSM8K is for models that solve nothing else, the toy for machines
without a GPU.

A benchmark that is read whole must hold the questions that the table's hash names. The hashes were made from local copies of the
data; the hub's copies could not be read where this was written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from kit.data.arithmetic import make_rows
from kit.data.equations import check_steps
from kit.data.problems import Question
from kit.data.rows import SUFFIXES, BadRows, read_rows
from kit.data.toy import PROBLEMS
from kit.run import digest


@dataclass(frozen=True)
class Benchmark:
    """A row of the table."""

    name: str
    source: str  # hub id[:config][@split], or a local file; "" = made by `make_rows`
    file: str  # what a local copy is called, in the folder of `name=FOLDER`
    problem_field: str
    answer_field: str
    num_samples: int  # k, samples per question in the paper
    num_questions: int  # rows it must have
    ids_hash: str  # of the ids of all its questions, whatever their order
    answer_pattern: str = (
        ""  # the gold is this pattern's first group in the answer field; "" = the whole field
    )
    row_filter: str = ""  # keep rows whose `url` field contains this; "" = all
    questions: tuple[Question, ...] = ()

    def read(self, source: str = "", *, limit: int = 0) -> Benchmark:
        """The benchmark with its questions, from a local file, a folder with `file` in it, or a hub id; "" = the table's.

        limit: the first so many questions; 0 = all. Raises ValueError for a malformed row, and where the questions are not those
        of the table: a hub copy must hold all of them, and so must a local file of as many rows that is read without a limit.
        Any other local file is taken as it is.
        """
        where = source or self.source
        if where and Path(where).is_dir():
            where = str(Path(where) / self.file)
        rows = (
            read_rows(where, BadRows(0))
            if where
            else ((f"{self.name}[{i}]", row) for i, row in enumerate(make_rows()))
        )
        questions = [
            self._question(row, place)
            for place, row in rows
            if not self.row_filter or self.row_filter in str(row.get("url", self.row_filter))
        ]
        where = where or "kit/data/arithmetic.py"
        if not questions:
            raise ValueError(f"{where} holds no question for {self.name}; check the file")
        is_local = Path(where).suffix in SUFFIXES
        if not is_local and len(questions) != self.num_questions:
            raise ValueError(
                f"{self.name} has {self.num_questions} questions but {where} gave {len(questions)}; pass a local file"
            )
        found = ids_hash(questions)
        if found != self.ids_hash and len(questions) == self.num_questions and not (is_local and limit):
            raise ValueError(
                f"{where} holds {len(questions)} questions as {self.name} does, but not the same ones: the hash of their ids is "
                f"{found} and should be {self.ids_hash}; pass {self.name}=FILE with the original questions, or a file and a "
                f"limit ({self.num_questions} will do) to use that file's own"
            )
        return replace(self, source=where, questions=tuple(questions[: limit or None]))

    def _question(self, row: dict, place: str) -> Question:
        problem = row.get(self.problem_field, row.get("problem", row.get("question")))
        answer = row.get(self.answer_field)
        if (
            not isinstance(problem, str)
            or not isinstance(answer, str | int | float)
            or not problem.strip()
            or not str(answer).strip()
        ):
            raise ValueError(
                f"{place}: {self.name} needs text in {self.problem_field} and an answer in {self.answer_field}, "
                f"but they are {problem!r} and {answer!r}"
            )
        answer = str(answer)
        if self.answer_pattern:
            match = re.search(self.answer_pattern, answer)
            if not match:
                raise ValueError(f"{place}: no {self.answer_pattern!r} in the answer {answer[-80:]!r}")
            answer = match.group(1)
        if self.name == "arithmetic":
            try:
                check_steps(problem, "")
            except ValueError as error:
                raise ValueError(
                    f"{place}: {error}: answers to {self.name} are checked step by step"
                ) from error
        return Question(digest(" ".join(problem.split()))[:12], problem, answer.strip())


def ids_hash(questions: Iterable[Question]) -> str:
    """The name of a set of questions: of their texts alone, so that a gold written 025, 25 or 25.0 makes no difference."""
    return digest(*sorted(question.id for question in questions))[:16]


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("math500", "HuggingFaceH4/MATH-500@test", "math500.jsonl", "problem", "answer", 4, 500, "a6bc71e57736a9a4"),
        Benchmark(
            "aime24", "AI-MO/aimo-validation-aime", "aime24.jsonl", "problem", "answer", 8, 30, "1b34c3255ebf558d",
            row_filter="2024_AIME",
        ),
        Benchmark(
            "amc23", "AI-MO/aimo-validation-amc", "amc23.jsonl", "problem", "answer", 8, 40, "cd3c50af4b0fe948",
            row_filter="2023_AMC",
        ),
        Benchmark(
            "gsm8k", "openai/gsm8k:main@test", "gsm8k_test.jsonl", "question", "answer", 4, 1319, "6700fc151a84d1df",
            answer_pattern=r"####\s*(.+)",
        ),
        Benchmark("arithmetic", "", "arithmetic.jsonl", "problem", "answer", 4, 400, "4ad7da933761c1ce"),
        Benchmark("toy", str(PROBLEMS), "problems.jsonl", "problem", "answer", 4, 100, "7c22d50c014f0914"),
    )
}  # fmt: skip
PAPER = ("math500", "aime24", "amc23")


def parse_benchmarks(text: str, *, limit: int = 0) -> list[Benchmark]:
    """Benchmarks with their questions from `name`, `name=file` or `name=folder`: `math500,aime24=aime24.jsonl,gsm8k=data`.

    limit: questions per benchmark; 0 = all. Raises ValueError for an unknown name.
    """
    benchmarks = []
    for word in text.split(","):
        name, _, source = word.strip().partition("=")
        if name not in BENCHMARKS:
            raise ValueError(
                f"there is no benchmark {name!r}; the kit knows {', '.join(BENCHMARKS)} (write name=FILE for a local file)"
            )
        benchmarks.append(BENCHMARKS[name].read(source, limit=limit))
    return benchmarks
