"""Mixtures of long and short traces: which problem gets which.

A share of the problems keeps its long trace. The others get a short one: the data set's own `solution`, or a
trace of another file, which is verified as the long ones are. The roles are spread evenly over the order of
the problems, so every subset has its share, and the problems are the same whatever the share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

Trace = TypeVar("Trace")  # kit.data.responses.Trace

NO_SHORT = "have no short trace"
OTHERS = "have a short trace of another problem beside their long one"
SHORTENED = "have a long trace that no row holds, and keep their short one"
REWRITTEN = "have earlier answers that the chat template rewrites, and train on the later ones alone"


class TooLong(NamedTuple):
    """How many traces no row holds, and what else was found while they were tokenised."""

    dropped: int = 0
    shortened: int = 0  # of a mixture: their short ones are kept
    rewritten: int = 0  # documents in which earlier answers carry no loss: see ChatFormat.conversation


def check_mixture(long_share: float, short_traces: str, columns: str = "") -> None:
    """Raise ValueError for a share outside 0..1, and for a mixture without short traces or without a use.

    columns: the setting, which names the only columns of a row; "" = the data's own.
    """
    if not 0 <= long_share <= 1:
        raise ValueError(f"long_share is {long_share} but must be in 0..1; pass 1 for long traces alone")
    if short_traces and long_share == 1:
        raise ValueError(
            f"short_traces is {short_traces} but long_share is 1, so no problem would get a short one; pass "
            "--long_share 0.25 for a quarter of long ones, or leave --short_traces out"
        )
    if long_share < 1 and columns and not short_traces and "solution=" not in columns.replace(" ", ""):
        raise ValueError(
            f"long_share is {long_share:g} but columns is {columns!r}, which names no short solution; add "
            "solution=COLUMN to it, or pass --short_traces"
        )


def is_long(place: int, long_share: float) -> bool:
    """Return whether the problem at this place of the order keeps its long trace; they are spread evenly."""
    return int((place + 1) * long_share) > int(place * long_share)


def mixed(traces: Sequence[Trace], long_share: float) -> list[Trace]:
    """Return the traces as a mixture: the short one of each in a short place.

    The others keep their short one beside them, for rows that the long one does not fit.
    """
    return [trace if is_long(place, long_share) else trace.short for place, trace in enumerate(traces)]


def with_short(
    kept: Mapping[str, Trace],
    short: Sequence[Trace],
    *,
    key_of: Callable[[Trace], str],
    seen: Collection[str],
    noted: Counter,
    dropped: Counter,
) -> dict[str, Trace]:
    """Return the kept traces, each with a short one, in their order; count what happened.

    The short one is that of the same problem if `short` has it. If not, it is the first unused one of a
    problem that is not in the file of the long traces. A trace for which none is left is dropped.
    kept: key -> trace. key_of: returns the key of a trace's problem. seen: the keys of all problems in the
    file of `kept`, or, if that is not shuffled, of those read so far.
    """
    own = {key_of(trace): trace for trace in short}
    others = iter([trace for key, trace in own.items() if key not in seen])
    found = {}
    for key, trace in kept.items():
        same = own.get(key)
        if partner := same or next(others, None):
            found[key] = replace(trace, short=partner)
            noted[OTHERS] += same is None
        else:
            dropped[NO_SHORT] += 1
    return found
