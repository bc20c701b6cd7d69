"""Results: one benchmark's samples, read from their log, all figures computed from them, and comparisons.

Nothing here needs a model: a log holds the texts, the verdicts, and where in each text the smaller limits
fall.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from kit.evaluate.reflection_and_loops import ends_in_loop, reflects
from kit.evaluate.sample_log import SampleLog, logs_in
from kit.evaluate.uncertainty import Lengths, half_width, in_percent, pass_at_k
from kit.grade.verdict import grade
from kit.paper import BENCHMARKS

STRICT, AS_THE_PAPER = "verdict", "paper_verdict"  # columns of a row; some logs lack the second
NUM_CAPS = 5  # points of accuracy against length: 1k, 2k, 4k, 8k and 16k for a limit of 16k tokens
MAY_DIFFER = ("model",)  # keys of two headers that may differ: what the comparison is about
Value = TypeVar("Value")


@dataclass(frozen=True)
class Result:
    """The samples of one benchmark. Every figure is computed from `rows`; shares are in 0..1."""

    benchmark: str
    rows: tuple[dict, ...]
    header: dict = field(default_factory=dict)  # model, prompt, decoding, versions

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read the samples that a journal holds so far; no rows if there are none.

        Raises ValueError naming a line that is not a sample.
        """
        rows = SampleLog(path).read()
        header = rows[0].get("header", {}) if rows else {}
        return cls(path.stem, tuple(row for row in rows if "header" not in row), header)

    @property
    def num_questions(self) -> int:
        return len({row["question"] for row in self.rows})

    @property
    def accuracy(self) -> float:
        """avg@k: the mean over questions of the share of correct samples.

        `unknown` counts as not correct; how many there are is shown beside it.
        """
        return fmean(self.by_question().values())

    @property
    def interval(self) -> float:
        """Half the width of the 95 % interval of accuracy, over questions (samples are not independent)."""
        return half_width(self.by_question().values())

    @property
    def paper_accuracy(self) -> float | None:
        """avg@k with the paper's grading; None if the log was not graded that way."""
        graded = all(AS_THE_PAPER in row for row in self.rows)
        return fmean(self.by_question(AS_THE_PAPER).values()) if graded else None

    def by_question(self, column: str = STRICT) -> dict[str, float]:
        """Return each question's share of correct samples, by one of the two columns of verdicts."""
        return _share_by_question(self.rows, lambda row: row[column])

    def pass_at(self, k: int) -> float:
        """Estimate pass@k without bias: the chance that one of k samples is correct, a mean over questions.

        Raises ValueError if a question has fewer than k samples.
        """
        return fmean(self._pass_by_question(k))

    def pass_interval(self, k: int) -> float:
        """Return half the width of the 95 % interval of pass@k."""
        return half_width(self._pass_by_question(k))

    def _pass_by_question(self, k: int) -> list[float]:
        right = group_by_question(self.rows, lambda row: row[STRICT] == "correct")
        return [pass_at_k(len(found), sum(found), k) for found in right.values()]

    @property
    def num_samples(self) -> int:
        """Samples that every question has; while a run is in progress, some questions have more."""
        return min(Counter(row["question"] for row in self.rows).values())

    def lengths(self, verdict: str = "") -> Lengths:
        """Return the lengths of the responses with this verdict, in tokens; "" = all."""
        return Lengths.of([row["tokens"] for row in self.rows if verdict in ("", row[STRICT])])

    @property
    def mean_tokens(self) -> float:
        return fmean(row["tokens"] for row in self.rows)

    @property
    def token_efficiency(self) -> float:
        """Accuracy per 1,000 tokens of mean length, the paper's accuracy / length."""
        return 1_000 * self.accuracy / self.mean_tokens

    @property
    def truncated(self) -> float:
        """Share of samples cut off at max_new_tokens."""
        return fmean(not row["finished"] for row in self.rows)

    @property
    def accuracy_of_finished(self) -> float | None:
        """Accuracy without the samples that were cut off; None if all were.

        A question whose samples were all cut off does not count. Those are often the hard ones, so read this
        figure together with `truncated`.
        """
        finished = [row for row in self.rows if row["finished"]]
        return fmean(_share_by_question(finished, lambda row: row[STRICT]).values()) if finished else None

    @property
    def unknown(self) -> int:
        """Number of samples that the grader could not decide in time."""
        return sum(row[STRICT] == "unknown" for row in self.rows)

    @property
    def without_answer(self) -> float:
        """Share of responses in which no answer was found."""
        return fmean(row["prediction"] is None for row in self.rows)

    @property
    def looping(self) -> float:
        """Share of responses that end in a loop (kit.evaluate.reflection_and_loops.ends_in_loop)."""
        return fmean(ends_in_loop(row["text"]) for row in self.rows)

    @property
    def reflection(self) -> float:
        """Share of responses with one of the paper's keywords: an upper bound on reflection."""
        return fmean(reflects(row["text"]) for row in self.rows)

    @property
    def judged_reflection(self) -> float | None:
        """Share of responses that reflect by a keyword and by the judge; None if there was no judge.

        A response about which the judge gave no verdict counts as its keyword says: see `unjudged`.
        """
        if not any("judged" in row for row in self.rows):
            return None
        return fmean(map(confirmed, self.rows))

    @property
    def unjudged(self) -> int:
        """Number of responses with a keyword about which the judge gave no verdict."""
        return sum(reflects(row["text"]) and row.get("judged") is None for row in self.rows)

    @property
    def caps(self) -> list[int]:
        """Limits for accuracy against length: max_new_tokens, powers of two below it; [] without a header."""
        longest = self.header.get("max_new_tokens", 0)
        powers = [2**n for n in range(4, longest.bit_length()) if 2**n < longest]
        return [*powers[1 - NUM_CAPS :], longest] if longest else []

    def accuracy_at(self, cap: int) -> float:
        """Compute the accuracy that max_new_tokens = cap, one of `caps`, would have given.

        A longer response is cut after its first `cap` tokens, and what is left is graded again. Each sample
        has its own random stream, so these are the tokens and the accuracy of a run with that limit. A box
        before the cut counts, a box behind it does not, and if none is left the grader's fall-backs apply, as
        in any response.
        Raises ValueError if the log does not say where this limit falls.
        """
        return fmean(self._by_question_at(cap).values())

    def interval_at(self, cap: int) -> float:
        """Return half the width of the 95 % interval of accuracy_at."""
        return half_width(self._by_question_at(cap).values())

    def _by_question_at(self, cap: int) -> dict[str, float]:
        return _share_by_question(self.rows, lambda row: _verdict_at(row, cap))

    def summary(self) -> dict:
        """Return every figure, ready for JSON."""
        names = (
            "accuracy", "interval", "paper_accuracy", "mean_tokens", "truncated", "accuracy_of_finished",
            "unknown", "without_answer", "looping", "reflection", "judged_reflection", "token_efficiency",
            "num_questions",
        )  # fmt: skip
        ks = [2**n for n in range(self.num_samples.bit_length())]
        return {
            "benchmark": self.benchmark,
            "num_samples": len(self.rows),
            **{name: getattr(self, name) for name in names},
            "pass_at": {k: [self.pass_at(k), self.pass_interval(k)] for k in ks},
            "tokens": {name or "all": asdict(self.lengths(name)) for name in ("", "correct", "wrong")},
            "accuracy_at": {cap: self.accuracy_at(cap) for cap in self.caps},
        }

    def __str__(self) -> str:
        return (
            f"{self.benchmark}: {in_percent(self.accuracy, self.interval)} of "
            f"{self.num_questions} questions x {len(self.rows) / self.num_questions:g} samples; "
            f"{self.mean_tokens:,.0f} tokens per response, {100 * self.truncated:.1f} % truncated, "
            f"{100 * self.reflection:.1f} % with a reflection keyword"
            + (f", {self.unknown} undecided" if self.unknown else "")
        )


def confirmed(row: dict) -> bool:
    """Return whether an answer reflects by a keyword and, unless the judge gave no verdict, by the judge."""
    return reflects(row["text"]) and row.get("judged") is not False


def read_result(path: Path) -> Result:
    """Read the result in a journal of samples. Raises ValueError if it holds none."""
    result = Result.read(path)
    if not result.rows:
        raise ValueError(f"{path} holds no samples; run the evaluation that writes it")
    return result


def group_by_question(rows: Sequence[dict], value_of: Callable[[dict], Value]) -> dict[str, list[Value]]:
    """Return the value of every row, by question, in the rows' order."""
    found: dict[str, list[Value]] = {}
    for row in rows:
        found.setdefault(row["question"], []).append(value_of(row))
    return found


def _share_by_question(rows: Sequence[dict], verdict_of: Callable[[dict], str]) -> dict[str, float]:
    right = group_by_question(rows, lambda row: verdict_of(row) == "correct")
    return {question: fmean(found) for question, found in right.items()}


def _verdict_at(row: dict, cap: int) -> str:
    if row["tokens"] <= cap:
        return row[STRICT]
    if str(cap) not in row["cuts"]:
        raise ValueError(
            f"cap is {cap} but the log says where the caps {', '.join(row['cuts'])} fall; pass one of these"
        )
    return _graded(row["answer"], row["text"][: row["cuts"][str(cap)]])


@lru_cache(maxsize=65_536)
def _graded(answer: str, text: str) -> str:
    return grade(answer, text).verdict


def check_comparable(before: Result, after: Result) -> None:
    """Raise ValueError if anything but the model differs: prompt, questions, decoding, versions."""
    keys = [key for key in {**before.header, **after.header} if key not in MAY_DIFFER]
    pairs = {key: (before.header.get(key), after.header.get(key)) for key in keys}
    changed = [f"{key} {old!r} and {new!r}" for key, (old, new) in pairs.items() if old != new]
    if changed:
        raise ValueError(
            f"{before.benchmark}: the two results differ in more than the model ({'; '.join(changed)}), so "
            "their difference has other causes too; evaluate both alike, or pass --force to compare them "
            "anyway"
        )


def paired_difference(before: Result, after: Result, *, force: bool = False) -> tuple[float, float]:
    """Return (accuracy after - before, half the width of its 95 % interval).

    Paired by question, so that how hard the questions are cancels: narrower than the two accuracies' own.
    Raises ValueError if one is unfinished, if the two did not answer the same questions and, unless forced,
    if their headers differ.
    """
    if not force:
        check_comparable(before, after)
    old, new = before.by_question(), after.by_question()
    both = {*old, *new} if before.header.get("questions") == after.header.get("questions") else {}
    for stage, result, own in (("before", before, old), ("after", after, new)):
        wanted = result.header.get("num_samples", 0) * len(both or own)  # 0: the log does not say
        if len(result.rows) < wanted:
            raise ValueError(
                f"{result.benchmark} {stage} is unfinished: {len(result.rows):,} of {wanted:,} answers; "
                "finish it with --resume"
            )
    if old.keys() != new.keys():
        raise ValueError(
            f"{before.benchmark}: {len(old)} questions before and {len(new)} after, of which "
            f"{len(old.keys() & new.keys())} are the same; evaluate both on the same questions"
        )
    differences = [new[question] - old[question] for question in old]
    return fmean(differences), half_width(differences, added=(-1.0, 1.0))


def headline(results: Mapping[str, Result]) -> dict[str, Result]:
    """Return the results of the paper's benchmarks, whose unweighted mean is the headline; if none, all."""
    of_paper = {name: result for name, result in results.items() if name in BENCHMARKS}
    return of_paper or dict(results)


def mean_accuracy(results: Mapping[str, Result]) -> float:
    """Return the paper's headline figure: the unweighted mean over the benchmarks of `headline`."""
    return fmean(result.accuracy for result in headline(results).values())


def read_results(folder: Path) -> dict[str, Result]:
    """Read a folder of samples: benchmark -> its result, for those that have any."""
    results = map(Result.read, logs_in(folder))
    return {result.benchmark: result for result in results if result.rows}
