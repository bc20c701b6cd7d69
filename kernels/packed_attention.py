"""
Causal attention inside the documents of a pack: no token sees another document, and nothing is padded.

    s[i, j] = scale * q_i . k_j              for document(j) == document(i) and 0 <= i - j < window, else -inf
    L[i]    = logsumexp_j s[i, j]            p[i, j] = exp(s[i, j] - L[i])           o[i] = sum_j p[i, j] v_j
    dv[j]   = sum_i p[i, j] do_i             ds[i, j] = p[i, j] (do_i . v_j - do_i . o_i)
    dq[i]   = scale * sum_j ds[i, j] k_j     dk[j] = scale * sum_i ds[i, j] q_i   over k's query heads

How it works. A program walks the keys that its tile of queries can see and keeps, in fp32, the largest score
so far, the sum of exponentials and the weighted sum of v. It rescales the two sums whenever the maximum
grows; scores exist for one tile only. It writes o and one number per query, L, from which backward
recomputes p: one kernel walks keys for dQ, one walks queries for dK and dV. Tiles are counted from each
document's start, and those that are masked as a whole are never visited. K and V are read per group, not
repeated.

16,384 tokens of Gemma-3-1B (4 query heads, 1 head of K and V, D = 256, bf16), per layer: q and o take 32 MiB
each, k and v 8, L 0.25; backward adds dq, dk, dv (48) and 0.25. The scores as one square would be 2 GiB in
bf16 and 4 in fp32, a boolean mask 256 MiB.

The kernels are in packed_attention_tiles.py. CPU tensors use torch's flash attention, one document at a time,
behind the same two operators. On other devices without tensor cores that Triton can use (Turing, Apple), it
is one `scaled_dot_product_attention` per document.
"""

import warnings
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from kit.kernels import packed_attention_tiles as tiles
from kit.kernels.backend import has_tensor_cores, uses_triton

DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64
WHOLE_DOCUMENT = 2**30  # window = None: more than any document, and its sum with a position fits int32
# cu_seqlens -> what it was accepted for, so that a model of 26 layers checks it once
_accepted = WeakTensorKeyDictionary()


def packed_attention_reference(q, k, v, cu_seqlens, max_seqlen, *, window=None, scale=None):
    """Compute the same as one masked square: what this file means, and what its tests compare with."""
    T, Hq, D = q.shape
    k, v = (x.repeat_interleave(Hq // x.shape[1], dim=1) for x in (k, v))
    document = torch.searchsorted(cu_seqlens[1:].long(), torch.arange(T, device=q.device), right=True)
    position = torch.arange(T, device=q.device)
    distance = position[:, None] - position[None, :]
    seen = (document[:, None] == document[None, :]) & (distance >= 0) & (distance < (window or T))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (D**-0.5 if scale is None else scale)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def _bounds(cu_seqlens: Tensor, T: int, max_seqlen: int) -> list[int]:
    """Return the values of cu_seqlens after checking them. On a GPU this waits for the device.

    A fake tensor has no values: the documents are then as long as max_seqlen allows.
    """
    if isinstance(cu_seqlens, FakeTensor):
        return [*range(0, T, max_seqlen), T]
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != T or min(lengths, default=1) < 1:
        raise ValueError(
            f"cu_seqlens must rise from 0 to T = {T} by at least 1 per document, but is {bounds[:3]} ... "
            f"{bounds[-3:]}; pass the running sum of the documents' lengths, with a 0 in front"
        )
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"max_seqlen is {max_seqlen} but the longest document has {max(lengths)} tokens; pass that"
        )
    return bounds


def _accept(cu_seqlens: Tensor, T: int, max_seqlen: int) -> None:
    """Raise the errors of _bounds, unless this tensor was accepted before and has not changed since."""
    if cu_seqlens.is_inference():  # has no version, so whether it has changed cannot be known
        _bounds(cu_seqlens, T, max_seqlen)
    elif _accepted.get(cu_seqlens) != (claim := (T, max_seqlen, cu_seqlens._version)):
        _bounds(cu_seqlens, T, max_seqlen)
        _accepted[cu_seqlens] = claim


def accept_copy(copy: Tensor, cu_seqlens: Tensor, T: int, max_seqlen: int) -> None:
    """Check cu_seqlens on the host for its copy on a card, which then need not be waited for to be read.

    T, max_seqlen: as packed_attention will take them. Raises ValueError as it does.
    """
    _bounds(cu_seqlens, T, max_seqlen)
    if not copy.is_inference():
        _accepted[copy] = T, max_seqlen, copy._version


def _pieces(bounds: list[int], window: int) -> Iterator[tuple[slice, slice, bool]]:
    """Yield (queries, keys they see, whether the window cuts them), for the torch paths.

    A document longer than the window is split into blocks of one window of queries, each with the two windows
    of keys that it can see.
    """
    for start, end in pairwise(bounds):
        if end - start <= window:
            yield slice(start, end), slice(start, end), False
            continue
        for first in range(start, end, window):
            last = min(first + window, end)
            yield slice(first, last), slice(max(first - window + 1, start), last), True


def _window_mask(queries: slice, keys: slice, window: int, like: Tensor) -> Tensor:
    """Return what is added to the scores of a piece: 0 or -inf."""
    i, j = (torch.arange(x.start, x.stop, device=like.device) for x in (queries, keys))
    distance = i[:, None] - j[None, :]
    mask = like.new_zeros(distance.shape)
    return mask.masked_fill_((distance < 0) | (distance >= window), -torch.inf)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """Return views (1, heads, T, D), which torch's attention expects."""
    return [x.transpose(0, 1).unsqueeze(0) for x in tensors]


def _rows(x: Tensor, rows: slice) -> Tensor:
    return x.narrow(2, rows.start, rows.stop - rows.start)  # (1, heads, n, D), a view


# What F.scaled_dot_product_attention calls on a CPU. It gives its logsumexp only by these names.
_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _stride_1(*tensors: Tensor) -> list[Tensor]:
    """Copy those whose D numbers are not adjacent: the gradient of .sum(), for example, has strides of 0."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


@torch.library.custom_op("kit::packed_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (out (T, Hq, D), logsumexp (Hq, T))."""
    T = q.shape[0]
    q, k, v = _stride_1(q, k, v)
    if uses_triton(q):
        _accept(cu_seqlens, T, max_seqlen)
        return tiles.forward(q, k, v, cu_seqlens, window, scale)

    out = q.new_empty(q.shape)
    logsumexp = q.new_empty(q.shape[1], T, dtype=torch.promote_types(q.dtype, torch.float32))
    *inputs, outputs = _heads_first(q, k, v, out)
    for queries, keys, is_cut in _pieces(_bounds(cu_seqlens, T, max_seqlen), window):
        mask = _window_mask(queries, keys, window, q) if is_cut else None
        piece = map(_rows, inputs, (queries, keys, keys))
        piece_out, piece_logsumexp = _cpu_forward(*piece, is_causal=mask is None, attn_mask=mask, scale=scale)
        _rows(outputs, queries).copy_(piece_out)
        logsumexp[:, queries] = piece_logsumexp[0]
    return out, logsumexp


@torch.library.custom_op("kit::packed_attention_backward", mutates_args=())
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor,
    cu_seqlens: Tensor, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dq, dk, dv)."""
    dout, q, k, v = _stride_1(dout, q, k, v)
    if uses_triton(q):
        return tiles.backward(dout, q, k, v, out, logsumexp, cu_seqlens, window, scale)

    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    inputs, (into_dq, into_dk, into_dv) = _heads_first(dout, q, k, v, out), _heads_first(dq, dk, dv)
    for queries, keys, is_cut in _pieces(cu_seqlens.tolist(), window):
        mask = _window_mask(queries, keys, window, q) if is_cut else None
        piece = map(_rows, inputs, (queries, queries, keys, keys, queries))
        gradients = _cpu_backward(
            *piece, logsumexp[None, :, queries], 0.0, mask is None, attn_mask=mask, scale=scale
        )
        _rows(into_dq, queries).copy_(gradients[0])
        _rows(into_dk, keys).add_(gradients[1])  # pieces of one document share keys
        _rows(into_dv, keys).add_(gradients[2])
    return dq, dk, dv


@_forward.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, window, scale):
    T, Hq, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(Hq, T, dtype=torch.promote_types(q.dtype, torch.float32))


@_backward.register_fake
def _(dout, q, k, v, out, logsumexp, cu_seqlens, window, scale):
    delta = torch.empty_like(logsumexp)  # noqa: F841  the kernels' scratch, for those who count allocations
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _PackedAttention(torch.autograd.Function):
    """Backward computes all three gradients: a model wants all of them, and dK and dV need what dQ stores."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, max_seqlen, window, scale):
        out, logsumexp = _forward(q, k, v, cu_seqlens, max_seqlen, window, scale)
        ctx.save_for_backward(q, k, v, out, logsumexp, cu_seqlens)
        ctx.window, ctx.scale = window, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        found = zip(
            _backward(dout, *ctx.saved_tensors, ctx.window, ctx.scale), ctx.needs_input_grad, strict=False
        )
        return *(gradient if wanted else None for gradient, wanted in found), *[None] * 4


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int | None) -> None:
    """Check shapes, dtypes and devices. _bounds checks the values of cu_seqlens, which fake tensors lack."""
    fits = q.dim() == k.dim() == 3 and k.shape == v.shape and k.shape[::2] == q.shape[::2]
    if not fits or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q is (T, Hq, D) = {tuple(q.shape)}, k and v must be (T, Hkv, D) with Hkv dividing Hq, "
            f"but k is {tuple(k.shape)} and v is {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(
            f"q is {q.dtype}, k {k.dtype} and v {v.dtype}; cast them to one of "
            f"{', '.join(map(str, DTYPES))}, or call under torch.autocast"
        )
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}, but must be int32 or "
            "int64 of shape (documents + 1,); pass the running sum of the documents' lengths, with a 0 in "
            "front"
        )
    if not q.device == k.device == v.device == cu_seqlens.device:
        raise ValueError(
            f"q is on {q.device}, k on {k.device}, v on {v.device} and cu_seqlens on {cu_seqlens.device}; "
            "move them to one device"
        )
    if not isinstance(max_seqlen, int | torch.SymInt):
        raise ValueError(f"max_seqlen is {max_seqlen!r} but must be an int; pass max(lengths)")
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(
            f"window is {window!r} but a token sees at least itself; pass an int >= 1, or None for no window"
        )


@cache
def _takes(head_dim: int) -> bool:
    """Return whether the kernels take heads of this width. Warns once if not."""
    if head_dim > tiles.MAX_HEAD_DIM:
        warnings.warn(
            f"heads are {head_dim} wide and the attention kernels take up to {tiles.MAX_HEAD_DIM}, so "
            "attention runs in plain torch: slower, and with more memory",
            stacklevel=2,
        )
    return head_dim <= tiles.MAX_HEAD_DIM


def _runs_in_operators(q: Tensor) -> bool:
    """Return whether the two operators can compute this.

    They run the kernels if these take it and are fast here, and torch's flash attention on a CPU. A fake
    tensor stands for one on a card that runs the kernels.
    """
    if isinstance(q, FakeTensor):
        return _takes(q.shape[2])
    on_host = q.device.type in ("cpu", "meta")
    if on_host and not uses_triton(q):
        return True
    return uses_triton(q) and _takes(q.shape[2]) and (on_host or has_tensor_cores(q.device))


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *,
    window: int | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Return the attention output (T, Hq, D), differentiable in q, k and v.

    q: (T, Hq, D); k, v: (T, Hkv, D) with Hq a multiple of Hkv, of any strides; fp16, bf16, fp32 or float64,
        one dtype and device (under torch.autocast they are cast to its dtype). The kernels take any D up to
        256; wider heads run without them, after a warning.
    cu_seqlens: (documents + 1,) int32 or int64, 0 first, T last, rising. A pack of no tokens, T = 0, has
        cu_seqlens = [0].
    max_seqlen: tokens of the longest document, or more.
    window: a query sees keys at distance < window (as in Hugging Face); None = all keys before it.
    scale: None = 1 / sqrt(D).

    On a GPU the values of cu_seqlens are read once per tensor, not once per layer: the first call waits for
    the device. To capture a CUDA graph, call once before. If a kernel that torch does not know changes the
    values later, results are wrong, but nothing outside the pack is read or written.
    Raises ValueError naming the argument that does not fit. There is no gradient of a gradient.
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    _check(q, k, v, cu_seqlens, max_seqlen, window)
    cu_seqlens = cu_seqlens.contiguous()  # as the kernels read it
    if not _runs_in_operators(q):
        return documents_attention(q, k, v, cu_seqlens, max_seqlen, window=window, scale=scale)

    T, _, D = q.shape
    window = WHOLE_DOCUMENT if window is None else min(window, WHOLE_DOCUMENT)
    scale = D**-0.5 if scale is None else scale
    if uses_triton(q) and T > WHOLE_DOCUMENT:
        raise ValueError(
            f"q is (T, Hq, D) = {tuple(q.shape)}; the kernels take T up to {WHOLE_DOCUMENT}: pass fewer "
            "documents at once"
        )
    return _PackedAttention.apply(q, k, v, cu_seqlens, max_seqlen, window, float(scale))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """Call torch's attention. On fake tensors, allocate what a card would.

    torch's fused kernels do not take grouped-query heads wider than 256: all scores are then held in fp32.
    """
    if isinstance(q, FakeTensor) and options["enable_gqa"]:
        return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, **options)[0]
    return F.scaled_dot_product_attention(q, k, v, **options)


def documents_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *,
    window: int | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Compute packed_attention as one `scaled_dot_product_attention` per document.

    Runs on any device and with any head_dim, without a kernel of ours; torch differentiates it.
    """
    _check(q, k, v, cu_seqlens, max_seqlen, window)
    outputs, heads_first = [], _heads_first(q, k, v)
    options = {"enable_gqa": q.shape[1] != k.shape[1]}
    options["scale"] = q.shape[2] ** -0.5 if scale is None else scale
    window = WHOLE_DOCUMENT if window is None else window
    for queries, keys, is_cut in _pieces(_bounds(cu_seqlens, q.shape[0], max_seqlen), window):
        piece = map(_rows, heads_first, (queries, keys, keys))
        mask = _window_mask(queries, keys, window, q) if is_cut else None
        outputs.append(_sdpa(*piece, attn_mask=mask, is_causal=mask is None, **options))
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1) if outputs else q * 0.0
