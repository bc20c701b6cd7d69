"""Traces: one correct, complete chain of thought per problem.

The paper's rule (section Data): OpenR1-Math-220k holds two to four traces per problem; one correct trace is kept, traces over
16,384 tokens are dropped. Subsets are nested: problems are put in one random order, keyed by seed and text, and a subset is
the first n that survive. So the 8k set is always contained in the 16k set.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tqdm import tqdm

from kit.data.rows import ANSWER, PROBLEM, BadRows, read_rows, text_of
from kit.grade.verdict import grade
from kit.run import digest

RESPONSE = ("trace", "solution")  # the fields in which a row with a single response keeps it
NO_CORRECT, NO_COMPLETE, UNVERIFIED = (
    "have no correct trace",
    "have no complete trace",
    "could not be verified",
)


@dataclass(frozen=True)
class Trace:
    """A problem and the one response that is trained on."""

    problem: str
    response: str
    where: str  # file:line, or data set[index]


@dataclass
class DropCounts:
    """How many rows were kept, and how many were dropped for which reason. Printed before training and stored with the run."""

    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    bad_rows: list[str] = field(default_factory=list)  # where: reason

    def __str__(self) -> str:
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
        return f"{self.kept:,} traces kept, {self.dropped.total():,} dropped" + (
            f": {reasons}" if reasons else ""
        )


def _flags(row: dict, name: str, count: int) -> list:
    """Return a list parallel to `generations`; all None if the data set has no such field."""
    value = row.get(name)
    if value is None:
        return [None] * count
    if not isinstance(value, list) or len(value) != count:
        found = f"{len(value)} entries" if isinstance(value, list) else f"a {type(value).__name__}"
        raise ValueError(f"field {name} has {found} but generations has {count} entries")
    return value


def pick_response(row: dict, *, verify: bool = True) -> tuple[str | None, str]:
    """Return the row's first correct, complete response, or (None, the reason why it has none).

    Rows in OpenR1's schema (`generations` with parallel lists `correctness_math_verify`, `is_reasoning_complete`,
    `finish_reasons`) are judged by their flags; other rows ({problem, solution | trace, answer}) and missing flags by our
    grader against `answer`. verify=False takes the first complete one. Raises ValueError for a malformed row.
    """
    if row.get("generations") is None:
        response = text_of(row, RESPONSE)
        why = _verify(row, response) if verify else ""
        return (None, why) if why else (response, "")
    generations = row["generations"]
    if not isinstance(generations, list) or not generations:
        raise ValueError(
            f"field generations is {'an empty list' if generations == [] else 'a ' + type(generations).__name__}"
        )
    correct = _flags(row, "correctness_math_verify", len(generations))
    complete = _flags(row, "is_reasoning_complete", len(generations))
    finish = _flags(row, "finish_reasons", len(generations))
    reasons = set()
    for i in range(len(generations)):
        response = text_of({f"generations[{i}]": generations[i]}, [f"generations[{i}]"])
        if complete[i] is False or finish[i] == "length":
            why = NO_COMPLETE
        elif not verify or correct[i]:
            why = ""
        else:
            why = _verify(row, response) if correct[i] is None else NO_CORRECT
        if not why:
            return response, ""
        reasons.add(why)
    return None, next(reason for reason in (NO_CORRECT, UNVERIFIED, NO_COMPLETE) if reason in reasons)


def _verify(row: dict, response: str) -> str:
    """Return why our grader does not find the response correct; "" if it does."""
    return {"correct": "", "wrong": NO_CORRECT, "unknown": UNVERIFIED}[
        grade(text_of(row, ANSWER), response).verdict
    ]


def read_traces(
    source: str, *, seed: int = 0, limit: int = 0, max_bad_rows: int = 0, verify: bool = True
) -> tuple[list[Trace], DropCounts]:
    """Read one trace per problem from `source` (see kit.data.rows), in the random order whose prefixes are the nested subsets.

    limit: keep only the first `limit` traces of that order in memory (OpenR1-Math-220k is some gigabytes of text); 0 = all.
    A problem that occurs twice is kept once. Raises ValueError for more than max_bad_rows malformed rows, each named.
    """
    bad, drop_counts = BadRows(max_bad_rows), Counter()
    kept: dict[str, Trace] = {}
    seen: set[str] = set()
    for where, row in tqdm(read_rows(source, bad), desc="reading traces", unit=" rows", disable=None):
        try:
            problem = text_of(row, PROBLEM)
            response, why = pick_response(row, verify=verify)
        except ValueError as error:
            bad.add(where, str(error))
            continue
        key = digest(str(seed), problem)
        if response is None:
            drop_counts[why] += 1
        elif key in seen:
            drop_counts["repeat a problem"] += 1
        else:
            seen.add(key)
            kept[key] = Trace(problem, response, where)
        if limit and len(kept) > 2 * limit:
            kept = {key: kept[key] for key in sorted(kept)[:limit]}
    if bad.found:
        drop_counts["are malformed"] = len(bad.found)
    order = sorted(kept)[: limit or None]
    if len(order) < len(seen):
        drop_counts["come later in the random order"] = len(seen) - len(order)
    return [kept[key] for key in order], DropCounts(kept=len(order), dropped=drop_counts, bad_rows=bad.found)
