"""Packed attention, forward and backward, against float64."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from itertools import accumulate, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kit.kernels.packed_attention import packed_attention
from kit.models.attention import varlen_attention, varlen_obstacle
from kit.recipes.card.compare import attempt, judge, judge_equal, name_of, normal, poisoned, rms, running_sum
from kit.recipes.card.results import Card, Results, Skip

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PARTS = "out", "dq", "dk", "dv"
CASES = [  # dtype, D, Hq, Hkv. quick takes the first five, another architecture the first eight
    (BF16, 64, 14, 2), (BF16, 128, 8, 2), (BF16, 256, 4, 1), (FP16, 80, 2, 2), (FP32, 128, 8, 2),
    (BF16, 80, 8, 2), (BF16, 128, 12, 2), (BF16, 256, 7, 1),
    (BF16, 64, 2, 2), (FP16, 64, 8, 2), (FP16, 128, 14, 2), (FP16, 256, 2, 2),
    (FP32, 64, 14, 2), (FP32, 80, 2, 2), (FP32, 256, 4, 1),
]  # fmt: skip
SCORES = 2**24  # held at once by the float64 truth: 128 MiB, a few times


def run(results: Results, card: Card) -> None:
    card.need_rtx_30("Triton reaches tensor cores from 8.0 on, so attention runs in plain torch")
    lengths = [1, 5, 16, 17, 40, 1] if card.small else [1, 127, 128, 129, 4000, 1]
    window = 7 if card.small else 512
    repeats: dict[str, bool] = {}  # case -> whether a second run gave the same bits

    for dtype, D, Hq, Hkv in CASES[: 5 if card.quick else 8 if card.arch else None]:
        for cut in (None, window, 1):
            name = f"attention {name_of(dtype)} D{D} group {Hq // Hkv} window {cut or 'none'}"
            results.run(name, check_case, (dtype, D, Hq, Hkv), lengths, cut, repeats, seconds=3)
        card.free()

    name = f"attention, many short documents, window {window}"
    torch.manual_seed(3)
    short = torch.randint(1, 9 if card.small else 90, (20 if card.small else 200,)).tolist()
    results.run(name, check_case, (BF16, 128, 8, 2), short, window, repeats, seconds=3)
    if repeats:
        changed = [name for name, same in repeats.items() if not same]
        text = f"{len(repeats) - len(changed)} of {len(repeats)} cases give the same bits"
        results.check("attention, run twice", not changed, ", ".join([text, *changed]))

    for D, Hq, Hkv in ((64, 14, 2), (256, 4, 1))[: 1 if card.quick else None]:
        results.run(f"attention layouts D{D}", check_layouts, D, Hq, Hkv, lengths, seconds=2)

    for dtype, *heads in CASES[: 1 if card.quick else 3]:
        for cut in (None, window):
            name = f"torch's varlen {name_of(dtype)} D{heads[0]} window {cut or 'none'}"
            results.run(name, check_varlen, (dtype, *heads), lengths, cut, seconds=3)


def make_inputs(card: Card, dtype: torch.dtype, D: int, Hq: int, Hkv: int, T: int) -> list[Tensor]:
    """Return q, k, v, dout."""
    torch.manual_seed(0)
    return [normal(card, T, heads, D, dtype=dtype) for heads in (Hq, Hkv, Hkv, Hq)]


def check_case(results, card, name, shape, lengths, window, repeats) -> None:
    """Check one shape and window, and note in repeats whether a second run gives the same bits."""
    q, k, v, dout = make_inputs(card, *shape, sum(lengths))
    cu_seqlens, longest = running_sum(card, lengths), max(lengths)
    with poisoned():
        ours = our_attention(q, k, v, dout, cu_seqlens, longest, window)
    again = our_attention(q, k, v, dout, cu_seqlens, longest, window)
    repeats[name] = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    del again

    judge_parts(results, card, name, ours, (q, k, v, dout), lengths, window)


def check_varlen(results, card, name, shape, lengths, window) -> None:
    """Check that the attention which torch brings means the same as ours. Raises Skip if it does not run."""
    if why := varlen_obstacle(shape[1], card.device, shape[0]):
        raise Skip(why)
    inputs = make_inputs(card, *shape, sum(lengths))
    arguments = *inputs, running_sum(card, lengths), max(lengths), window
    facts = {"attention": "varlen", "head_dim": shape[1], "window": window, **card.facts}
    found, why = attempt(card, gradients, varlen_attention, *arguments)
    if found is None:
        results.check(name, False, why, **facts)
    else:
        judge_parts(results, card, name, found, inputs, lengths, window, facts)


def judge_parts(results, card, name, found, inputs, lengths, window, facts=None) -> None:
    """Record one check of out, dq, dk, dv. inputs: q, k, v, dout. facts: of the row, besides."""
    q, k, v, dout = inputs
    truth = true_attention(q, k, v, dout, lengths, window)
    peer, why = attempt(card, sdpa, q, k, v, dout, lengths, window)
    eps = torch.finfo(q.dtype).eps
    absolute = (2e-6 if q.dtype == FP32 else 1e-5) * rms(dout)  # dq and dk of window 1 are 0 in truth
    floors = [eps * rms(true) + absolute for true in truth]
    text = f"no SDPA: {why}" if why else ""
    judge(results, name, PARTS, found, peer or [None] * 4, truth, floors, text, **(facts or {}))


def our_attention(q, k, v, dout, cu_seqlens, longest, window=None) -> tuple[Tensor, ...]:
    """Return out, dq, dk, dv."""
    return gradients(packed_attention, q, k, v, dout, cu_seqlens, longest, window)


def gradients(attention, q, k, v, dout, cu_seqlens, longest, window) -> tuple[Tensor, ...]:
    """Return out, dq, dk, dv of a function that computes packed attention."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, cu_seqlens, longest, window=window)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))


def true_attention(q, k, v, dout, lengths, window) -> tuple[Tensor, ...]:
    """Return out, dq, dk, dv in float64, by autograd, a block of queries at a time."""
    T, Hq, D = q.shape
    group, device = Hq // k.shape[1], q.device
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = torch.empty(q.shape, dtype=torch.float64, device=device)
    for start, end in pairwise(accumulate(lengths, initial=0)):
        block = max(16, SCORES // (Hq * (end - start)))
        for first in range(start, end, block):
            queries = slice(first, min(first + block, end))
            keys = slice(start if window is None else max(start, first - window + 1), queries.stop)
            i, j = (torch.arange(rows.start, rows.stop, device=device) for rows in (queries, keys))
            distance = i[:, None] - j[None, :]
            hidden = (distance < 0) | (distance >= (window or T))

            rows = (queries, keys, keys)
            Q, K, V = (x[part].transpose(0, 1) for x, part in zip(leaves, rows, strict=True))  # (heads, n, D)
            K, V = K.repeat_interleave(group, 0), V.repeat_interleave(group, 0)
            p = (Q @ K.mT * D**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
            piece = (p @ V).transpose(0, 1)
            out[queries] = piece.detach()
            piece.backward(dout[queries].double())
    return (out, *(x.grad for x in leaves))


def sdpa(q, k, v, dout, lengths, window) -> tuple[Tensor, ...]:
    """Return out, dq, dk, dv of torch's attention, document by document, with a mask if there is a window."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    group, outs = q.shape[1] // k.shape[1], []
    uses_flash = q.is_cuda and window is None and q.dtype != FP32
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    for Q, K, V in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        K, V = K.repeat_interleave(group, 1), V.repeat_interleave(group, 1)
        Q, K, V = (x.transpose(0, 1)[None] for x in (Q, K, V))  # (1, Hq, n, D)
        mask = None
        if window is not None:
            i = torch.arange(Q.shape[2], device=q.device)
            distance = i[:, None] - i[None, :]
            mask = (distance >= 0) & (distance < window)
        with sdpa_kernel(backends) if uses_flash else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(Q, K, V, attn_mask=mask, is_causal=mask is None)
        outs.append(out[0].transpose(0, 1))
    out = torch.cat(outs)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))


def check_layouts(results, card, name, D, Hq, Hkv, lengths) -> None:
    """Check that strides and the dtype of cu_seqlens change no bit."""
    q, k, v, dout = make_inputs(card, BF16, D, Hq, Hkv, sum(lengths))
    cu_seqlens, longest = running_sum(card, lengths), max(lengths)
    plain = our_attention(q, k, v, dout, cu_seqlens, longest)

    def check(label, expected, found):
        pairs = dict(zip(PARTS, zip(expected, found, strict=True), strict=True))
        judge_equal(results, f"attention {label} D{D}", pairs)

    views = torch.cat([q, k, v], dim=1).split([Hq, Hkv, Hkv], dim=1)
    check("views of one qkv", plain, our_attention(*views, dout, cu_seqlens, longest))
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, dout)]
    check("heads first in memory", plain, our_attention(*heads_first, cu_seqlens, longest))
    spread = [torch.stack([x, x], dim=-1)[..., 0] for x in (q, k, v, dout)]  # stride 2 in the last dimension
    check("stride 2", plain, our_attention(*spread, cu_seqlens, longest))
    check("int64 cu_seqlens", plain, our_attention(q, k, v, dout, cu_seqlens.long(), longest))

    ones = torch.ones((), device=card.device, dtype=BF16).expand(dout.shape)
    expected = our_attention(q, k, v, ones.contiguous(), cu_seqlens, longest)
    check("gradient of strides 0", expected, our_attention(q, k, v, ones, cu_seqlens, longest))


def check_ptx(results: Results, card: Card) -> None:
    """Check in Triton's cache that kernels with a 16-bit product multiply as the other architecture does."""
    if card.arch.startswith(("sm90", "sm10")):
        raise Skip(f"the check knows mma.sync; {card.arch} has instructions of its own")
    if not card.is_cuda:  # it runs no kernel, and the cache would be empty
        report = Path(__file__).parents[1] / "bench" / "kernel_report.py"
        command = [sys.executable, str(report), "--kernel", "_forward_kernel bf16 D 128", "--card", "90"]
        subprocess.run(command, check=True, capture_output=True)
    kernels, wrong = 0, []
    for path in sorted(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.ptx")):
        ptx, ir = path.read_text(), path.with_suffix(".ttir")
        products = [line for line in ir.read_text().splitlines() if "tt.dot" in line] if ir.exists() else []
        has_product = any(re.search(r"x(bf16|f16)>", line) for line in products)
        kernels += has_product
        if "wgmma" in ptx or (has_product and "mma.sync" not in ptx):
            wrong.append(path.stem)
    text = f"kernels with a 16-bit product: {kernels}" + (f"; wrong: {', '.join(wrong[:3])}" if wrong else "")
    results.check(f"PTX of {card.arch}: mma.sync, no wgmma", kernels > 0 and not wrong, text)
