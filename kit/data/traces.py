"""Traces: one correct, complete chain of thought per problem.

The paper's rule (section Data): OpenR1-Math-220k holds two to four traces per problem; one correct trace is kept, traces over
16,384 tokens are dropped. Subsets are nested: problems are put in one random order, keyed by seed and text, and a
subset is the first n that survive. So the 8k set is always contained in the 16k set.

Mixtures of long and short traces: a share of the problems keeps its long trace, the others get the data set's own short
`solution` instead. The problems are the same whatever the share.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from tqdm import tqdm

from kit.data.rows import BadRows, read_rows
from kit.grade.verdict import grade
from kit.run import digest

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


def _text(row: dict, *names: str) -> str:
    """Return the first of the fields that exists, as text. Raises ValueError naming the field and what is wrong with it."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise ValueError(f"no field {' or '.join(names)} (fields: {', '.join(map(str, row)) or 'none'})")
    value = row[name]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"field {name} is a {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"field {name} is empty")
    if "\0" in value:
        raise ValueError(f"field {name} contains a NUL byte")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"field {name} contains half a surrogate pair")
    return value


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
        response = _text(row, "trace", "solution")
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
        response = _text({f"generations[{i}]": generations[i]}, f"generations[{i}]")
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
        grade(_text(row, "answer"), response).verdict
    ]


def is_long(place: int, long_share: float) -> bool:
    """Return whether the problem at this place of the order keeps its long trace: the long ones are spread evenly."""
    return int((place + 1) * long_share) > int(place * long_share)


def read_traces(
    source: str, *, seed: int = 0, limit: int = 0, max_bad_rows: int = 0, verify: bool = True,
    shuffle: bool = True, long_share: float = 1.0,
) -> tuple[list[Trace], DropCounts]:  # fmt: skip
    """Read one trace per problem from `source` (see kit.data.rows), in the order whose prefixes are the nested subsets.

    limit: keep only the first `limit` traces of that order in memory (OpenR1-Math-220k is some gigabytes of text); 0 = all.
    shuffle: the random order; False = the order of the file, which is then read only as far as `limit` needs.
    long_share: share of the problems that keep their long trace. The others get the row's `solution`, which is not verified;
    below 1, a row without one is malformed. A problem that occurs twice is kept once.
    Raises ValueError for a share outside 0..1 and for more than max_bad_rows malformed rows, each named.
    """
    if not 0 <= long_share <= 1:
        raise ValueError(f"long_share is {long_share} but must be in 0..1; pass 1 for long traces alone")

    bad, drop_counts = BadRows(max_bad_rows), Counter()
    kept: dict[str, Trace] = {}
    solutions: dict[str, str] = {}
    seen: set[str] = set()
    for where, row in tqdm(read_rows(source, bad), desc="reading traces", unit=" rows", disable=None):
        try:
            problem = _text(row, "problem", "question")
            response, why = pick_response(row, verify=verify)
            solution = _text(row, "solution") if long_share < 1 else ""
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
            kept[key], solutions[key] = Trace(problem, response, where), solution

        if limit and not shuffle and len(kept) == limit:
            break
        if limit and len(kept) > 2 * limit:
            kept = {key: kept[key] for key in sorted(kept)[:limit]}
            solutions = {key: solutions[key] for key in kept}

    if bad.found:
        drop_counts["are malformed"] = len(bad.found)
    order = (sorted(kept) if shuffle else list(kept))[: limit or None]
    if len(order) < len(seen):
        drop_counts["come later in the order"] = len(seen) - len(order)
    traces = [
        kept[key] if is_long(place, long_share) else replace(kept[key], response=solutions[key])
        for place, key in enumerate(order)
    ]
    return traces, DropCounts(kept=len(order), dropped=drop_counts, bad_rows=bad.found)
