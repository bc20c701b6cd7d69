"""Drawing tokens: the card's tokens beside the CPU's from the same logits, and log-probs against float64."""

from __future__ import annotations

from itertools import product

import torch

from kit.kernels.gumbel import draw, draw_reference
from kit.recipes.card.compare import DTYPES, ROUNDING, judge, judge_equal, name_of, normal, poisoned
from kit.recipes.card.results import Card, Results, Skip

SETTINGS = {  # the sixth row of each is flat, so that top_p searches all of its logits
    "whole": {},
    "greedy": {"temperature": 0.0},
    "top_p": {"temperature": 0.6, "top_p": 0.95},
    "top_k and top_p": {"temperature": 1.3, "top_k": 100, "top_p": 0.8},
}


def run(results: Results, card: Card) -> None:
    cases = list(product(DTYPES, (530, 77) if card.small else (151_936, 262_144, 1_001), SETTINGS))
    for dtype, V, label in cases[:: 5 if card.quick else 1]:
        name = f"draw {label} {name_of(dtype)} V = {V:,}"
        results.run(name, check_draw, dtype, V, SETTINGS[label], seconds=2)
    card.free()


def check_draw(results: Results, card: Card, name: str, dtype: torch.dtype, V: int, settings: dict) -> None:
    torch.manual_seed(9)
    rows = 7 if card.small else 32
    logits = normal(card, rows, V, dtype=dtype, scale=3.0)
    logits[5], logits[6, : V // 2] = 0.01 * logits[5], -torch.inf
    logits[4, V // 3] = torch.nan
    streams = torch.randint(-(2**62), 2**62, (rows,)), torch.arange(rows)
    with poisoned():
        tokens, logprobs = draw(logits, *(x.to(card.device) for x in streams), **settings)

    on_cpu = logits.cpu()
    expected, torchs = draw_reference(on_cpu, *streams, **settings)
    tokens, logprobs = tokens.cpu(), logprobs.cpu()
    seen = not logprobs[4].isfinite() and bool(((tokens >= 0) & (tokens < V)).all())
    results.check(f"{name}: a NaN is seen in its log-prob, and no token is outside the vocabulary", seen)
    sound = torch.arange(rows) != 4
    judge_equal(results, f"{name}: tokens", {"tokens": (tokens[sound], expected[sound])})
    # of the tokens that were drawn, which are the same here
    _, truth = draw_reference(on_cpu.double(), *streams, **settings)
    same = sound & (tokens == expected)
    if not same.any():
        raise Skip("no token is the same, so no log-probs are those of the same token")
    floor = ROUNDING * truth[same].abs().max().item()
    sides = [logprobs[same]], [torchs[same]], [truth[same]], [floor]
    judge(results, f"{name}: log-probs", ["logprob"], *sides)
