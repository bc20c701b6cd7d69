"""The benchmarks as a table: where each one's problems are, which fields to read, how many samples a question.

Accuracy in the paper (section Evaluation) is avg@k over MATH-500, AIME24 and AMC23 and the unweighted mean of the three; GSM8K
is for models that solve nothing else, the toy for machines without a GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from kit.chat import digest
from kit.rows import SUFFIXES, BadRows, read_rows
from kit.toy import PROBLEMS


@dataclass(frozen=True)
class Question:
    """One problem with its gold answer; `id` names it by content, so that files and hub copies agree."""

    id: str
    problem: str
    answer: str


@dataclass(frozen=True)
class Benchmark:
    """A row of the table."""

    name: str
    source: str  # hub id[:config][@split], or a local file
    problem_field: str
    answer_field: str
    num_samples: int  # k, samples a question in the paper
    num_questions: int  # rows it must have
    answer_pattern: str = ""  # the gold is this pattern's first group in the answer field; "" = the whole field
    row_filter: str = ""  # keep rows whose `url` field contains this; "" = all
    questions: tuple[Question, ...] = ()

    def read(self, source: str = "", *, limit: int = 0) -> Benchmark:
        """The benchmark with its questions, from `source` (a local file or hub id; "" = the table's).

        limit: the first so many questions; 0 = all. Raises ValueError for a malformed row, and where a hub copy has not the
        number of questions that the table says.
        """
        questions = []
        where = source or self.source
        for place, row in read_rows(where, BadRows(0)):
            if self.row_filter and self.row_filter not in str(row.get("url", self.row_filter)):
                continue
            questions.append(self._question(row, place))
        if not questions:
            raise ValueError(f"{where} holds no question for {self.name}; check the file")
        if Path(where).suffix not in SUFFIXES and len(questions) != self.num_questions:
            raise ValueError(
                f"{self.name} has {self.num_questions} questions but {where} gave {len(questions)}; pass a local file"
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
        return Question(digest(problem)[:12], problem, answer.strip())


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("math500", "HuggingFaceH4/MATH-500@test", "problem", "answer", 4, 500),
        Benchmark("aime24", "AI-MO/aimo-validation-aime", "problem", "answer", 8, 30, row_filter="2024_AIME"),
        Benchmark("amc23", "AI-MO/aimo-validation-amc", "problem", "answer", 8, 40, row_filter="2023_AMC"),
        Benchmark("gsm8k", "openai/gsm8k:main@test", "question", "answer", 4, 1319, answer_pattern=r"####\s*(.+)"),
        Benchmark("toy", str(PROBLEMS), "problem", "answer", 4, 100),
    )
}
PAPER = ("math500", "aime24", "amc23")


def parse_benchmarks(text: str, *, limit: int = 0) -> list[Benchmark]:
    """Benchmarks with their questions from `name` or `name=file`, comma-separated: `math500,aime24=aime24.jsonl`.

    limit: questions a benchmark; 0 = all. Raises ValueError for an unknown name.
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
