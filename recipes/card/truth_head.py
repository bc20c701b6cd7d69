"""The linear head against float64: linear_cross_entropy, and the head in blocks of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kit.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kit.kernels.linear_cross_entropy_blocks import dweight_blocks, loss_without_dweight
from kit.machine import GIB
from kit.packing import IGNORE_INDEX
from kit.recipes.card.compare import ROUNDING, judge, judge_equal, name_of, normal, poisoned, rms
from kit.recipes.card.results import Card, Results

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LOGITS = 2**25  # held at once by the float64 truth: 256 MiB, a few times


def run(results: Results, card: Card) -> None:
    check_vocabularies(results, card)
    check_options(results, card)
    check_blocked_head(results, card)


def make_inputs(card: Card, N: int, V: int, H: int, dtype: torch.dtype, ignored: bool = True) -> list[Tensor]:
    """Return hidden (N, H), weight (V, H) and targets (N,), of which a fifth is ignored."""
    torch.manual_seed(0)
    hidden, weight = normal(card, N, H, dtype=dtype), normal(card, V, H, dtype=dtype, scale=H**-0.5)
    targets = torch.randint(V, (N,), device=card.device)
    targets[0], targets[1] = 0, V - 1
    if ignored:
        targets[2::5] = IGNORE_INDEX
    return [hidden, weight, targets]


class Plain(NamedTuple):
    """What torch computes. spread: the size of a token loss, or of their sum if nothing cancelled in it."""

    loss: Tensor
    dhidden: Tensor
    dweight: Tensor | None
    spread: float


def plain_head(
    hidden,
    weight,
    targets,
    dtype,
    rows,
    *,
    reduction="mean",
    token_weight=None,
    objective=None,
    upstream=None,
    trains_head=True,
    **score,
) -> Plain:
    """Compute loss and gradients by torch's autograd in dtype, so many rows of logits at once.

    score: softcap and temperature.
    """
    h, w = hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_(trains_head)
    kept, pieces = targets != IGNORE_INDEX, []
    D = max(int(kept.sum()), 1) if reduction == "mean" else 1
    for part in torch.arange(len(h), device=h.device).split(rows):
        losses = linear_cross_entropy_reference(h[part], w, targets[part], reduction="none", **score)
        if objective is not None:
            losses = objective(-losses, part).masked_fill(~kept[part], 0)
        if token_weight is not None:
            losses = losses * token_weight[part].to(losses.dtype)

        total = losses if upstream is None else losses * upstream[part].to(losses.dtype)
        (total.sum() / D).backward()
        pieces.append(losses.detach())
        del losses, total
    losses = torch.cat(pieces)
    if reduction == "none":
        return Plain(losses, h.grad, w.grad, rms(losses))
    return Plain(losses.sum() / D, h.grad, w.grad, rms(losses) * len(h) / D)


def our_head(hidden, weight, targets, *, upstream=None, trains_head=True, **options) -> tuple:
    """Return loss, dhidden, dweight."""
    h, w = hidden.detach().clone().requires_grad_(), weight.detach().requires_grad_(trains_head)
    with poisoned():
        loss = linear_cross_entropy(h, w, targets, **options)
        loss.backward(None if upstream is None else upstream.to(loss.dtype))
    return loss.detach(), h.grad, w.grad


def compare(results, name, ours: tuple, torchs: Plain, truth: Plain, dtype: torch.dtype, text="") -> None:
    """Judge loss, dX and dW; no dW if the head is frozen."""
    eps, N = torch.finfo(dtype).eps, len(truth.dhidden)
    loss_eps = eps
    if not truth.loss.dim():
        loss_eps = max(eps * N**-0.5, ROUNDING)  # in a sum, the roundings of N tokens mostly cancel
    count = 2 if truth.dweight is None else 3
    floors = [loss_eps * truth.spread, *(eps * rms(x) for x in truth[1:count])]
    sides = (side[:count] for side in (("loss", "dX", "dW"), ours, torchs, truth))
    judge(results, name, *sides, floors, text)


def check_vocabularies(results: Results, card: Card) -> None:
    """Check vocabularies of real models, in the chunks of rows that linear_cross_entropy chooses."""
    cases = [(262_144, BF16), (151_936, FP32), (151_936, BF16), (262_144, FP32)]
    for V, dtype in cases[: 1 if card.quick else None]:
        name = f"linear_cross_entropy mean {name_of(dtype)} V = {V:,}"
        sizes = (40, 530, 24) if card.small else largest_head(card, V)
        gib = 0 if sizes[0] >= 40 else 6  # for float64
        results.run(name, check_head, *sizes, dtype, seconds=12, gib=gib)
        card.free()


def largest_head(card: Card, V: int) -> tuple[int, int, int]:
    """Return (N, V, H) that fit: float64 takes 26 bytes per weight; torch then takes 20, and 20 per logit."""
    H = 1152 if card.gib > 11 else 640
    room = (card.gib - 1.5) * GIB
    N = min(3000, int((room - 20 * V * H) / (20 * V)))
    return (N if room > 26 * V * H else 0), V, H


def check_head(results, card, name, N, V, H, dtype, *, ignored=True, ours_only=None, **options) -> None:
    """Check one head. ours_only: settings that change how the loss is computed and not what it is."""
    hidden, weight, targets = make_inputs(card, N, V, H, dtype, ignored)
    if options.get("reduction") == "none":
        options["upstream"] = torch.linspace(-2, 3, N, device=card.device)
    truth = plain_head(hidden, weight, targets, FP64, max(1, LOGITS // V), **options)
    ours = our_head(hidden, weight, targets, **options, **(ours_only or {}))
    torchs = plain_head(hidden, weight, targets, dtype, N, **options)
    compare(results, name, ours, torchs, truth, dtype, f"N = {N:,}, V = {V:,}, H = {H:,}")


def clipped_surrogate(card: Card, N: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return GRPO's objective of N tokens."""
    torch.manual_seed(9)
    old, advantage = -12 + torch.randn(N, device=card.device), torch.randn(N, device=card.device)

    def objective(logprobs, rows):
        ratio = (logprobs - old[rows].to(logprobs.dtype)).exp()
        gain = advantage[rows].to(logprobs.dtype)
        return -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)

    return objective


def check_options(results: Results, card: Card) -> None:
    """Check each option on a narrow head, in several chunks of rows."""
    N, V, H = (40, 300, 24) if card.small else (1000, 151_936, 256)
    chunks = {"max_rows": N // 4}
    torch.manual_seed(5)
    weighted = {"token_weight": torch.randn(N, device=card.device)}
    objective = clipped_surrogate(card, N)
    cases = [  # quick takes the first four
        ("objective, weight, softcap", BF16, {**weighted, "objective": objective, "softcap": 20.0}),
        ("none, softcap, temperature", BF16, {"reduction": "none", "softcap": 5.0, "temperature": 1.3}),
        ("frozen head", BF16, {"trains_head": False}),
        ("sum", FP16, {"reduction": "sum"}),
        ("sum", BF16, {"reduction": "sum"}), ("none", BF16, {"reduction": "none"}),
        ("softcap", BF16, {"softcap": 30.0}), ("temperature", BF16, {"temperature": 0.7}),
        ("token_weight", BF16, weighted), ("mean", FP16, {}),
        ("objective", BF16, {"objective": objective}), ("objective", FP32, {"objective": objective}),
        ("none, softcap, temperature", FP32, {"reduction": "none", "softcap": 5.0, "temperature": 1.3}),
        ("nothing ignored", BF16, {"ignored": False}), ("one chunk", BF16, {"ours_only": {}}),
        ("overwrite_hidden", BF16, {"ours_only": chunks | {"overwrite_hidden": True}}),
    ]  # fmt: skip
    for label, dtype, options in cases[: 4 if card.quick else None]:
        name = f"linear_cross_entropy {label} {name_of(dtype)}"
        results.run(name, check_head, N, V, H, dtype, seconds=3, **{"ours_only": chunks, **options})

    name = "linear_cross_entropy, all ignored"
    with results.case(name):
        hidden, weight, targets = make_inputs(card, 40, V, H, BF16)
        found = our_head(hidden, weight, targets.fill_(IGNORE_INDEX))
        labels = "loss", "dX", "dW"
        pairs = {label: (x, torch.zeros_like(x)) for label, x in zip(labels, found, strict=True)}
        judge_equal(results, name, pairs)
    card.free()


def check_blocked_head(results: Results, card: Card) -> None:
    for dtype, softcap in ((BF16, 30.0), (BF16, None), (FP32, None))[: 1 if card.quick else None]:
        name = f"blocked head {name_of(dtype)} softcap {softcap or 'none'}"
        results.run(name, check_blocks, dtype, softcap, seconds=3)
        card.free()


def check_blocks(results: Results, card: Card, name: str, dtype: torch.dtype, softcap: float | None) -> None:
    """Check the weight gradient that is computed block by block of the vocabulary."""
    N, V, H = (40, 530, 24) if card.small else (1000, 151_936, 256)
    scale, size = 1 / 800, {"block_bytes": 1} if card.small else {}
    inputs = make_inputs(card, N, V, H, dtype)
    upstream = torch.full((N,), scale, device=card.device)
    options = {"reduction": "sum", "softcap": softcap, "upstream": upstream}
    truth = plain_head(*inputs, FP64, max(1, LOGITS // V), **options)
    torchs = plain_head(*inputs, dtype, N, **options)

    dweight = torch.full((V, H), torch.nan, device=card.device)
    with torch.no_grad(), poisoned():
        loss, dhidden, *sums = loss_without_dweight(*inputs, scale, softcap=softcap)
        for first, part in dweight_blocks(*inputs, *sums, scale, softcap=softcap, **size):
            dweight[first : first + len(part)] = part
    compare(results, name, (loss / scale, dhidden, dweight), torchs, truth, dtype)
