"""
The Triton kernels of packed attention. packed_attention.py says what they compute, cost and save.

One program owns one tile of one document: BLOCK_M queries (forward, dQ) or BLOCK_N keys (dK/dV), counted from
the document's first token, so that a tile never spans two documents. It walks the keys (queries) that its
tile can see, which are one range: from the tile's window to its diagonal, inside the document. Nothing else
is ever loaded, so the work is the sum of the documents' causal areas rounded up to tiles, whatever the pack
looks like. The tiles that a mask cuts lie at the two ends of the range and are walked first. Those between
are seen as a whole and need neither a mask nor bounds on their loads, which saves 17 to 40 % of the
instructions other than mma, by kernel and D (bf16, sm_89; counted, not timed). Both walks are one source,
compiled with WHOLE = 0 and WHOLE = 1.

How a program finds its document. A grid of (documents x blocks of the longest) would be mostly empty if one
document is long and many are short; a table of blocks would be one more tensor to build and pass. Instead
document d gets the programs from cu_seqlens[d] // BLOCK + d on. A document of n tokens needs ceil(n / BLOCK)
of them, and the first program of the next one is at least that far away, because floor((s + n) / B) + 1 >=
floor(s / B) + ceil(n / B). So T // BLOCK + documents programs are always enough, at most one per document
finds nothing to do, and the host needs to know nothing but shapes. A program finds its document by bisecting
cu_seqlens: log2(documents) loads that hit the cache.

Every output element is written by exactly one program, which adds in a fixed order: no atomics, and equal
inputs give equal bits. dK and dV of a group are summed by the program that owns the keys, over all query
heads of the group.
"""

import torch
from torch import Tensor

from kit.kernels.backend import compute_capability, tl, triton

MAX_HEAD_DIM = 256  # a wider tile leaves too few registers and too little shared memory
# these differ from pack to pack: one compiled kernel must serve all of their values
SHAPES = ["T", "num_documents", "window"]


def tiles(head_dim: int, element_size: int, capability: int = 0) -> dict[str, dict[str, int]]:
    """Return the launch configuration of each kernel, for a head_dim, bytes per element and card.

    capability: 90 for an H100, as compute_capability returns it.
    """
    # tl.dot needs sides of at least 16; the rest is masked
    BLOCK_D = max(16, triton.next_power_of_2(head_dim))
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    rows = TILES[element_size, max(BLOCK_D, 64)]
    if capability == 90:
        rows = rows | HOPPER_TILES.get((element_size, BLOCK_D), {})
    return {kernel: {"BLOCK_D": BLOCK_D} | dict(zip(names, row, strict=True)) for kernel, row in rows.items()}


# (element size, BLOCK_D) -> kernel -> BLOCK_M, BLOCK_N, num_warps, num_stages. Chosen by what the compiler
# reports, not timed on a GPU: up to 101,376 bytes of shared memory (RTX 30, 40, 50), at most 64 bytes of
# registers spilled on sm_80 to sm_120 with Triton 3.9, and no tensor-core work twice. Where one product feeds
# another, Triton lays all warps along the rows: with twice the warps, D = 256 computes the first product
# twice, half as much work again. For the same reason dK/dV of D = 256 has one stage: two, with 16 queries
# each, do half as much work again, and with 32 spill 88 to 296 bytes. fp32 multiplies without tensor cores,
# whose tf32 keeps 10 bits of a factor: it is for checking, not for speed (its configuration was checked on
# sm_89 only).
TILES = {
    (2, 64): {"forward": (128, 64, 8, 2), "dkdv": (32, 64, 4, 2), "dq": (64, 32, 4, 2)},
    (2, 128): {"forward": (128, 32, 8, 2), "dkdv": (32, 64, 4, 2), "dq": (128, 32, 8, 2)},
    (2, 256): {"forward": (64, 32, 4, 2), "dkdv": (32, 32, 4, 1), "dq": (32, 32, 4, 2)},
    (4, 64): {"forward": (32, 32, 8, 2), "dkdv": (32, 32, 8, 1), "dq": (32, 32, 8, 1)},
    (4, 128): {"forward": (32, 16, 8, 1), "dkdv": (16, 16, 8, 2), "dq": (16, 16, 8, 2)},
    (4, 256): {"forward": (16, 16, 8, 1), "dkdv": (16, 16, 8, 1), "dq": (16, 16, 8, 3)},
}  # fmt: skip
# The same for sm_90, where they differ: 232,448 bytes of shared memory, and wgmma, which multiplies at least
# 64 rows. dK/dV of 128 with 4 warps spills 72 bytes there. dQ of 256 with 32 rows would use mma.sync: 1.55
# instructions of a warp per pair of a query and a key instead of 0.85. dK/dV of 256 has no registers for 64.
HOPPER_TILES = {
    (2, 128): {"dkdv": (32, 128, 8, 2)},
    (2, 256): {"dq": (128, 32, 8, 2)},
}  # fmt: skip


@triton.jit
def _find_tile(cu_seqlens_ptr, T, num_documents, program, BLOCK: tl.constexpr):
    """Return (start of the program's document, its length, the tile's first token in it).

    Bounds that lie outside the pack, or fall, are clipped to it: whatever cu_seqlens holds, the kernels read
    and write nothing but the pack.
    """
    low = 0
    high = num_documents
    while high - low > 1:  # the last document whose first program is not after this one
        middle = (low + high) // 2
        is_later = tl.load(cu_seqlens_ptr + middle).to(tl.int32) // BLOCK + middle > program
        high = tl.where(is_later, middle, high)
        low = tl.where(is_later, low, middle)
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + low).to(tl.int32), 0), T)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + low + 1).to(tl.int32), start), T)
    first = (program - low - start // BLOCK) * BLOCK
    return start.to(tl.int64), end - start, first  # int64: row * stride passes 2**31


@triton.jit
def _unmasked(begin, end, first, last, BLOCK: tl.constexpr):
    """Return the (begin, end) of the tiles from begin to end that lie within [first, last)."""
    begin = tl.minimum(begin + tl.cdiv(tl.maximum(first - begin, 0), BLOCK) * BLOCK, end)
    return begin, begin + tl.maximum(last - begin, 0) // BLOCK * BLOCK


@triton.jit
def _load_rows(ptr, rows, n, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, INSIDE: tl.constexpr = False):
    """Load (rows, BLOCK_D), zeros past the document's end and past D. INSIDE: no row is past the end."""
    columns = tl.arange(0, BLOCK_D)
    pointers = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if INSIDE and D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(rows < n)[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def _store_rows(ptr, tile, rows, n, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < n)[:, None] & (columns < D)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SHAPES)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, logsumexp_ptr, cu_seqlens_ptr,
    T, num_documents, window, scale,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # the last tiles of a document see the most keys: they start first
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    start, n, first_query = _find_tile(cu_seqlens_ptr, T, num_documents, program, BLOCK_M)
    if (first_query < 0) | (first_query >= n):
        return
    head = tl.program_id(1).to(tl.int64)
    Hq = tl.num_programs(1)
    k_ptr += start * k_stride_t + head // GROUP * k_stride_h
    v_ptr += start * v_stride_t + head // GROUP * v_stride_h
    queries = first_query + tl.arange(0, BLOCK_M)
    q = _load_rows(q_ptr + start * q_stride_t + head * q_stride_h, queries, n, q_stride_t, D, BLOCK_D)

    # m starts not at -inf: a row that sees nothing of its first tile would compute inf - inf
    m = tl.full((BLOCK_M,), -1e30, tl.float32)
    s = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin, end = tl.maximum(first_query - window + 1, 0), tl.minimum(first_query + BLOCK_M, n)
    whole, diagonal = _unmasked(begin, end, first_query + BLOCK_M - window, first_query + 1, BLOCK_N)
    end -= diagonal - whole
    for WHOLE in tl.static_range(2):
        for first_key in range(whole if WHOLE else begin, diagonal if WHOLE else end, BLOCK_N):
            if not WHOLE:  # skips the tiles between
                first_key += tl.where(first_key < whole, 0, diagonal - whole)
            keys = first_key + tl.arange(0, BLOCK_N)
            k = _load_rows(k_ptr, keys, n, k_stride_t, D, BLOCK_D, WHOLE)
            v = _load_rows(v_ptr, keys, n, v_stride_t, D, BLOCK_D, WHOLE)
            # times log2(e), because exp2 is cheap
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
            if not WHOLE:
                distance = queries[:, None] - keys[None, :]
                scores = tl.where((distance >= 0) & (distance < window), scores, -float("inf"))
            m_new = tl.maximum(m, tl.max(scores, 1))
            shrink = tl.exp2(m - m_new)
            p = tl.exp2(scores - m_new[:, None])
            s = s * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            m = m_new

    _store_rows(out_ptr + (start * Hq + head) * D, acc / s[:, None], queries, n, Hq * D, D, BLOCK_D)
    logsumexp = (m + tl.log2(s)) * 0.6931471805599453  # times ln(2): back to natural logarithms
    tl.store(logsumexp_ptr + head * T + start + queries, logsumexp, mask=queries < n)


@triton.jit(do_not_specialize=SHAPES)
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, logsumexp_ptr, delta_ptr, dq_ptr, cu_seqlens_ptr,
    T, num_documents, window, scale,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, dout_stride_t, dout_stride_h,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute dQ, and delta = dout . out of each query, which the dK/dV kernel reads."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    start, n, first_query = _find_tile(cu_seqlens_ptr, T, num_documents, program, BLOCK_M)
    if (first_query < 0) | (first_query >= n):
        return
    head = tl.program_id(1).to(tl.int64)
    Hq = tl.num_programs(1)
    k_ptr += start * k_stride_t + head // GROUP * k_stride_h
    v_ptr += start * v_stride_t + head // GROUP * v_stride_h
    queries = first_query + tl.arange(0, BLOCK_M)
    numbers = head * T + start + queries  # where the query's logsumexp and delta are stored
    out = _load_rows(out_ptr + (start * Hq + head) * D, queries, n, Hq * D, D, BLOCK_D)
    dout_ptr += start * dout_stride_t + head * dout_stride_h
    dout = _load_rows(dout_ptr, queries, n, dout_stride_t, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + numbers, delta, mask=queries < n)
    logsumexp = tl.load(logsumexp_ptr + numbers, mask=queries < n, other=0.0) * 1.4426950408889634
    q = _load_rows(q_ptr + start * q_stride_t + head * q_stride_h, queries, n, q_stride_t, D, BLOCK_D)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin, end = tl.maximum(first_query - window + 1, 0), tl.minimum(first_query + BLOCK_M, n)
    whole, diagonal = _unmasked(begin, end, first_query + BLOCK_M - window, first_query + 1, BLOCK_N)
    end -= diagonal - whole
    for WHOLE in tl.static_range(2):
        for first_key in range(whole if WHOLE else begin, diagonal if WHOLE else end, BLOCK_N):
            if not WHOLE:  # skips the tiles between
                first_key += tl.where(first_key < whole, 0, diagonal - whole)
            keys = first_key + tl.arange(0, BLOCK_N)
            k = _load_rows(k_ptr, keys, n, k_stride_t, D, BLOCK_D, WHOLE)
            v = _load_rows(v_ptr, keys, n, v_stride_t, D, BLOCK_D, WHOLE)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
            p = tl.exp2(scores - logsumexp[:, None])
            if not WHOLE:
                distance = queries[:, None] - keys[None, :]
                p = tl.where((distance >= 0) & (distance < window), p, 0.0)
            dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
            dscores = p * (dp - delta[:, None])
            acc = tl.dot(dscores.to(k.dtype), k, acc, input_precision="ieee")
    _store_rows(dq_ptr + (start * Hq + head) * D, acc * scale, queries, n, Hq * D, D, BLOCK_D)


@triton.jit(do_not_specialize=SHAPES)
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, logsumexp_ptr, delta_ptr, dk_ptr, dv_ptr, cu_seqlens_ptr,
    T, num_documents, window, scale,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, dout_stride_t, dout_stride_h,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute dK and dV.

    Scores are transposed, keys by queries, so that p and dscores enter their second product as they left the
    first.
    """
    start, n, first_key = _find_tile(cu_seqlens_ptr, T, num_documents, tl.program_id(0), BLOCK_N)
    if (first_key < 0) | (first_key >= n):
        return
    kv_head = tl.program_id(1).to(tl.int64)
    Hkv = tl.num_programs(1)
    keys = first_key + tl.arange(0, BLOCK_N)
    k = _load_rows(k_ptr + start * k_stride_t + kv_head * k_stride_h, keys, n, k_stride_t, D, BLOCK_D)
    v = _load_rows(v_ptr + start * v_stride_t + kv_head * v_stride_h, keys, n, v_stride_t, D, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    end = tl.minimum(first_key + BLOCK_N - 1 + window, n)
    last = tl.minimum(first_key + window, n)
    whole, edge = _unmasked(first_key, end, first_key + BLOCK_N - 1, last, BLOCK_M)
    end -= edge - whole
    # with the heads as the outer loop, D = 128 spills 184 bytes on sm_80 instead of 40
    for WHOLE in tl.static_range(2):
        for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
            for first_query in range(whole if WHOLE else first_key, edge if WHOLE else end, BLOCK_M):
                if not WHOLE:  # skips the tiles between
                    first_query += tl.where(first_query < whole, 0, edge - whole)
                queries = first_query + tl.arange(0, BLOCK_M)
                numbers = head * T + start + queries
                q_start = q_ptr + start * q_stride_t + head * q_stride_h
                q = _load_rows(q_start, queries, n, q_stride_t, D, BLOCK_D, WHOLE)
                dout_start = dout_ptr + start * dout_stride_t + head * dout_stride_h
                dout = _load_rows(dout_start, queries, n, dout_stride_t, D, BLOCK_D, WHOLE)
                logsumexp = tl.load(logsumexp_ptr + numbers, mask=queries < n, other=0.0) * 1.4426950408889634
                delta = tl.load(delta_ptr + numbers, mask=queries < n, other=0.0)
                scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * 1.4426950408889634)
                p = tl.exp2(scores - logsumexp[None, :])
                if not WHOLE:
                    distance = queries[None, :] - keys[:, None]
                    p = tl.where((distance >= 0) & (distance < window), p, 0.0)
                dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
                dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
                dscores = p * (dp - delta[None, :])
                dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    _store_rows(dk_ptr + (start * Hkv + kv_head) * D, dk * scale, keys, n, Hkv * D, D, BLOCK_D)
    _store_rows(dv_ptr + (start * Hkv + kv_head) * D, dv, keys, n, Hkv * D, D, BLOCK_D)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (out (T, Hq, D), logsumexp (Hq, T) fp32) of tensors whose last dimension has stride 1."""
    (T, Hq, D), Hkv, num_documents = q.shape, k.shape[1], len(cu_seqlens) - 1
    out, logsumexp = q.new_empty(T, Hq, D), q.new_empty(Hq, T, dtype=torch.float32)
    tile = tiles(D, q.element_size(), compute_capability(q.device))["forward"]
    if q.numel():
        with torch.cuda.device_of(q):
            _forward_kernel[(T // tile["BLOCK_M"] + num_documents, Hq)](
                q, k, v, out, logsumexp, cu_seqlens, T, num_documents, window, scale, *_strides(q, k, v),
                GROUP=Hq // Hkv, D=D, **tile,
            )  # fmt: skip
    return out, logsumexp


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor,
    cu_seqlens: Tensor, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dq, dk, dv). dQ is computed first: its kernel stores the delta that the one for dK/dV reads."""
    (T, Hq, D), Hkv, num_documents = q.shape, k.shape[1], len(cu_seqlens) - 1
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(logsumexp)
    sizes = T, num_documents, window, scale, *_strides(q, k, v, dout)
    tile = tiles(D, q.element_size(), compute_capability(q.device))
    if q.numel():
        with torch.cuda.device_of(q):
            _dq_kernel[(T // tile["dq"]["BLOCK_M"] + num_documents, Hq)](
                q, k, v, out, dout, logsumexp, delta, dq, cu_seqlens, *sizes,
                GROUP=Hq // Hkv, D=D, **tile["dq"],
            )  # fmt: skip
            _dkdv_kernel[(T // tile["dkdv"]["BLOCK_N"] + num_documents, Hkv)](
                q, k, v, dout, logsumexp, delta, dk, dv, cu_seqlens, *sizes,
                GROUP=Hq // Hkv, D=D, **tile["dkdv"],
            )  # fmt: skip
    return dq, dk, dv
