"""Packed attention with a window beside torch's flex_attention, with heads as in Gemma-3-1B's sliding layers.

flex_attention is fast only if torch.compile has compiled it, for tens of seconds. So this section comes last,
runs only if time is left, and is the only place of the kit that compiles anything by torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kit.kernels.packed_attention import packed_attention
from kit.models.attention import OURS
from kit.recipes.card.compare import ROUNDING, attempt, judge, normal, rms, rms_error, running_sum
from kit.recipes.card.results import Card, Results, Skip
from kit.recipes.card.speed_attention import forward_and_backward, packed
from kit.recipes.card.truth_attention import true_attention

FLEX = "flex_attention"
Hq, Hkv, D = 4, 1, 256
SECONDS = 60  # to compile forward and backward; an assumption


def run(results: Results, card: Card) -> None:
    """Check that the block mask means what our arguments mean, then time both."""
    if card.quick:
        raise Skip("not with --quick")
    results.run(f"the mask of {FLEX}", check_mask, seconds=10)
    T, window = (64, 8) if card.small else (16_384, 512)
    name = f"attention beside {FLEX}, D{D}, 4 x {T // 4:,}, window {window}"
    # making the mask takes T^2 int64 numbers, and T^2 bools a few times
    results.run(name, time_both, T, window, seconds=SECONDS, gib=4)
    card.free()


def check_mask(results: Results, card: Card, name: str) -> None:
    """Judge the output of flex_attention, not compiled, by float64 and beside ours."""
    torch.manual_seed(0)
    lengths, window = [1, 5, 16, 17, 24, 1], 7
    inputs = [normal(card, sum(lengths), heads, D, dtype=torch.float32) for heads in (Hq, Hkv, Hkv, Hq)]
    q, k, v, _ = inputs
    cu_seqlens = running_sum(card, lengths)
    found, why = attempt(card, lambda: flex(q, k, v, cu_seqlens, window)())
    if found is None:
        raise Skip(why)
    ours = packed_attention(q, k, v, cu_seqlens, max(lengths), window=window)
    truth = true_attention(*inputs, lengths, window)[0]
    judge(results, name, ["out"], [found], [ours], [truth], [ROUNDING * rms(truth)], "beside ours")


def time_both(results: Results, card: Card, name: str, T: int, window: int) -> None:
    """Time four documents. If flex_attention fails, as on a CPU, where it has no backward, say why."""
    torch.manual_seed(0)
    q, k, v = (normal(card, T, heads, D) for heads in (Hq, Hkv, Hkv))
    length, cu_seqlens = T // 4, running_sum(card, [T // 4] * 4)
    ours = forward_and_backward(card, *packed(packed_attention)(q, k, v, cu_seqlens, length, window))
    text = f"ours {ours[0]:.2f} + {ours[1]:.2f} ms; {FLEX}"
    found, why = attempt(card, time_flex, card, q, k, v, cu_seqlens, window)
    if found is None:
        raise Skip(f"{text}: {why}")

    theirs, out = found
    expected = packed_attention(q, k, v, cu_seqlens, length, window=window)
    apart = rms_error(out, expected) / rms(expected)
    text += f" {theirs[0]:.2f} + {theirs[1]:.2f} ms; their outputs are {apart:.1e} apart"
    results.figure(name, text, milliseconds={OURS: ours, FLEX: theirs}, head_dim=D, window=window)


def time_flex(card: Card, q, k, v, cu_seqlens, window) -> tuple[tuple[float, float], Tensor]:
    """Return the milliseconds of forward and backward, and the output."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    call = flex(*leaves, cu_seqlens, window, compiled=card.is_cuda)
    return forward_and_backward(card, leaves, call), call().detach()


def flex(q, k, v, cu_seqlens, window, *, compiled: bool = False) -> Callable[[], Tensor]:
    """Return a call that computes packed_attention by flex_attention.

    Its block mask is made here, once, and is not timed.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = len(q)
    document = torch.searchsorted(cu_seqlens, torch.arange(T, device=q.device), right=True)

    def sees(batch, head, i, j):
        return (document[i] == document[j]) & (i >= j) & (i - j < window)

    mask = create_block_mask(sees, None, None, T, T, device=q.device)
    function = torch.compile(flex_attention) if compiled else flex_attention

    def call() -> Tensor:
        batch = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, T, D)
        return function(*batch, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return call
