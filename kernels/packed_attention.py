"""Causal attention inside the documents of a pack: no token sees another document, and nothing is padded.

    o[i] = sum_j softmax_j(scale * q_i . k_j) v_j      over document(j) == document(i), 0 <= i - j < window

One `scaled_dot_product_attention` a document. It is causal by its own flag, so no (T, T) mask is ever made: a boolean mask
of a 16,384-token row would be 256 MiB, and its scores 8 GiB a layer in fp32 for 8 heads. Where a window cuts a document,
its queries go in blocks of one window, each against the two windows of keys it can see. Queries of one group share their K
and V head without repeating it. Runs on any device; work is the sum of the documents' causal areas, not T squared.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F


def packed_attention_reference(q, k, v, cu_seqlens, max_seqlen, *, window=None, scale=None):
    """The same function as one masked square: the meaning of this file, and its test."""
    T, Hq, D = q.shape
    k, v = (x.repeat_interleave(Hq // x.shape[1], dim=1) for x in (k, v))
    document = torch.searchsorted(cu_seqlens[1:].long(), torch.arange(T, device=q.device), right=True)
    position = torch.arange(T, device=q.device)
    distance = position[:, None] - position[None, :]
    seen = (document[:, None] == document[None, :]) & (distance >= 0) & (distance < (window or T))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (D**-0.5 if scale is None else scale)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, *,
    window: int | None = None, scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention output (T, Hq, D), differentiable in q, k and v.

    q: (T, Hq, D); k, v: (T, Hkv, D) with Hq a multiple of Hkv, one dtype and device. cu_seqlens: (documents + 1,) integers, 0
    first, T last. max_seqlen: tokens of the longest document. window: a query sees keys at distance < window; None = all
    before it. scale: None = 1 / sqrt(D). Raises ValueError naming the argument that does not fit.
    """
    T, Hq, D = q.shape
    Hkv = k.shape[1]
    if k.shape != v.shape or k.shape[0] != T or k.shape[2] != D or Hq % Hkv:
        raise ValueError(
            f"q is (T, Hq, D) = {tuple(q.shape)}, k and v must be (T, Hkv, D) with Hkv dividing Hq, "
            f"but k is {tuple(k.shape)} and v is {tuple(v.shape)}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window is {window} but a token sees at least itself; pass window >= 1, or None for no window")
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != T or min(lengths, default=0) < 1:
        raise ValueError(
            f"cu_seqlens must rise from 0 to T = {T} by at least 1 a document, but is {bounds[:3]} ... {bounds[-3:]}"
        )
    if max(lengths) > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen} but the longest document has {max(lengths)} tokens; pass that")
    # (1, heads, T, D) views; splitting along T copies nothing
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    documents = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
    outputs = [_one_document(*document, window, scale) for document in documents]
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)


def _one_document(q, k, v, window: int | None, scale: float | None) -> torch.Tensor:
    """(1, Hq, n, D), (1, Hkv, n, D) twice -> (1, Hq, n, D)"""
    n = q.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if window is None or n <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    outputs = []
    for start in range(0, n, window):
        end, first = min(start + window, n), max(start - window + 1, 0)
        distance = torch.arange(start, end, device=q.device)[:, None] - torch.arange(first, end, device=q.device)[None, :]
        seen = (distance >= 0) & (distance < window)
        outputs.append(
            F.scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], attn_mask=seen, scale=scale, enable_gqa=gqa
            )
        )
    return torch.cat(outputs, dim=2)
