"""Evaluate: a benchmark's questions, k samples each, graded and logged one by one; accuracy and length with their uncertainty.

Every sample goes to a journal as it ends, under a header that names model, prompt, decoding and versions. An evaluation that is
killed goes on where it was, and since every sample has a random stream of its own, the result is that of an unbroken run.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, pstdev

from kit.benchmarks import Benchmark, Question
from kit.chat import ChatFormat, digest
from kit.generate import Completion, SamplingParams, generate
from kit.grade import grade
from kit.grading import workers
from kit.journal import Journal

# the paper's keywords (section "Why it happens"). It also asks a language model whether each match is a real reflection: keywords
# alone are an upper bound
REFLECTION = re.compile(
    r"recheck|rethink|reassess|reevaluat|re-evaluate|re-?examine|reconsider|reanalyze|double-check|check again|think again"
    r"|verify again|go over the steps",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Result:
    """One benchmark's samples and what they add up to; every figure is computed from `rows`."""

    benchmark: str
    rows: tuple[dict, ...]

    @classmethod
    def read(cls, path: Path) -> Result:
        """The samples in a journal so far; no rows where there are none."""
        return cls(path.stem, tuple(row for row in Journal(path).read() if "header" not in row))

    @property
    def num_questions(self) -> int:
        return len({row["question"] for row in self.rows})

    @property
    def accuracy(self) -> float:
        """avg@k: the mean over questions of the share of correct samples; `unknown` counts as not correct and is shown apart."""
        return fmean(self.by_question().values())

    @property
    def interval(self) -> float:
        """Half the width of the 95 % interval of accuracy, questions being the sampled unit (samples of one question are not).

        Two right and two wrong questions are added for the width alone (Agresti & Coull, 1998): 0 of 8 is not 0 for certain.
        """
        return _half_width(list(self.by_question().values()), added=(0.0, 0.0, 1.0, 1.0))

    @property
    def mean_tokens(self) -> float:
        return fmean(row["tokens"] for row in self.rows)

    @property
    def truncated(self) -> float:
        """Share of samples cut off at max_new_tokens."""
        return fmean(not row["finished"] for row in self.rows)

    @property
    def unknown(self) -> int:
        """Samples the grader could not decide in time."""
        return sum(row["verdict"] == "unknown" for row in self.rows)

    @property
    def reflection(self) -> float:
        """Share of responses with one of the paper's keywords: an upper bound on reflection."""
        return fmean(bool(REFLECTION.search(row["text"])) for row in self.rows)

    def by_question(self) -> dict[str, float]:
        """Share of correct samples a question."""
        correct: dict[str, list[bool]] = {}
        for row in self.rows:
            correct.setdefault(row["question"], []).append(row["verdict"] == "correct")
        return {question: fmean(samples) for question, samples in correct.items()}

    def summary(self) -> dict:
        names = ("accuracy", "interval", "mean_tokens", "truncated", "unknown", "reflection", "num_questions")
        return {"benchmark": self.benchmark, "num_samples": len(self.rows), **{name: getattr(self, name) for name in names}}

    def __str__(self) -> str:
        return (
            f"{self.benchmark}: {100 * self.accuracy:.1f} % ± {100 * self.interval:.1f} of {self.num_questions} questions "
            f"x {len(self.rows) / self.num_questions:g} samples; {self.mean_tokens:,.0f} tokens a response, "
            f"{100 * self.truncated:.1f} % truncated, {100 * self.reflection:.1f} % with a reflection keyword"
            + (f", {self.unknown} undecided" if self.unknown else "")
        )


def fingerprint(model) -> str:
    """Names a model's weights by content: a hash of every tensor's name, shape and sums. Two checkpoints of a run differ."""
    state = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        wide = tensor.detach().double()
        state.update(f"{name} {tuple(tensor.shape)} {wide.sum().item()!r} {wide.square().sum().item()!r}".encode())
    return state.hexdigest()


def evaluate(
    model, chat: ChatFormat, benchmark: Benchmark, params: SamplingParams, folder: Path, *,
    num_samples: int = 0, num_slots: int = 16, seed: int = 0,
) -> Result:  # fmt: skip
    """Sample and grade `benchmark` (which has been read), writing folder/<name>.jsonl; samples found there are not made again.

    num_samples: k, samples a question; 0 = the benchmark's own. Raises ValueError where the file there belongs to another model,
    prompt, decoding or version: results under two headers are not one result.
    """
    num_samples = num_samples or benchmark.num_samples
    # importing sympy takes seconds: not out of the first hard answer's deadline
    threading.Thread(target=workers.start, daemon=True, name="start-grader").start()
    journal = Journal(folder / f"{benchmark.name}.jsonl")
    header = {
        "model": fingerprint(model),
        "prompt": chat.key,
        "questions": digest(*(question.id + question.answer for question in benchmark.questions)),
        "num_samples": num_samples,
        "seed": seed,
        **asdict(params),
        "dtype": str(model.dtype),
        **{name: version(name) for name in ("torch", "transformers")},
    }
    rows = _stored_rows(journal, header)
    done = {(row["question"], row["sample"]) for row in rows}
    wanted = [(q, i) for q in benchmark.questions for i in range(num_samples) if (q.id, i) not in done]
    prompts = dict(zip((q.id for q in benchmark.questions), _prompts(chat, benchmark), strict=True))

    def log(index: int, completion: Completion) -> None:
        question, i = wanted[index]
        journal.append({"question": question.id, "sample": i, **_row(question, completion)})

    generate(
        model, [prompts[q.id] for q, _ in wanted], params, num_slots=num_slots, seed=seed, eos_token_id=chat.eos_token_ids,
        keys=[[q.id, i] for q, i in wanted], decode=chat.decode, on_finish=log, description=benchmark.name,
    )  # fmt: skip
    return read_result(journal.path)


def read_result(path: Path) -> Result:
    """The result that a journal of samples holds. Raises ValueError where it holds none."""
    result = Result.read(path)
    if not result.rows:
        raise ValueError(f"{path} holds no samples; run the evaluation that writes it")
    return result


def _prompts(chat: ChatFormat, benchmark: Benchmark) -> list[list[int]]:
    return chat.encode([chat.prompt(question.problem) for question in benchmark.questions])


def _stored_rows(journal: Journal, header: dict) -> list[dict]:
    rows = journal.read()
    if not rows:
        journal.append({"header": header})
        return []
    stored = rows[0].get("header", {})
    changed = [f"{k} was {stored.get(k)!r}, is {header[k]!r}" for k in header if stored.get(k) != header[k]]
    if changed:
        raise ValueError(
            f"{journal.path} holds samples made otherwise: {'; '.join(changed)}; use another folder or delete the file"
        )
    return rows[1:]


def _row(question: Question, completion: Completion) -> dict:
    verdict = grade(question.answer, completion.text)
    return {
        "problem": question.problem,
        "tokens": len(completion.ids),
        "finished": completion.finished,
        "verdict": verdict.verdict,
        "tier": verdict.tier,
        "rule": verdict.rule,
        "gold": verdict.gold,
        "prediction": verdict.prediction,
        "mean_logprob": fmean(completion.logprobs),
        "text": completion.text,
    }


def paired_difference(before: Result, after: Result) -> tuple[float, float]:
    """(accuracy after - before, half the width of its 95 % interval), paired by question: narrower than two intervals apart.

    Raises ValueError where the two did not answer the same questions.
    """
    old, new = before.by_question(), after.by_question()
    if old.keys() != new.keys():
        raise ValueError(f"{before.benchmark}: {len(old)} questions before and {len(new)} after, of which "
                         f"{len(old.keys() & new.keys())} are the same; evaluate both on the same questions")  # fmt: skip
    differences = [new[question] - old[question] for question in old]
    return fmean(differences), _half_width(differences, added=(-1.0, 1.0))  # after Agresti & Min (2005)


def _half_width(values: list[float], added: tuple[float, ...]) -> float:
    """1.96 standard errors of the mean of `values`; the added ones keep a few equal values from looking certain."""
    values = [*values, *added]
    return 1.96 * pstdev(values) / math.sqrt(len(values))


def mean_accuracy(results: Sequence[Result]) -> float:
    """The headline of the paper: the unweighted mean over benchmarks."""
    return fmean(result.accuracy for result in results)
