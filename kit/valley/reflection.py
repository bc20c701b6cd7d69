"""Reflection and token efficiency at one number of traces, on the benchmark whose answers' length counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kit.evaluate.results import Result, confirmed
from kit.valley.curves import ByQuestion, Estimate, estimate
from kit.valley.error_accumulation import deviations, ratio


@dataclass(frozen=True)
class Reflection:
    """What the answers of one point of a curve show."""

    num_traces: int
    efficiency: Estimate  # right answers per 1,000 tokens: the paper's accuracy / length
    share: Estimate  # of answers with one of the paper's keywords, unless a judge did not confirm it
    tokens_longer: Estimate | None  # mean length of those minus that of the others; None without both


def reflection_of(num_traces: int, results: Mapping[int, Result]) -> Reflection:
    """Measure reflection. results: seed -> samples of one benchmark."""
    rows = [(seed, row, confirmed(row)) for seed, result in results.items() for row in result.rows]
    return Reflection(
        num_traces,
        ratio(rows, lambda row, _: row["verdict"] == "correct", lambda row, _: row["tokens"] / 1_000),
        ratio(rows, lambda _, reflects: reflects, lambda *_: 1),
        tokens_longer(rows),
    )


def tokens_longer(rows: Sequence[tuple[int, dict, bool]]) -> Estimate | None:
    """Return by how many tokens reflective answers are longer than others; None without both kinds.

    rows: (seed, row of the log, whether it reflects).
    """
    if len({reflects for _, _, reflects in rows}) < 2:
        return None

    def of_kind(wanted: bool) -> tuple[float, dict[int, ByQuestion]]:
        return deviations(
            rows,
            lambda row, reflects: row["tokens"] * (reflects == wanted),
            lambda _, reflects: reflects == wanted,
        )

    (longer, moves), (shorter, others) = of_kind(True), of_kind(False)
    both = {seed: {q: moves[seed][q] - others[seed][q] for q in moves[seed]} for seed in moves}
    return Estimate(longer - shorter, estimate(both).half)
