"""Traces: one correct, complete chain of thought per problem.

The paper's rule (section Data): OpenR1-Math-220k holds two to four traces per problem; one correct trace is
kept, and traces over 16,384 tokens are dropped. Subsets are nested: the problems are put in one random order,
which depends on the seed and their text alone, and a subset is the first n that survive. So the 16k set
always contains the 8k set.

Mixtures of long and short traces are those of kit/data/mixtures.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from kit.data.generations import check_verify, generations_of, notes_on
from kit.data.mixtures import check_mixture, mixed, with_short
from kit.data.rows import ANSWER, PROBLEM, BadRows, read_rows, same_space, text_of
from kit.grade.verdict import grade
from kit.progress import Progress
from kit.run import digest
from kit.turns import never_closes

RESPONSE = ("trace", "solution")  # the fields in which a row with a single response keeps it

NO_CORRECT = "have no correct trace"
BY_LLAMA = "have a correct trace by Llama's verdict alone"
NO_COMPLETE = "have no complete trace"
UNVERIFIED = "could not be verified"


@dataclass(frozen=True)
class Trace:
    """A problem and the one response that the model is trained on."""

    problem: str
    response: str
    where: str  # file:line, or data set[index]
    short: Trace | None = None  # of a mixture: what is kept if no row holds the response


@dataclass
class DropCounts:
    """How many rows were kept and dropped, by reason. Printed before training and stored with the run."""

    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    bad_rows: list[str] = field(default_factory=list)  # where: reason
    noted: Counter = field(default_factory=Counter)  # what else is to be known of the rows that were read
    wanted: int = 0  # traces asked for; 0 = all

    def __str__(self) -> str:
        few = f" ({self.wanted:,} were asked for, but no more qualify)" if self.kept < self.wanted else ""
        text = f"{self.kept:,} traces kept{few}, {self.dropped.total():,} dropped"
        for title, counts in ((": ", self.dropped), (". Of the rows read, ", self.noted)):
            listed = "; ".join(f"{count:,} {what}" for what, count in counts.most_common() if count)
            text += title + listed if listed else ""
        return text


def pick_response(row: dict, *, verify: str | bool = "llama") -> tuple[str | None, str]:
    """Return (the row's first correct, complete response, ""), or (None, the reason why it has none).

    A row in OpenR1's schema has `generations` with flags (see kit.data.generations): that of Math-Verify
    decides. If it is not known, or if the row has a single response in `trace` or `solution`, our grader
    decides by the row's answer.

    verify: "math" = as above. "llama" (or True) = if no response is accepted so, the first that Llama accepts
    is returned, with BY_LLAMA in place of "". "none" (or False) = the first complete response is returned,
    correct or not. Raises ValueError for another `verify` and for a malformed row.
    """
    verify = check_verify(verify)
    if row.get("generations") is None:
        response = text_of(row, RESPONSE)
        why = NO_COMPLETE if never_closes(response) else "" if verify == "none" else _verify(row, response)
        return (None, why) if why else (response, "")

    reasons, by_llama = set(), None
    for response, complete, math, llama in generations_of(row):
        if not complete:
            why = NO_COMPLETE
        elif verify == "none" or math:
            return response, ""
        else:
            why = _verify(row, response) if math is None else NO_CORRECT
            if not why:
                return response, ""
            by_llama = by_llama or (response if llama else None)
        reasons.add(why)
    if by_llama:
        return (by_llama if verify == "llama" else None), BY_LLAMA
    return None, next(why for why in (NO_CORRECT, UNVERIFIED, NO_COMPLETE) if why in reasons)


def _verify(row: dict, response: str) -> str:
    """Return why our grader does not call the response correct; "" if it does."""
    verdict = grade(text_of(row, ANSWER), response).verdict
    return {"correct": "", "wrong": NO_CORRECT, "unknown": UNVERIFIED}[verdict]


def read_traces(
    source: str,
    *,
    seed: int = 0,
    limit: int = 0,
    max_bad_rows: int = 0,
    verify: str | bool = "llama",
    shuffle: bool = True,
    long_share: float = 1.0,
    short_traces: str = "",
) -> tuple[list[Trace], DropCounts]:
    """Read one trace per problem from `source` (see kit.data.rows), in the order that nests the subsets.

    A problem that occurs twice is kept once.

    limit: return, and keep in memory, only the first so many traces of that order (OpenR1-Math-220k is some
    gigabytes of text); 0 = all. verify: see pick_response.
    shuffle: the random order; False = the order of the file, which is then read only as far as `limit` needs.
    long_share: share of the problems that keep their long trace. The others get a short one (see
    kit.data.mixtures): from the source `short_traces`, or, if that is "", the row's `solution`, which is not
    verified; a row without one is then malformed.
    Raises ValueError for a share outside 0..1 and for more than max_bad_rows malformed rows, and names each.
    """
    check_mixture(long_share, short_traces)
    verify, solutions = check_verify(verify), long_share < 1 and not short_traces

    def key_of(problem: str) -> str:
        return digest(str(seed), same_space(problem))

    bad = BadRows(max_bad_rows)
    dropped, noted = Counter(), Counter()
    kept: dict[str, Trace] = {}  # by key; the random order is that of the keys
    seen: set[str] = set()
    for where, row in Progress("reading traces", "rows").over(read_rows(source, bad)):
        try:
            problem = text_of(row, PROBLEM)
            response, why = pick_response(row, verify=verify)
            short = Trace(problem, text_of(row, ["solution"]), where) if solutions else None
        except ValueError as error:
            bad.add(where, str(error))
            continue

        key = key_of(problem)
        noted.update(notes_on(row))
        if response is None:
            dropped[why] += 1
        elif key in seen:
            dropped["repeat a problem"] += 1
        else:
            seen.add(key)
            kept[key] = Trace(problem, response, where, short)
            noted[BY_LLAMA] += why == BY_LLAMA

        if limit and not shuffle and len(kept) == limit:
            break
        if limit and len(kept) > 2 * limit:
            kept = {key: kept[key] for key in sorted(kept)[:limit]}

    order = (sorted(kept) if shuffle else list(kept))[: limit or None]
    if len(order) < len(seen):
        dropped["come later in the order"] = len(seen) - len(order)
    kept = {key: kept[key] for key in order}
    if short_traces:
        settings = {"seed": seed, "max_bad_rows": max_bad_rows, "verify": verify, "shuffle": shuffle}
        short, counts = read_traces(short_traces, **settings)
        bad.found += counts.bad_rows
        kept = with_short(kept, short, key_of=key_of, seen=seen, noted=noted, dropped=dropped)
    if bad.found:
        dropped["are malformed"] = len(bad.found)
    traces = list(kept.values()) if long_share == 1 else mixed(list(kept.values()), long_share)
    return traces, DropCounts(len(traces), dropped, bad.found, noted)
