"""Decode attention against float64, and in a CUDA graph whose lengths change."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from kit.kernels.decode_attention import MIN_SPLIT, decode_attention, decode_attention_reference
from kit.recipes.card.compare import DTYPES, judge, judge_equal, name_of, normal, poisoned, rms
from kit.recipes.card.results import Card, Results, Skip

HEADS = (14, 2, 64), (24, 8, 128), (4, 1, 256), (7, 7, 80)  # of q and of k, D. quick takes the first three


def run(results: Results, card: Card) -> None:
    card.need_rtx_30("decode attention runs in plain torch")
    W, window = (48, 20) if card.small else (4_096, 512)
    lengths = [W + 9, 1, 16, 17, 3 * W] if card.small else [W + 900, 1, 63, MIN_SPLIT, MIN_SPLIT + 1, 3 * W]
    for heads, dtype in product(HEADS[: 3 if card.quick else None], DTYPES[:: 2 if card.quick else 1]):
        for cut in (None, window):
            name = f"decode attention {name_of(dtype)} D{heads[-1]} group {heads[0] // heads[1]} "
            name += f"window {cut or 'none'}"
            results.run(name, check_case, dtype, heads, W, lengths, cut, seconds=1, gib=4)
        card.free()
    with results.case("decode attention in a CUDA graph"):
        check_graph(results, card, W, lengths)


def make_inputs(
    card: Card, dtype: torch.dtype, heads: tuple[int, int, int], W: int, lengths: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, caches and lengths. Places that no position was written to hold NaN."""
    (Hq, Hkv, D), B = heads, len(lengths)
    torch.manual_seed(9)
    q = normal(card, B, Hq, D, dtype=dtype)
    k, v = (normal(card, B, Hkv, W, D, dtype=dtype) for _ in range(2))
    for row, length in enumerate(lengths):
        k[row, :, length:] = v[row, :, length:] = torch.nan
    return q, k, v, torch.tensor(lengths, device=card.device)


def check_case(results, card, name, dtype, heads, W, lengths, window) -> None:
    q, k, v, lengths = make_inputs(card, dtype, heads, W, lengths)
    written = [q, k.nan_to_num(0), v.nan_to_num(0)]
    truth = decode_attention_reference(*(x.double() for x in written), lengths, window=window)
    peer = decode_attention_reference(*written, lengths, window=window)
    with poisoned():
        ours = decode_attention(q, k, v, lengths, window=window)
    judge(results, name, ["out"], [ours], [peer], [truth], [torch.finfo(dtype).eps * rms(truth)])


def check_graph(results: Results, card: Card, W: int, lengths: list[int]) -> None:
    """Capture a call once, and replay it with other lengths: the bits are those of a call of its own."""
    if not card.is_cuda:
        raise Skip("a CUDA graph needs a card")
    q, k, v, held = make_inputs(card, torch.bfloat16, HEADS[0], W, [W] * len(lengths))
    held.fill_(1)
    decode_attention(q, k, v, held)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, held)
    pairs = {}
    for add in (0, 1, W):
        held.copy_(torch.tensor(lengths) + add)
        graph.replay()
        pairs[f"lengths + {add}"] = out.clone(), decode_attention(q, k, v, held)
    judge_equal(results, "decode attention in a CUDA graph", pairs)
