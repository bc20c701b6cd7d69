"""Decode attention beside torch's, which reads all rows as far as the longest: even rows, and a long one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kit.kernels.decode_attention import decode_attention
from kit.machine import GIB
from kit.recipes.card.compare import attempt, normal
from kit.recipes.card.memory import held_gib
from kit.recipes.card.results import Card, Results
from kit.recipes.card.timing import Limits, milliseconds

HEADS = [(14, 2, 64), (24, 8, 128), (4, 1, 256)]  # Hq, Hkv, D; quick takes the first
PEER = "SDPA under a mask"


def run(results: Results, card: Card, limits: Limits) -> None:
    card.need_rtx_30("decode attention runs in plain torch")
    brief, long, rows = (20, 100, 4) if card.small else (200, 16_000, 32)
    for heads in HEADS[: 1 if card.quick else None]:
        name = f"decode attention {heads[0]}/{heads[1]} heads D{heads[2]}, "
        name += f"[{long:,}] + [{brief}] x {rows - 1} against [{brief}] x {rows}"
        bytes_held = 2 * rows * heads[1] * (long + 64) * heads[2] * 2
        gib = held_gib(card) + 2 * bytes_held / GIB + 0.5
        lengths = {"even": [brief] * rows, "uneven": [long] + [brief] * (rows - 1)}
        results.run(name, time_rows, limits, heads, lengths, seconds=3, gib=gib)
        card.free()


def time_rows(results, card, name, limits, heads, lengths: dict[str, list[int]]) -> None:
    """Time one layer at both sets of lengths, in the same cache."""
    (Hq, Hkv, D), B, W = heads, len(lengths["even"]), max(lengths["uneven"]) + 64
    q = normal(card, B, Hq, D)
    k, v = (normal(card, B, Hkv, W, D) for _ in range(2))
    times: dict[str, dict[str, float]] = {"ours": {}, PEER: {}}
    failed, words = [], []
    for label, each in lengths.items():
        held = torch.tensor(each, device=card.device)
        ours = times["ours"][label] = milliseconds(card, lambda held=held: decode_attention(q, k, v, held))
        gbs = 2 * sum(each) * Hkv * D * q.element_size() / ours / 1e6
        text = f"{label} {ours:.3f} ms, {gbs / limits.copy_gbs:.0%} of copy bandwidth"
        theirs, why = attempt(card, milliseconds, card, masked(q, k, v, held, max(each)))
        if theirs is None:
            failed.append(f"{PEER}, {label}: {why}")
        else:
            times[PEER][label] = theirs
            text += f", {theirs / ours:.2f}x as fast as {PEER}"
        words.append(text)
    words.append(f"uneven / even {times['ours']['uneven'] / times['ours']['even']:.2f}")
    results.figure(name, "; ".join([*failed, *words]), milliseconds=times)


def masked(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, longest: int):
    """Return a call of torch's attention as the sampler makes it without the kernel."""
    groups = q.unflatten(1, (k.shape[1], -1))  # (B, Hkv, Hq / Hkv, D)
    keys, values = k[:, :, :longest], v[:, :, :longest]
    unseen = torch.arange(longest, device=q.device) >= lengths[:, None]
    mask = q.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)[:, None, None]

    def call() -> Tensor:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(groups, keys, values, attn_mask=mask)

    return call
