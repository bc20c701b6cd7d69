"""
Packs on the device: a row's documents, end to end in one ragged buffer, become the tensors a model reads.

    cu_seqlens[d]    = offsets[d] - offsets[0]
    position_ids[t]  = t - cu_seqlens[d]             d is the document of t, the last with cu_seqlens[d] <= t
    input_ids[t]     = buffer[offsets[0] + t]
    targets[t]       = buffer[offsets[0] + t + 1]    or -100: at the last token of a document, and inside its
                                                     prompt, whose last token predicts the response's first

How it works. Each program fills 1,024 places of the row. It finds the document of each place by binary search
in offsets, which stays in the cache; all other loads and stores are of neighbours. No two programs write to
the same place, so there are no atomics. The targets are shifted once, here, exactly as in
kit.packing.PackedBatch.build.

16,384 tokens: 64 KiB of int32 ids cross the bus to the card instead of 256 KiB of ids, targets and positions.
One launch reads the 64 KiB and writes the 256, instead of some ten launches per document.
"""

from itertools import pairwise

import torch
from torch import Tensor

from kit.kernels.backend import tl, triton, uses_triton
from kit.kernels.cross_entropy import IGNORE_INDEX

BLOCK = 1024  # places per program: 8 per thread; a row of 16,384 tokens needs 17 programs
NUM_WARPS = 4
# every id of a row whose offsets do not fit: no embedding has this row, so the model's lookup fails
BAD_TOKEN = -1


def pack_reference(buffer, offsets, prompt_lens):
    """Compute the same in a loop over documents: what this file means, and what its tests compare with."""
    bounds = offsets.tolist()
    ids = [buffer[start:end].int() for start, end in pairwise(bounds)]
    targets = [torch.full((len(x),), IGNORE_INDEX) for x in ids]
    for x, target, prompt_len in zip(ids, targets, prompt_lens.tolist(), strict=True):
        first = max(prompt_len - 1, 0)  # the last token of the prompt predicts the first of the response
        target[first : len(x) - 1] = x[first + 1 :]
    positions = [torch.arange(len(x), dtype=torch.int32) for x in ids]
    return torch.cat(ids), torch.cat(targets), torch.cat(positions), (offsets - offsets[0]).int()


@triton.jit
def _find_document(offsets_ptr, place, D):
    """Return the last d of 0 .. D - 1 with offsets[d] <= place."""
    low = tl.zeros_like(place)
    high = low + D  # offsets[low] <= place < offsets[high]
    width = D
    while width > 1:
        middle = (low + high) // 2
        right = tl.load(offsets_ptr + middle) <= place
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
        width = (width + 1) // 2
    return low


# Without these options Triton would compile variants for D = 1, for multiples of 16, and for aligned slices.
@triton.jit(
    do_not_specialize=["D", "T"],
    do_not_specialize_on_alignment=["offsets_ptr", "prompt_lens_ptr"],
)
def _pack_kernel(
    buffer_ptr, offsets_ptr, prompt_lens_ptr,
    input_ids_ptr, targets_ptr, position_ids_ptr, cu_seqlens_ptr,
    D, T, ignore_index, bad_token,
    BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # int32: a row has fewer than 2**31 tokens
    inside = t < T
    begin = tl.load(offsets_ptr)  # int64, and so is place: the buffer may hold more than 2**31 tokens
    place = begin + t
    found = tl.load(offsets_ptr + D) - begin
    readable = t < tl.where(found == T, T, 0)

    d = _find_document(offsets_ptr, place, D)
    start = tl.load(offsets_ptr + d)
    end = tl.load(offsets_ptr + d + 1)
    in_response = (place + 1 < end) & (place + 1 - start >= tl.load(prompt_lens_ptr + d))

    token = tl.load(buffer_ptr + place, mask=readable, other=bad_token)
    target = tl.load(buffer_ptr + place + 1, mask=readable & in_response, other=ignore_index)
    tl.store(input_ids_ptr + t, token.to(tl.int32), mask=inside)
    tl.store(targets_ptr + t, target.to(tl.int64), mask=inside)
    tl.store(position_ids_ptr + t, (place - start).to(tl.int32), mask=inside)

    # place t of the row is also entry t of cu_seqlens, which has D + 1 <= T + 1
    boundary = tl.load(offsets_ptr + t, mask=t <= D, other=0) - begin
    tl.store(cu_seqlens_ptr + t, boundary.to(tl.int32), mask=t <= D)


def _torch_pack(buffer: Tensor, offsets: Tensor, prompt_lens: Tensor, T: int) -> list[Tensor]:
    """Compute what _pack_kernel writes, in torch."""
    begin, bounds = offsets[0], offsets - offsets[0]
    t = torch.arange(T, device=buffer.device)
    d = torch.searchsorted(bounds[1:], t, right=True)
    position_ids = t - bounds[d]

    no_target = position_ids + 1 < prompt_lens[d]
    no_target[bounds[1:] - 1] = True
    place = begin + t
    targets = buffer[(place + 1).masked_fill_(no_target, 0)].long().masked_fill_(no_target, IGNORE_INDEX)
    return [buffer[place].int(), targets, position_ids.int(), bounds.int()]


def _outputs(buffer: Tensor, offsets: Tensor, T: int) -> list[Tensor]:
    """Allocate what a launch fills."""
    dtypes = (torch.int32, torch.int64, torch.int32)  # of ids, targets and positions
    bounds = offsets.new_empty(len(offsets), dtype=torch.int32)
    return [*(buffer.new_empty(T, dtype=dtype) for dtype in dtypes), bounds]


def _check_offsets(buffer: Tensor, offsets: Tensor, T: int) -> None:
    if offsets[0] < 0 or offsets[-1] > len(buffer) or (offsets.diff() < 1).any():
        raise ValueError(
            f"offsets must rise by at least 1 per document between 0 and {len(buffer)}, the length of "
            f"buffer, but is {offsets[:3].tolist()} ... {offsets[-3:].tolist()}; pass those of this buffer"
        )
    if offsets[-1] - offsets[0] != T:
        raise ValueError(
            f"num_tokens is {T} but the documents have {int(offsets[-1] - offsets[0])}; "
            "pass offsets[-1] - offsets[0]"
        )


@torch.library.custom_op("kit::pack", mutates_args=())
def _pack(buffer: Tensor, offsets: Tensor, prompt_lens: Tensor, T: int) -> list[Tensor]:
    if buffer.device.type == "cpu":  # where reading values does not wait for a device
        _check_offsets(buffer, offsets, T)
    if not uses_triton(buffer):
        return _torch_pack(buffer, offsets, prompt_lens, T)

    D = len(prompt_lens)
    packed = _outputs(buffer, offsets, T)
    with torch.cuda.device_of(buffer):
        _pack_kernel[(triton.cdiv(T + 1, BLOCK),)](
            buffer, offsets, prompt_lens, *packed, D, T, IGNORE_INDEX, BAD_TOKEN, BLOCK, num_warps=NUM_WARPS
        )
    return packed


@_pack.register_fake
def _(buffer, offsets, prompt_lens, T):
    return _outputs(buffer, offsets, T)


def pack(
    buffer: Tensor, offsets: Tensor, prompt_lens: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (input_ids, targets, position_ids, cu_seqlens) of one row, as PackedBatch.build does.

    The first three are (num_tokens,), and targets, which are class indices, int64; cu_seqlens is (D + 1,) for
    D documents. All others are int32.

    buffer: (total,) int32 or int64, token ids. The row's documents lie in it end to end, in the row's order.
    offsets: (D + 1,) int64, where each document begins in buffer, and where the last one ends. Rows can share
        a buffer: pass the slice of offsets that belongs to the row.
    prompt_lens: (D,) int32 or int64, tokens of each document's prompt.
    num_tokens: offsets[-1] - offsets[0]; an argument because reading it from a GPU would make the host wait.

    All tensors are contiguous and on one device. Raises ValueError for arguments that do not fit. Values are
    checked on a CPU only. On a GPU a num_tokens that does not fit gives the id -1 everywhere, at which the
    model's embedding fails.
    """
    integers = (torch.int32, torch.int64)
    for name, x, dtypes in (
        ("buffer", buffer, integers),
        ("offsets", offsets, (torch.int64,)),
        ("prompt_lens", prompt_lens, integers),
    ):
        if x.dim() != 1 or x.dtype not in dtypes or x.device != buffer.device or not x.is_contiguous():
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device}, but must be "
                f"one contiguous dimension of {' or '.join(map(str, dtypes))} on {buffer.device}; convert it"
            )
    D = len(prompt_lens)
    if D == 0 or len(offsets) != D + 1:
        raise ValueError(
            f"offsets has {len(offsets)} entries but prompt_lens {D}; a row has at least one document, "
            "and offsets one entry more, the end"
        )
    if num_tokens < D:
        raise ValueError(
            f"num_tokens is {num_tokens} but the row has {D} documents of at least one token; pass "
            "offsets[-1] - offsets[0]"
        )
    return tuple(_pack(buffer, offsets, prompt_lens, num_tokens))
