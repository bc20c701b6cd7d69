"""Traces: one correct, complete chain of thought per problem.

The paper's rule (section Data): OpenR1-Math-220k holds two to four traces per problem; one correct trace is
kept, and traces over 16,384 tokens are dropped. Subsets are nested: the problems are put in one random order,
which depends on the seed and their text alone, and a subset is the first n that survive. So the 16k set
always contains the 8k set.

Mixtures of long and short traces: a share of the problems keeps its long trace, the others get the data set's
own short `solution` instead. The problems are the same whatever the share.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from kit.data.rows import ANSWER, PROBLEM, BadRows, read_rows, text_of
from kit.grade.verdict import grade
from kit.progress import Progress
from kit.run import digest

RESPONSE = ("trace", "solution")  # the fields in which a row with a single response keeps it

NO_CORRECT = "have no correct trace"
NO_COMPLETE = "have no complete trace"
UNVERIFIED = "could not be verified"


@dataclass(frozen=True)
class Trace:
    """A problem and the one response that the model is trained on."""

    problem: str
    response: str
    where: str  # file:line, or data set[index]


@dataclass
class DropCounts:
    """How many rows were kept and dropped, by reason. Printed before training and stored with the run."""

    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    bad_rows: list[str] = field(default_factory=list)  # where: reason

    def __str__(self) -> str:
        text = f"{self.kept:,} traces kept, {self.dropped.total():,} dropped"
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
        return f"{text}: {reasons}" if reasons else text


def pick_response(row: dict, *, verify: bool = True) -> tuple[str | None, str]:
    """Return (the row's first correct, complete response, ""), or (None, the reason why it has none).

    A row in OpenR1's schema has `generations` and, parallel to them, `correctness_math_verify`,
    `is_reasoning_complete` and `finish_reasons`: these flags decide. If the first is missing, or if the row
    has a single response in `trace` or `solution`, our grader decides by the row's answer.

    verify: False = return the first complete response, correct or not. Raises ValueError for a malformed row.
    """
    if row.get("generations") is None:
        response = text_of(row, RESPONSE)
        why = _verify(row, response) if verify else ""
        return (None, why) if why else (response, "")

    generations = row["generations"]
    if not isinstance(generations, list) or not generations:
        found = "an empty list" if generations == [] else f"a {type(generations).__name__}"
        raise ValueError(f"field generations is {found}")
    correct = _flags(row, "correctness_math_verify", len(generations))
    complete = _flags(row, "is_reasoning_complete", len(generations))
    finish = _flags(row, "finish_reasons", len(generations))

    reasons = set()
    for i in range(len(generations)):
        name = f"generations[{i}]"
        response = text_of({name: generations[i]}, [name])
        if complete[i] is False or finish[i] == "length":
            why = NO_COMPLETE
        elif not verify or correct[i]:
            why = ""
        else:
            why = _verify(row, response) if correct[i] is None else NO_CORRECT
        if not why:
            return response, ""
        reasons.add(why)
    by_weight = (NO_CORRECT, UNVERIFIED, NO_COMPLETE)
    return None, next(reason for reason in by_weight if reason in reasons)


def _flags(row: dict, name: str, count: int) -> list:
    """Return this field's list, parallel to `generations`; all None if the data set has no such field."""
    value = row.get(name)
    if value is None:
        return [None] * count
    if not isinstance(value, list) or len(value) != count:
        found = f"{len(value)} entries" if isinstance(value, list) else f"a {type(value).__name__}"
        raise ValueError(f"field {name} has {found} but generations has {count} entries")
    return value


def _verify(row: dict, response: str) -> str:
    """Return why our grader does not call the response correct; "" if it does."""
    verdict = grade(text_of(row, ANSWER), response).verdict
    return {"correct": "", "wrong": NO_CORRECT, "unknown": UNVERIFIED}[verdict]


def is_long(place: int, long_share: float) -> bool:
    """Return whether the problem at this place of the order keeps its long trace; they are spread evenly."""
    return int((place + 1) * long_share) > int(place * long_share)


def read_traces(
    source: str,
    *,
    seed: int = 0,
    limit: int = 0,
    max_bad_rows: int = 0,
    verify: bool = True,
    shuffle: bool = True,
    long_share: float = 1.0,
) -> tuple[list[Trace], DropCounts]:
    """Read one trace per problem from `source` (see kit.data.rows), in the order that nests the subsets.

    A problem that occurs twice is kept once.

    limit: return, and keep in memory, only the first so many traces of that order (OpenR1-Math-220k is some
    gigabytes of text); 0 = all. verify: see pick_response.
    shuffle: the random order; False = the order of the file, which is then read only as far as `limit` needs.
    long_share: share of the problems that keep their long trace. The others get the row's `solution`, which
    is not verified; below 1, a row without one is malformed.
    Raises ValueError for a share outside 0..1 and for more than max_bad_rows malformed rows, and names each.
    """
    if not 0 <= long_share <= 1:
        raise ValueError(f"long_share is {long_share} but must be in 0..1; pass 1 for long traces alone")

    bad = BadRows(max_bad_rows)
    dropped = Counter()
    kept: dict[str, Trace] = {}  # key -> trace; the random order is that of the keys
    solutions: dict[str, str] = {}
    seen: set[str] = set()
    for where, row in Progress("reading traces", "rows").over(read_rows(source, bad)):
        try:
            problem = text_of(row, PROBLEM)
            response, why = pick_response(row, verify=verify)
            solution = text_of(row, ["solution"]) if long_share < 1 else ""
        except ValueError as error:
            bad.add(where, str(error))
            continue

        key = digest(str(seed), problem)
        if response is None:
            dropped[why] += 1
        elif key in seen:
            dropped["repeat a problem"] += 1
        else:
            seen.add(key)
            kept[key], solutions[key] = Trace(problem, response, where), solution

        if limit and not shuffle and len(kept) == limit:
            break
        if limit and len(kept) > 2 * limit:
            kept = {key: kept[key] for key in sorted(kept)[:limit]}
            solutions = {key: solutions[key] for key in kept}

    if bad.found:
        dropped["are malformed"] = len(bad.found)
    order = (sorted(kept) if shuffle else list(kept))[: limit or None]
    if len(order) < len(seen):
        dropped["come later in the order"] = len(seen) - len(order)
    traces = [
        kept[key] if is_long(place, long_share) else replace(kept[key], response=solutions[key])
        for place, key in enumerate(order)
    ]
    return traces, DropCounts(kept=len(order), dropped=dropped, bad_rows=bad.found)
