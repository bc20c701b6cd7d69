"""Packed attention beside torch's, forward and backward. --attention auto picks by these times."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kit.kernels.packed_attention import packed_attention
from kit.models.attention import OURS, VARLEN, varlen_attention, varlen_obstacle
from kit.recipes.card.compare import attempt, normal, running_sum
from kit.recipes.card.results import Card, Results
from kit.recipes.card.timing import Limits, milliseconds

SHAPES = [(14, 2, 64), (12, 2, 128), (4, 1, 256), (24, 8, 128)]  # Hq, Hkv, D; quick takes the first three
FLASH = "SDPA flash"
Prepared = tuple[list[Tensor], Callable[[], Tensor]]  # leaves, and a call that computes the output from them


def run(results: Results, card: Card, limits: Limits) -> None:
    card.need_rtx_30("attention runs in plain torch")
    T, window = (64, 8) if card.small else (16_384, 512)
    ratios: list[float] = []
    for Hq, Hkv, D in SHAPES[: 3 if card.quick else None]:
        for length in (T // 4,) if card.quick else (T, T // 4, T // 64):
            for cut in (None, window) if D == 256 and length > window else (None,):
                time_case(results, card, limits, (T, Hq, Hkv, D), length, cut, ratios)
                card.free()
    if card.is_cuda and ratios:
        text = f"{min(ratios):.2f}x to {max(ratios):.2f}x the time of SDPA's flash attention"
        results.figure("attention beside flash", text, headline=f"attention {text}")


def time_case(results, card, limits, shape, length, window, ratios) -> None:
    """Time one shape and length of documents; append our time over SDPA flash's to ratios."""
    T, Hq, Hkv, D = shape
    lengths = [length] * (T // length)
    name = f"attention {Hq}/{Hkv} heads D{D}, {len(lengths)} x {length:,}"
    if window is not None:
        name += f", window {window}"
    n = min(window or length, length)
    pairs = len(lengths) * (n * (n + 1) // 2 + (length - n) * n)  # of a query and a key that it sees
    flops = 4 * D * Hq * pairs  # forward; backward has 2.5 times as many
    with results.case(name):  # 4 contestants, 50 forward passes' worth each
        results.need(seconds=5 + 200 * flops / limits.matmul_tflops / 1e12)
        torch.manual_seed(0)
        q, k, v = (normal(card, T, heads, D) for heads in (Hq, Hkv, Hkv))
        cu_seqlens = running_sum(card, lengths)
        ours = forward_and_backward(card, *packed(packed_attention)(q, k, v, cu_seqlens, length, window))
        rates = flops / ours[0] / 1e9, 2.5 * flops / ours[1] / 1e9
        words = [f"ours {ours[0]:.2f} + {ours[1]:.2f} ms, {rates[0]:.0f} and {rates[1]:.0f} TFLOP/s"]

        times = {OURS: ours}
        for peer, prepare in PEERS.items():
            found, why = None, refusal(card, peer, D, window)
            if not why:
                found, why = with_either_layout(card, prepare, q, k, v, cu_seqlens, length, window)
            if found is None:
                words.append(f"{peer}: {why}")
                continue
            times[peer] = found
            words.append(f"{peer} {found[0]:.2f} + {found[1]:.2f} ms{why}")
        if FLASH in times:
            ratios.append(sum(ours) / sum(times[FLASH]))
        found = {"milliseconds": times, "tflops": rates, "head_dim": D, "window": window}
        results.figure(name, "; ".join(words), **found, **card.facts)


def refusal(card: Card, peer: str, head_dim: int, window: int | None) -> str:
    """Return why a peer cannot run at all; "" if it can."""
    if peer == VARLEN:
        return varlen_obstacle(head_dim, card.device, torch.bfloat16)
    return "has no window" if window is not None else ""


def with_either_layout(card, prepare, q, k, v, cu_seqlens, length, window) -> tuple[tuple | None, str]:
    """Time a peer, with K and V repeated if it takes no groups of heads. Return its times, and a remark."""

    def run_peer(keys, values):
        leaves, call = prepare(q, keys, values, cu_seqlens, length, window)
        return forward_and_backward(card, leaves, call)

    found, why = attempt(card, run_peer, k, v)
    group = q.shape[1] // k.shape[1]
    if found is None and group > 1:
        found, _ = attempt(card, run_peer, *(x.repeat_interleave(group, dim=1) for x in (k, v)))
        why = " with K and V repeated" if found else why
    return found, why


def forward_and_backward(card, leaves, call) -> tuple[float, float]:
    """Return the milliseconds of each."""
    with torch.no_grad():
        forward = milliseconds(card, call)
    out = call()
    dout = torch.randn_like(out)
    backward = milliseconds(card, lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
    return forward, backward


def packed(function: Callable) -> Callable[..., Prepared]:
    """Return a contestant that takes the documents as a pack."""

    def prepare(q, k, v, cu_seqlens, length, window) -> Prepared:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return leaves, lambda: function(*leaves, cu_seqlens, length, window=window)

    return prepare


def sdpa(backend: SDPBackend) -> Callable[..., Prepared]:
    """Return a peer that takes documents of one length as a batch: torch at its best."""

    def prepare(q, k, v, cu_seqlens, length, window) -> Prepared:
        is_grouped = k.shape[1] != q.shape[1]
        # (documents, heads, n, D)
        batches = (x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        leaves = [x.detach().requires_grad_() for x in batches]

        def call():
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=is_grouped)

        return leaves, call

    return prepare


PEERS = {
    FLASH: sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    VARLEN: packed(varlen_attention),
}
