"""
Attention of one new token per row to the keys and values that a cache holds, each row to its own length.

    s[b, h, p] = scale * q[b, h] . k[b, g, p mod W]              for the positions p that row b sees
    out[b, h]  = sum_p softmax_p(s[b, h, p]) v[b, g, p mod W]    with g = h // (Hq / Hkv)

    Row b holds positions 0 .. lengths[b] - 1, the new token's last; it sees the last min(window, W) of them.
    Position p lies in place p mod W: a cache that is too small for a row is a ring of its last W positions.

How it works. The keys that a row sees are cut into splits of a few hundred. A program of the first kernel
owns one split of one row and one head of keys: it reads these keys and values once, for all query heads of
their group, and stores the group's outputs over this split, and their logsumexps, in fp32. A program of the
second kernel joins the splits of one query head: out = sum_i e^(L_i - L) out_i with L = logsumexp_i L_i.

The lengths stay on the device. The launch has as many splits as the cache has room for, and a program whose
split begins after its row's end returns at once, so the host knows nothing but shapes: a CUDA graph may be
captured over a call, and replayed as the lengths grow. Keys read are the sum of what the rows see, however
long the longest is. There are no atomics, and the splits do not depend on other rows: a row's bits repeat.

64 rows of 1,000 positions of Qwen2.5-0.5B (2 heads of keys, 14 of queries, D = 64, bf16): a layer reads 31
MiB of keys and values. The outputs of the splits are 0.9 MiB, written and read once; room is allocated for
all splits, 14 MiB with 16,384 places.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.kernels.backend import has_tensor_cores, tl, triton, uses_triton

DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64
MAX_HEAD_DIM, MAX_GROUP = 256, 32  # more do not fit the registers of a program
MIN_SPLIT, MAX_SPLITS = 256, 64  # keys of a split; splits of a cache, which bound the room for their outputs
JOINED, JOIN_WARPS = 16, 2  # splits that a joining program reads at once
# element size, BLOCK_D -> keys at once, num_warps, num_stages. Chosen by what the compiler reports (at most
# 101,376 bytes of shared memory, no spills, no tensor-core work twice), not timed on a GPU.
TILES = {
    (2, 64): (64, 4, 3), (2, 128): (32, 2, 2), (2, 256): (64, 4, 1),
    (4, 64): (32, 4, 2), (4, 128): (32, 8, 1), (4, 256): (16, 8, 1),
}  # fmt: skip
SIZES = ["W", "window", "split_keys", "num_splits"]  # one compiled kernel serves caches of all sizes


def decode_attention_reference(q, k_cache, v_cache, lengths, *, window=None, scale=None):
    """Compute the same under a mask: what this file means, and what its tests compare with."""
    (_, Hq, D), W = q.shape, k_cache.shape[2]
    k, v = (x.repeat_interleave(Hq // x.shape[1], dim=1) for x in (k_cache, v_cache))
    last = lengths.long()[:, None] - 1
    distance = (last - torch.arange(W, device=q.device)) % W  # of the position in each place
    seen = (distance <= last) & (distance < (window or W))  # (B, W)
    scores = torch.einsum("bhd,bhpd->bhp", q, k) * (D**-0.5 if scale is None else scale)
    p = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    p = p.masked_fill(~seen[:, None], 0.0)  # of a row that sees nothing, too
    return torch.einsum("bhp,bhpd->bhd", p, v.masked_fill(~seen[:, None, :, None], 0.0))


@triton.jit(do_not_specialize=SIZES)
def _split_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, parts_ptr, logsumexps_ptr,
    W, window, split_keys, scale,
    q_stride_b, q_stride_h, k_stride_b, k_stride_h, k_stride_w, v_stride_b, v_stride_h, v_stride_w,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute a group's outputs over one split. Scores are transposed, keys by queries.

    So all warps lie along the keys, and along D in the second product. Along the queries, of which there are
    few, they would compute the same scores several times.
    """
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    length = tl.load(lengths_ptr + row)
    num_seen = tl.maximum(tl.minimum(length, window), 0).to(tl.int32)  # window <= W
    first = split * split_keys
    if first >= num_seen:
        return
    oldest = ((length - num_seen) % W).to(tl.int32)  # the place of the first key that is seen

    heads, dims = tl.arange(0, BLOCK_M).to(tl.int64), tl.arange(0, BLOCK_D)
    inside = dims[None, :] < D
    q_ptr += row * q_stride_b + kv_head * GROUP * q_stride_h
    q = tl.load(
        q_ptr + heads[:, None] * q_stride_h + dims[None, :], mask=(heads < GROUP)[:, None] & inside, other=0.0
    )
    k_ptr += row * k_stride_b + kv_head * k_stride_h
    v_ptr += row * v_stride_b + kv_head * v_stride_h

    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    s = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    end = tl.minimum(first + split_keys, num_seen)
    for first_key in range(first, end, BLOCK_N):  # at least one key of each block is seen: m is finite
        keys = first_key + tl.arange(0, BLOCK_N)
        places = oldest + keys
        places = tl.where(places < W, places, places - W).to(tl.int64)[:, None]
        mask = (keys < end)[:, None] & inside  # unwritten places are not read: they may hold NaN
        k = tl.load(k_ptr + places * k_stride_w + dims[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + places * v_stride_w + dims[None, :], mask=mask, other=0.0)
        # times log2(e), because exp2 is cheap
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * 1.4426950408889634)
        scores = tl.where((keys < end)[:, None], scores, -float("inf"))
        m_new = tl.maximum(m, tl.max(scores, 0))
        shrink = tl.exp2(m - m_new)
        p = tl.exp2(scores - m_new[None, :])
        s = s * shrink + tl.sum(p, 0)
        acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * shrink[None, :], input_precision="ieee")
        m = m_new

    numbers = ((row * tl.num_programs(1) + kv_head) * GROUP + heads) * tl.num_programs(2) + split
    tl.store(logsumexps_ptr + numbers, m + tl.log2(s), mask=heads < GROUP)
    where = parts_ptr + numbers[None, :] * D + dims[:, None]
    tl.store(where, acc / s[None, :], mask=(heads < GROUP)[None, :] & (dims < D)[:, None])


@triton.jit(do_not_specialize=SIZES)
def _join_kernel(
    parts_ptr, logsumexps_ptr, lengths_ptr, out_ptr,
    window, split_keys, num_splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Add up the splits of one query head. A row that sees nothing gets zeros."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    number = row * tl.num_programs(1) + head
    num_seen = tl.maximum(tl.minimum(tl.load(lengths_ptr + row), window), 0).to(tl.int32)
    dims = tl.arange(0, BLOCK_D)

    m = -float("inf")
    s = 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    end = tl.cdiv(num_seen, split_keys)
    for first in range(0, end, JOINED):
        splits = first + tl.arange(0, JOINED)
        numbers = number * num_splits + splits
        logsumexps = tl.load(logsumexps_ptr + numbers, mask=splits < end, other=-float("inf"))
        mask = (splits < end)[:, None] & (dims < D)[None, :]
        parts = tl.load(parts_ptr + numbers[:, None] * D + dims[None, :], mask=mask, other=0.0)
        m_new = tl.maximum(m, tl.max(logsumexps, 0))
        shrink = tl.exp2(m - m_new)
        share = tl.exp2(logsumexps - m_new)
        s = s * shrink + tl.sum(share, 0)
        acc = acc * shrink + tl.sum(parts * share[:, None], 0)
        m = m_new

    out = acc / tl.where(s > 0, s, 1.0)
    tl.store(out_ptr + number * D + dims, out.to(out_ptr.dtype.element_ty), mask=dims < D)


def tile(head_dim: int, group: int, element_size: int) -> dict[str, int]:
    """Return the launch configuration of the first kernel."""
    BLOCK_D = max(16, triton.next_power_of_2(head_dim))  # tl.dot needs sides of at least 16
    BLOCK_N, num_warps, num_stages = TILES[element_size, max(BLOCK_D, 64)]
    BLOCK_M = max(16, triton.next_power_of_2(group))
    blocks = {"BLOCK_D": BLOCK_D, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    return blocks | {"num_warps": num_warps, "num_stages": num_stages}


def splits(W: int) -> tuple[int, int]:
    """Return (keys of a split, splits) of a row that sees up to W keys."""
    keys = MIN_SPLIT
    while keys * MAX_SPLITS < W:
        keys *= 2
    return keys, -(-W // keys)


@torch.library.custom_op("kit::decode_attention", mutates_args=())
def _attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, window: int, scale: float
) -> Tensor:
    """Return (B, Hq, D). window: at most W."""
    (B, Hq, D), (_, Hkv, W, _) = q.shape, k_cache.shape
    out = q.new_empty(q.shape)
    if runs_kernel(q):
        split_keys, num_splits = splits(window)
        parts = q.new_empty(B, Hq, num_splits, D, dtype=torch.float32)
        logsumexps = q.new_empty(B, Hq, num_splits, dtype=torch.float32)
        if q.numel():
            held = tile(D, Hq // Hkv, q.element_size())
            strides = *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3]
            with torch.cuda.device_of(q):
                _split_kernel[(B, Hkv, num_splits)](
                    q, k_cache, v_cache, lengths, parts, logsumexps, W, window, split_keys, scale, *strides,
                    GROUP=Hq // Hkv, D=D, **held,
                )  # fmt: skip
                _join_kernel[(B, Hq)](
                    parts, logsumexps, lengths, out, window, split_keys, num_splits,
                    D=D, BLOCK_D=held["BLOCK_D"], JOINED=JOINED, num_warps=JOIN_WARPS,
                )  # fmt: skip
        return out

    for row, length in enumerate(lengths.tolist()):
        places = torch.arange(max(length - window, 0), max(length, 0), device=q.device) % W
        k, v = (x[row, :, places] for x in (k_cache, v_cache))
        group = q[row].unflatten(0, (Hkv, -1))  # (Hkv, Hq / Hkv, D)
        out[row] = F.scaled_dot_product_attention(group, k, v, scale=scale).flatten(0, 1) if length > 0 else 0
    return out


@_attention.register_fake
def _(q, k_cache, v_cache, lengths, window, scale):
    return q.new_empty(q.shape)


def runs_kernel(like: Tensor) -> bool:
    """Return whether the kernels run for tensors of this dtype and device."""
    return uses_triton(like) and (not like.is_cuda or has_tensor_cores(like.device))


def obstacle(head_dim: int, group: int) -> str:
    """Return why the kernels do not take heads so wide, or so many query heads per head of keys; or ""."""
    if head_dim > MAX_HEAD_DIM:
        return f"its heads are {head_dim} wide and the kernel takes up to {MAX_HEAD_DIM}"
    if group > MAX_GROUP:
        return f"{group} query heads share a head of keys and the kernel takes up to {MAX_GROUP}"
    return ""


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, window: int | None) -> None:
    fits = q.dim() == 3 and k_cache.dim() == 4 and k_cache.shape == v_cache.shape
    if not fits or (k_cache.shape[0], k_cache.shape[3]) != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"q is (B, Hq, D) = {tuple(q.shape)}, so k_cache and v_cache must be (B, Hkv, W, D), but they "
            f"are {tuple(k_cache.shape)} and {tuple(v_cache.shape)}; pass the rows of the cache that q has"
        )
    (_, Hq, D), (_, Hkv, W, _) = q.shape, k_cache.shape
    if not Hkv or Hq % Hkv or not W or not D:
        raise ValueError(
            f"Hq = {Hq}, Hkv = {Hkv}, W = {W} and D = {D}: none may be 0, and Hkv must divide Hq"
        )
    if not q.dtype == k_cache.dtype == v_cache.dtype or q.dtype not in DTYPES:
        raise ValueError(
            f"q is {q.dtype}, k_cache {k_cache.dtype} and v_cache {v_cache.dtype}; cast q to the dtype of "
            f"the cache, one of {', '.join(map(str, DTYPES))}"
        )
    if lengths.shape != q.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"lengths is {lengths.dtype} of shape {tuple(lengths.shape)}, but must be int32 or int64 of "
            f"shape ({q.shape[0]},); pass the positions that each row holds, the new token's included"
        )
    if not q.device == k_cache.device == v_cache.device == lengths.device:
        raise ValueError(
            f"q is on {q.device}, k_cache on {k_cache.device}, v_cache on {v_cache.device} and lengths on "
            f"{lengths.device}; move them to one device"
        )
    if k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        raise ValueError(
            f"the strides are {k_cache.stride()} in k_cache and {v_cache.stride()} in v_cache, but the last "
            "must be 1: the D numbers of a key lie side by side. A copy would cost more than the attention"
        )
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(
            f"window is {window!r} but a token sees at least itself; pass an int >= 1, or None for no window"
        )


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *,
    window: int | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Return the attention output of one token per row, (B, Hq, D). There is no gradient.

    q: (B, Hq, D), the new tokens' queries; fp16, bf16, fp32 or float64, of any strides.
    k_cache, v_cache: (B, Hkv, W, D) in q's dtype, with Hq a multiple of Hkv; the new tokens' keys and values
        are already in them. Position p of a row lies in place p mod W. Of any strides but the last, which
        is 1: rows of a larger cache may be passed as a view.
    lengths: (B,) int32 or int64 on the device, the positions that each row holds, the new token's included.
        A row of length 0 or less gets zeros.
    window: a token sees this many positions, its own included; None = all that the cache holds.
    scale: None = 1 / sqrt(D).

    The kernels take D up to 256 and up to 32 query heads per head of keys; the torch path, which runs
    elsewhere than on a card with Triton, takes all, and reads the lengths on the host.
    Raises ValueError naming the argument that does not fit. The values of lengths are not checked on a
    device, but whatever they are, nothing outside the cache is read.
    """
    _check(q, k_cache, v_cache, lengths, window)
    (_, Hq, D), (_, Hkv, W, _) = q.shape, k_cache.shape
    if runs_kernel(q) and (why := obstacle(D, Hq // Hkv)):
        raise ValueError(f"decode_attention does not take this model: {why}; use torch's attention")
    q = q if q.stride(-1) == 1 else q.contiguous()
    window = W if window is None else min(window, W)
    scale = D**-0.5 if scale is None else scale
    return _attention(q, k_cache, v_cache, lengths.contiguous(), window, float(scale))
