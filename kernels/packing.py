"""
Packs on the device: documents gathered from one flat token buffer into a row, and values of a row back to one line per document.

    pack      input_ids[t]    = buffer[offsets[d] + position_ids[t]]      d: document of t; position_ids[t] = t - cu_seqlens[d]
              targets[t]      = buffer[offsets[d] + position_ids[t] + 1]  or -100: inside the prompt, whose last token alone
                                                                          predicts, and at the last token of a document
    unpack    padded[d, i]    = values[cu_seqlens[d] + i]                 or fill where document d has ended

How it works. A program makes 1,024 places of the output. It finds the document of each by binary search in cu_seqlens, which
stays in the cache, and gathers; no program writes where another does, so there are no atomics. The targets are shifted once,
here, exactly as in kit.packing.PackedBatch.build. The gradient of unpacking is a gather too: each token has one place.

16,384 tokens: 128 KiB of tokens are read and 384 KiB written in one launch, instead of some ten launches per document, and the
row is never on the host. Unpacking fp32 values of D documents writes 4 D L bytes, L = max_seqlen, and needs no index.
"""

import torch
from torch import Tensor

from kit.kernels.backend import tl, triton, uses_triton
from kit.kernels.linear_cross_entropy_chunks import IGNORE_INDEX

BLOCK = 1024  # output places per program: 8 a thread; a row of 16,384 tokens makes 16 programs
NUM_WARPS = 4
BAD_TOKEN = (
    -1
)  # where a GPU finds a plan that does not fit: no embedding has this row, so the model's first lookup fails


def pack_reference(buffer, offsets, prompt_lens, documents):
    """The same function as a loop over documents, and the cu_seqlens that pack takes: the meaning of this file."""
    ids = [buffer[offsets[d] : offsets[d + 1]].long() for d in documents.tolist()]
    targets = [torch.full_like(x, IGNORE_INDEX) for x in ids]
    for d, x, target in zip(documents.tolist(), ids, targets, strict=True):
        first = max(int(prompt_lens[d]) - 1, 0)
        target[first : len(x) - 1] = x[first + 1 :]
    positions = [torch.arange(len(x)) for x in ids]
    return (
        torch.cat(ids),
        torch.cat(targets),
        torch.cat(positions),
        torch.tensor([0, *map(len, ids)]).cumsum(0).int(),
    )


def unpack_reference(values, cu_seqlens, max_seqlen, fill=0):
    """The same function as a loop over documents."""
    padded = values.new_full((len(cu_seqlens) - 1, max_seqlen, *values.shape[1:]), fill)
    for d, document in enumerate(values.split(cu_seqlens.diff().tolist())):
        padded[d, : len(document)] = document
    return padded


@triton.jit
def _find_document(cu_seqlens_ptr, t, D):
    """The last d of 0 .. D - 1 with cu_seqlens[d] <= t."""
    low = tl.zeros_like(t)
    high = low + D  # cu_seqlens[low] <= t < cu_seqlens[high]
    width = D
    while width > 1:
        middle = (low + high) // 2
        right = tl.load(cu_seqlens_ptr + middle) <= t
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
        width = (width + 1) // 2
    return low


@triton.jit
def _pack_kernel(
    buffer_ptr, offsets_ptr, prompt_lens_ptr, documents_ptr, cu_seqlens_ptr, input_ids_ptr, targets_ptr, position_ids_ptr,
    D, T, ignore_index, bad_token, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(
        0, BLOCK
    )  # cu_seqlens is int32: a row has fewer than 2**31 tokens
    d = _find_document(cu_seqlens_ptr, t, D)
    position = t - tl.load(cu_seqlens_ptr + d)
    length = tl.load(cu_seqlens_ptr + d + 1) - tl.load(cu_seqlens_ptr + d)
    document = tl.load(documents_ptr + d)
    start, end = (
        tl.load(offsets_ptr + document),
        tl.load(offsets_ptr + document + 1),
    )  # int64: a corpus passes 2**31 tokens
    fits = (end - start == length) & (position < length)
    speaks = (position + 1 < length) & (position + 1 >= tl.load(prompt_lens_ptr + document))
    inside = t < T
    token = tl.load(buffer_ptr + start + position, mask=inside & fits, other=bad_token)
    target = tl.load(buffer_ptr + start + position + 1, mask=inside & fits & speaks, other=ignore_index)
    tl.store(input_ids_ptr + t, token.to(tl.int64), mask=inside)
    tl.store(targets_ptr + t, target.to(tl.int64), mask=inside)
    tl.store(position_ids_ptr + t, position.to(tl.int64), mask=inside)


@triton.jit
def _unpack_kernel(values_ptr, cu_seqlens_ptr, padded_ptr, L, C, blocks, BLOCK: tl.constexpr):
    d = (tl.program_id(0) // blocks).to(tl.int64)  # d * L * C passes 2**31 for hidden states
    place = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(
        0, BLOCK
    )  # in a line of L * C numbers
    start = tl.load(cu_seqlens_ptr + d).to(tl.int64)
    length = tl.minimum(tl.load(cu_seqlens_ptr + d + 1) - start, L)
    inside = place < length * C
    tl.store(
        padded_ptr + d * L * C + place, tl.load(values_ptr + start * C + place, mask=inside), mask=inside
    )


@triton.jit
def _repack_kernel(padded_ptr, cu_seqlens_ptr, values_ptr, D, T, L, C, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # of T * C numbers
    t = place // C
    inside = t < T
    d = _find_document(cu_seqlens_ptr, t, D)
    position = t - tl.load(cu_seqlens_ptr + d)
    x = tl.load(padded_ptr + (d * L + position) * C + place % C, mask=inside & (position < L), other=0)
    tl.store(values_ptr + place, x, mask=inside)


def _places(cu_seqlens: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Document and position of every token: (T,), (T,) int64"""
    t = torch.arange(T, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].long(), t, right=True)
    return document, t - cu_seqlens[document]


def _check_boundaries(cu_seqlens: Tensor, T: int) -> None:
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != T or (cu_seqlens.diff() < 1).any():
        raise ValueError(
            f"cu_seqlens must rise from 0 to {T}, the number of tokens, by at least 1 a document, but is "
            f"{cu_seqlens[:3].tolist()} ... {cu_seqlens[-3:].tolist()}; use the cu_seqlens of this row"
        )


def _check_plan(
    buffer: Tensor, offsets: Tensor, prompt_lens: Tensor, documents: Tensor, cu_seqlens: Tensor
) -> None:
    lengths = offsets.diff()
    if offsets[0] != 0 or offsets[-1] != len(buffer) or (lengths < 0).any():
        raise ValueError(
            f"offsets must rise from 0 to {len(buffer)}, the length of buffer, but is "
            f"{offsets[:3].tolist()} ... {offsets[-3:].tolist()}; pass the offsets of this buffer"
        )
    if documents.min() < 0 or documents.max() >= len(prompt_lens):
        raise ValueError(
            f"documents names {int(documents.min())} to {int(documents.max())} but offsets has documents 0 to "
            f"{len(prompt_lens) - 1}; use a plan of these documents"
        )
    wrong = (lengths[documents] != cu_seqlens.diff()).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(
            f"document {int(documents[i])} has {int(lengths[documents[i]])} tokens in offsets but {int(cu_seqlens.diff()[i])} in "
            "cu_seqlens; make cu_seqlens from the lengths of this row's documents"
        )


@torch.library.custom_op("kit::pack", mutates_args=())
def _pack(
    buffer: Tensor, offsets: Tensor, prompt_lens: Tensor, documents: Tensor, cu_seqlens: Tensor, T: int
) -> tuple[Tensor, Tensor, Tensor]:
    D = len(documents)
    if buffer.device.type == "cpu":  # looking at values waits for nothing there
        _check_boundaries(cu_seqlens, T)
        _check_plan(buffer, offsets, prompt_lens, documents, cu_seqlens)
    if uses_triton(buffer):
        input_ids, targets, position_ids = (buffer.new_empty(T, dtype=torch.int64) for _ in range(3))
        with torch.cuda.device_of(buffer):
            _pack_kernel[(triton.cdiv(T, BLOCK),)](
                buffer, offsets, prompt_lens, documents, cu_seqlens, input_ids, targets, position_ids,
                D, T, IGNORE_INDEX, BAD_TOKEN, BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
        return input_ids, targets, position_ids
    place, position_ids = _places(cu_seqlens, T)
    source = offsets[documents][place] + position_ids
    silent = position_ids + 1 < prompt_lens[documents][place]
    silent[cu_seqlens[1:].long() - 1] = True
    targets = buffer[source.add(1).masked_fill_(silent, 0)].long().masked_fill_(silent, IGNORE_INDEX)
    return buffer[source].long(), targets, position_ids


@_pack.register_fake
def _(buffer, offsets, prompt_lens, documents, cu_seqlens, T):
    return tuple(buffer.new_empty(T, dtype=torch.int64) for _ in range(3))


@torch.library.custom_op("kit::unpack", mutates_args=())
def _unpack(values: Tensor, cu_seqlens: Tensor, L: int, fill: float) -> Tensor:
    (T, *rest), D = values.shape, len(cu_seqlens) - 1
    if values.device.type == "cpu":
        _check_boundaries(cu_seqlens, T)
        if cu_seqlens.diff().max() > L:
            raise ValueError(
                f"max_seqlen is {L} but the longest document has {int(cu_seqlens.diff().max())} tokens; pass that"
            )
    else:
        torch._assert_async((cu_seqlens.diff() <= L).all() & (cu_seqlens[-1] == T))
    padded = values.new_full((D, L, *rest), fill)
    if uses_triton(values):
        C = values[0].numel()
        if C:
            blocks = triton.cdiv(L * C, BLOCK)  # per document
            with torch.cuda.device_of(values):  # all on the grid's first axis: the others end at 65,535
                _unpack_kernel[(D * blocks,)](
                    values, cu_seqlens, padded, L, C, blocks, BLOCK, num_warps=NUM_WARPS
                )
    else:
        padded[_places(cu_seqlens, T)] = values
    return padded


@_unpack.register_fake
def _(values, cu_seqlens, L, fill):
    return values.new_empty((len(cu_seqlens) - 1, L, *values.shape[1:]))


@torch.library.custom_op("kit::unpack_backward", mutates_args=())
def _repack(padded: Tensor, cu_seqlens: Tensor, T: int) -> Tensor:
    """The values of the tokens, (T, ...), from padded (D, L, ...)."""
    (D, L), rest = padded.shape[:2], padded.shape[2:]
    if not uses_triton(padded):
        return padded[_places(cu_seqlens, T)]
    values = padded.new_empty((T, *rest))
    C = values[0].numel()
    if C:
        with torch.cuda.device_of(padded):
            _repack_kernel[(triton.cdiv(T * C, BLOCK),)](
                padded, cu_seqlens, values, D, T, L, C, BLOCK, num_warps=NUM_WARPS
            )  # fmt: skip
    return values


@_repack.register_fake
def _(padded, cu_seqlens, T):
    return padded.new_empty((T, *padded.shape[2:]))


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, cu_seqlens, L, fill):
        ctx.save_for_backward(cu_seqlens)
        ctx.T = len(values)
        return _unpack(values, cu_seqlens, L, fill)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dpadded):
        return _repack(dpadded.contiguous(), *ctx.saved_tensors, ctx.T), None, None, None


def _check_integers(device, **tensors) -> None:
    """Each is name=(tensor, dtypes allowed): flat, contiguous and on the device."""
    for name, (x, dtypes) in tensors.items():
        if x.dim() != 1 or x.dtype not in dtypes or x.device != device or not x.is_contiguous():
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device}, but needed is one contiguous "
                f"dimension of {' or '.join(map(str, dtypes))} on {device}; convert it first"
            )


def pack(
    buffer: Tensor,
    offsets: Tensor,
    prompt_lens: Tensor,
    documents: Tensor,
    cu_seqlens: Tensor,
    num_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, targets, position_ids) of one row, each (num_tokens,) int64: those of kit.packing.PackedBatch.build.

    buffer: (total,) int32 or int64, the tokens of all documents end to end. offsets: (number of documents + 1,) int64, where each
    begins, total last. prompt_lens: (number of documents,) int32 or int64. documents: (D,) int64, the row's documents in
    order, one of plan_packs' lists. cu_seqlens: (D + 1,) int32, where each begins in the row, num_tokens last. All contiguous
    and on one device. num_tokens is given because to read it from a GPU would make the host wait.

    Raises ValueError for arguments that do not fit. What only values can tell raises on a CPU; on a GPU a document whose length
    is not that in cu_seqlens gets the token -1, at which the model's embedding fails.
    """
    integers = (torch.int32, torch.int64)
    _check_integers(
        buffer.device, buffer=(buffer, integers), offsets=(offsets, (torch.int64,)), prompt_lens=(prompt_lens, integers),
        documents=(documents, (torch.int64,)), cu_seqlens=(cu_seqlens, (torch.int32,)),
    )  # fmt: skip
    if len(prompt_lens) != len(offsets) - 1:
        raise ValueError(
            f"prompt_lens has {len(prompt_lens)} entries but offsets {len(offsets)}; offsets has one more, the end"
        )
    if len(cu_seqlens) != len(documents) + 1 or len(documents) == 0:
        raise ValueError(
            f"cu_seqlens has {len(cu_seqlens)} entries but documents {len(documents)}; a row has at least one document, and "
            "cu_seqlens one entry more, the end"
        )
    if num_tokens < len(documents):
        raise ValueError(
            f"num_tokens is {num_tokens} but documents has {len(documents)}, of a token or more; pass cu_seqlens[-1]"
        )
    return _pack(buffer, offsets, prompt_lens, documents, cu_seqlens, num_tokens)


def unpack(values: Tensor, cu_seqlens: Tensor, max_seqlen: int, fill: float = 0) -> Tensor:
    """One line per document, (D, max_seqlen, ...), from values (T, ...) of a row; fill behind a document's end.

    Differentiable in values, any dtype; copied where it is not contiguous. cu_seqlens: (D + 1,) int32, 0 first, T last, on the
    device of values. max_seqlen: at least the tokens of the longest document. Raises ValueError for arguments that do not
    fit; a document longer than max_seqlen raises on a CPU and fails an assertion on a GPU, where looking would wait.
    """
    if values.dim() < 1 or len(values) == 0:
        raise ValueError(
            f"values has shape {tuple(values.shape)} but a row is (T, ...) with a token at least; pass such a row"
        )
    _check_integers(values.device, cu_seqlens=(cu_seqlens, (torch.int32,)))
    if len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens has {len(cu_seqlens)} entries but a row has at least a start and an end; pass the row's"
        )
    return _Unpack.apply(values.contiguous(), cu_seqlens, max_seqlen, fill)
