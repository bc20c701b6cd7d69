"""Traces: one correct, complete chain of thought per problem.

The paper's rule (section Data): OpenR1-Math-220k holds two to four traces per problem; one correct trace is
kept, and traces over 16,384 tokens are dropped. Subsets are nested: the problems are put in one random order,
which depends on the seed and their text alone, and a subset is the first n that survive. So the 16k set
always contains the 8k set.

Mixtures of long and short traces are those of kit/data/mixtures.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from kit.data.drop_counts import DropCounts
from kit.data.formats import check_columns, parse_columns, recognise
from kit.data.mixtures import check_mixture, mixed, with_short
from kit.data.responses import Trace, check_verify, notes_on, trace_of
from kit.data.rows import BadRows, read_rows, same_space, text_of
from kit.progress import Progress
from kit.run import digest


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
    columns: str = "",
) -> tuple[list[Trace], DropCounts]:
    """Read one trace per problem from `source` (see kit.data.rows), in the order that nests the subsets.

    A problem that occurs twice is kept once. kit.data.formats recognises the rows' format by their columns.

    limit: return, and keep in memory, only the first so many traces of that order (OpenR1-Math-220k is some
    gigabytes of text); 0 = all. verify: see pick_response.
    shuffle: the random order; False = the order of the file, which is then read only as far as `limit` needs.
    long_share: share of the problems that keep their long trace. The others get a short one (see
    kit.data.mixtures): from the source `short_traces`, or, if that is "", the row's `solution`, which is not
    verified; a row without one is then malformed.
    columns: the names of the columns of another format, such as problem=question,trace=response.
    Raises ValueError for a share outside 0..1, for columns of no known format, and for more than max_bad_rows
    malformed rows, and names each.
    """
    check_mixture(long_share, short_traces)
    verify, solutions = check_verify(verify), long_share < 1 and not short_traces
    named = parse_columns(columns)

    def key_of(trace: Trace) -> str:
        return digest(str(seed), same_space(trace.asked))

    bad = BadRows(max_bad_rows)
    dropped, noted, formats = Counter(), Counter(), Counter()
    kept: dict[str, Trace] = {}  # by key; the random order is that of the keys
    seen: set[str] = set()
    for where, row in Progress("reading traces", "rows").over(read_rows(source, bad)):
        if not formats:
            check_columns(source, row, named)
        row, layout = recognise(row, named)
        try:
            trace, why = trace_of(row, where, layout, verify)
            short = text_of(row, ["solution"]) if solutions else None
        except ValueError as error:
            bad.add(where, str(error))
            continue

        formats[layout.name] += 1
        noted.update(notes_on(row))
        if trace is None:
            dropped[why] += 1
        elif (key := key_of(trace)) in seen:
            dropped["repeat a problem"] += 1
        else:
            seen.add(key)
            kept[key] = replace(trace, short=replace(trace, response=short)) if solutions else trace
            noted.update([why] if why else [])

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
    traces = mixed(list(kept.values()), long_share)
    return traces, DropCounts(len(traces), dropped, bad.found, noted, formats=formats)
