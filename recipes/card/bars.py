"""What the kit aims at on an H100, beside what the sections measured there. A missed aim is no failed check.

Qwen2.5-1.5B has to be asked for: --models Qwen/Qwen2.5-1.5B-Instruct,google/gemma-3-1b-it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kit.models.attention import OURS, VARLEN
from kit.recipes.card.flex import FLEX
from kit.recipes.card.results import Card, Results
from kit.recipes.card.sampler import EVEN, GRAPH, UNEVEN, USUAL
from kit.recipes.card.speed import MATMULS
from kit.recipes.card.speed_attention import FLASH

CARD = "H100"
Rows = list[dict]


def numbers(rows: Rows, key: str, **wanted) -> list:
    """Return what the rows with these values have under `key`."""
    return [row[key] for row in rows if key in row and wanted.items() <= row.items()]


def decode_seconds(rows: Rows, lengths: str) -> float:
    """Return the seconds of a decode step, as the sampler runs it."""
    return min(numbers(rows, "seconds_per_decode_step", lengths=lengths, way=GRAPH))


def uneven_over_even(rows: Rows) -> float:
    return decode_seconds(rows, UNEVEN) / decode_seconds(rows, EVEN)


def share_of_floor(rows: Rows) -> float:
    """Return what moving a decode step's bytes once would take, over what the step takes."""
    return max(numbers(rows, "floor_seconds", lengths=USUAL)) / decode_seconds(rows, USUAL)


def beside_losses(place: int, *peers: str) -> Callable[[Rows], float]:
    """Return the largest ratio of our loss to a peer's, over all heads. place: 0 = milliseconds, 1 = GiB."""

    def largest(rows: Rows) -> float:
        heads = numbers(rows, "milliseconds_and_gib")
        pairs = [(head["ours"], head[peer]) for head in heads for peer in peers if peer in head]
        return max(ours[place] / theirs[place] for ours, theirs in pairs)

    return largest


def beside_flash(place: int) -> Callable[[Rows], float]:
    """Return the least share of flash attention's speed, D = 64 and 128. place: 0 = forward, 1 = backward."""

    def least(rows: Rows) -> float:
        cases = [times for D in (64, 128) for times in numbers(rows, "milliseconds", head_dim=D)]
        flash = [next((times[name] for name in (VARLEN, FLASH) if name in times), None) for times in cases]
        pairs = [(times["ours"], theirs) for times, theirs in zip(cases, flash, strict=True) if theirs]
        return min(theirs[place] / ours[place] for ours, theirs in pairs)

    return least


def beside_flex(rows: Rows) -> float:
    """Return how many times as fast as flex_attention ours is, forward and backward together."""
    cases = [times for times in numbers(rows, "milliseconds") if FLEX in times]
    return min(sum(times[FLEX]) / sum(times[OURS]) for times in cases)


def best_mfu(model: str) -> Callable[[Rows], float]:
    return lambda rows: max(numbers(rows, "mfu", model=model))


def beside_peer(name: str) -> Callable[[Rows], float]:
    return lambda rows: min(numbers(rows, "ratio", peer=name))


@dataclass(frozen=True)
class Bar:
    section: str  # that measures it
    name: str
    value: Callable[[Rows], float]  # raises ValueError if nothing was measured
    least: float = -math.inf
    most: float = math.inf


PEERS = ("Liger", "CCE", "CCE exact")
BARS = (
    Bar("speed", "drawing a token in 64 rows, ms", lambda rows: max(numbers(rows, "draw_ms")), most=0.3),
    Bar("speed", "loss, time over its matmuls'", beside_losses(0, MATMULS), most=1.2),
    Bar("speed", "loss, time over Liger's and CCE's", beside_losses(0, *PEERS), most=1),
    Bar("speed", "loss, memory over Liger's and CCE's", beside_losses(1, *PEERS), most=1),
    Bar("speed", "attention forward, share of flash's speed", beside_flash(0), least=0.6),
    Bar("speed", "attention backward, share of flash's speed", beside_flash(1), least=0.45),
    Bar("steps", "Qwen2.5-1.5B, MFU", best_mfu("Qwen/Qwen2.5-1.5B-Instruct"), least=0.4),
    Bar("steps", "Gemma-3-1B, MFU", best_mfu("google/gemma-3-1b-it"), least=0.3),
    Bar("steps", "share of a step that the card is busy", lambda rows: min(numbers(rows, "busy")), least=0.9),
    Bar("sampler", "64 rows of 1,024, tokens/s", lambda rows: 64 / decode_seconds(rows, USUAL), least=25_000),
    Bar("sampler", "64 rows of 1,024, share of the floor of bytes", share_of_floor, least=0.3),
    Bar("sampler", "one long row, time over even rows'", uneven_over_even, most=1.6),
    Bar("sampler", "times generate's speed", beside_peer("generate"), least=6),
    Bar("sampler", "times generate_batch's speed", beside_peer("generate_batch"), least=4),
    Bar("flex", "attention with a window, D = 256, times flex_attention's speed", beside_flex, least=1),
)


def report(results: Results, card: Card, sections: Iterable[str]) -> None:
    """Record the bars of these sections, on an H100. One for which nothing was measured is not run."""
    if CARD not in card.name or card.arch:
        return
    rows = list(results.rows)
    for bar in (bar for bar in BARS if bar.section in sections):
        bound = f"at least {bar.least:g}" if bar.least > -math.inf else f"at most {bar.most:g}"
        try:
            value = bar.value(rows)
        except ValueError:  # of min and max: nothing was measured
            results.not_run(bar.name, f"nothing that {bar.section} measured tells")
            continue
        reached = bar.least <= value <= bar.most
        word = "reached" if reached else "MISSED"
        results.figure(bar.name, f"{word}: {value:,.2f}, {bound}", value=value, reached=reached)
