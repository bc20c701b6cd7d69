"""Packs: documents of many lengths laid end to end in rows of at most `capacity` tokens, without padding.

`plan_packs` decides which documents share a row: best-fit decreasing (longest document first, each into the
fullest row that still has room) over the whole set at once. The free spaces of the rows with room are kept in
order, so "the fullest row with room for n tokens" is found by bisection. `PackedBatch` is one row as the
model reads it; attention must stop at the boundaries in `cu_seqlens`. `pack_rows` builds the rows of a step
on the device that trains on them.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch

from kit.kernels.cross_entropy import IGNORE_INDEX
from kit.kernels.packing import pack as pack_row


def plan_packs(lengths: Sequence[int], capacity: int, *, seed: int = 0) -> list[list[int]]:
    """Decide which documents share a row: best-fit decreasing over all, then the rows in a random order.

    lengths: tokens per document, each in 1..capacity. capacity: tokens per row. seed: breaks ties between
    documents of one length and orders the rows and the documents inside each; the same seed gives the same
    plan on every machine. Returns the document indices of each row; every index occurs exactly once.
    Raises ValueError for a length outside 1..capacity (nothing is cut and nothing is dropped here).
    """
    if capacity < 1:
        raise ValueError(f"capacity is {capacity} but a row holds at least one token; pass row_tokens >= 1")
    lengths = [int(length) for length in lengths]
    for i, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(
                f"document {i} has {length} tokens but a row holds 1 to {capacity}; "
                f"raise row_tokens to {length} or drop the document before planning"
            )
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    order.sort(key=lengths.__getitem__, reverse=True)  # stable: the shuffle breaks ties
    packs: list[list[int]] = []
    spaces: list[int] = []  # tokens that rows have free, in order, each number once
    rows_with: defaultdict[int, list[int]] = defaultdict(list)  # free space -> rows
    for i in order:
        place = bisect_left(spaces, lengths[i])
        if place == len(spaces):
            space, row = capacity, len(packs)
            packs.append([])
        else:
            space = spaces[place]
            row = rows_with[space].pop()
            if not rows_with[space]:
                del spaces[place]
        packs[row].append(i)
        if left := space - lengths[i]:
            if not rows_with[left]:
                insort(spaces, left)
            rows_with[left].append(row)
    for pack in packs:
        rng.shuffle(pack)
    rng.shuffle(packs)
    return packs


def fill(packs: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int) -> float:
    """Return the share of the rows' capacity that holds a token, 0..1; 1.0 for no rows at all."""
    return sum(lengths[i] for pack in packs for i in pack) / (len(packs) * capacity) if packs else 1.0


def plan_steps(packs: Sequence[Sequence[int]], batch_traces: int) -> list[list[int]]:
    """Group rows, in their order, into optimizer steps of `batch_traces` documents on average.

    A row is never split, so a step takes rows until the documents so far reach the next multiple of
    batch_traces: steps differ by a few documents and the number of steps stays the paper's. If one row alone
    holds more than batch_traces, each step takes one row. Returns the row indices of each step.
    """
    if batch_traces < 1:
        raise ValueError(
            f"batch_traces is {batch_traces} but a step needs at least one trace; pass batch_traces >= 1"
        )
    steps: list[list[int]] = []
    current: list[int] = []
    num_documents = 0
    for row, pack in enumerate(packs):
        current.append(row)
        num_documents += len(pack)
        if num_documents >= batch_traces * (len(steps) + 1):
            steps.append(current)
            current = []
    if current:
        steps.append(current)
    return steps


@dataclass(frozen=True)
class Document:
    """One tokenised trace, as the model reads it: the prompt, which carries no loss, then the response.

    In a conversation of several turns, the response goes on to its end, and no_loss leaves out what is given.
    """

    ids: torch.Tensor  # (n,) int32 or int64
    prompt_len: int  # tokens
    no_loss: tuple[tuple[int, int], ...] = ()  # (start, end) of what later turns give, after an answer

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        """Tokens that carry loss: the response, less the first token of a document without a prompt."""
        return max(len(self) - max(self.prompt_len, 1), 0) - sum(end - start for start, end in self.no_loss)


@dataclass(frozen=True)
class PackedBatch:
    """One row of documents laid end to end: T tokens, D documents.

    targets are shifted once, here: targets[i] is the token after input_ids[i] in the same document, or -100
    (inside the prompt, and at the last token of a document). Never shift again, and never pass an
    attention_mask with a pack: it would switch off the masking by documents.
    """

    input_ids: torch.Tensor  # (T,) int32
    targets: torch.Tensor  # (T,) int64, IGNORE_INDEX where there is no loss
    position_ids: torch.Tensor  # (T,) int32, from 0 in every document
    cu_seqlens: torch.Tensor  # (D + 1,) int32, 0 first, T last
    max_seqlen: int  # tokens of the longest document
    num_targets: int  # targets that are not IGNORE_INDEX; known without reading them from a card

    @classmethod
    def build(cls, documents: Sequence[Document]) -> PackedBatch:
        """Lay documents end to end. Raises ValueError for no document or an empty one.

        This uses numpy because slicing a tensor takes longer than copying a document.
        """
        lengths = _lengths(documents)
        cu_seqlens = list(accumulate(lengths, initial=0))
        input_ids, position_ids = np.empty((2, cu_seqlens[-1]), dtype=np.int32)
        targets = np.full(cu_seqlens[-1], IGNORE_INDEX, dtype=np.int64)
        positions = np.arange(max(lengths), dtype=np.int32)
        for document, start, end in zip(documents, cu_seqlens, cu_seqlens[1:], strict=False):
            ids = document.ids.numpy()
            # the last prompt token predicts the first response token
            first = start + min(max(document.prompt_len, 1), len(ids)) - 1
            input_ids[start:end] = ids
            targets[first : end - 1] = ids[first + 1 - start :]
            position_ids[start:end] = positions[: len(ids)]
        for begin, end in _later_prompts(documents, cu_seqlens):
            targets[begin:end] = IGNORE_INDEX

        return cls(
            *map(torch.from_numpy, (input_ids, targets, position_ids)),
            cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
            max_seqlen=max(lengths),
            num_targets=sum(document.num_targets for document in documents),
        )

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the same row on another device; copies do not wait for one another."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in self.TENSORS}
        if moved["cu_seqlens"].is_cuda and not self.cu_seqlens.is_cuda:
            from kit.kernels.packed_attention import accept_copy  # imports Triton

            accept_copy(moved["cu_seqlens"], self.cu_seqlens, len(self), self.max_seqlen)
        return replace(self, **moved)

    TENSORS = ("input_ids", "targets", "position_ids", "cu_seqlens")

    @property
    def num_documents(self) -> int:
        return len(self.cu_seqlens) - 1

    def __len__(self) -> int:
        return len(self.input_ids)


def _lengths(documents: Sequence[Document]) -> list[int]:
    """Return the tokens per document of a row. Raises ValueError for no document or an empty one."""
    lengths = [len(document) for document in documents]
    if not lengths or 0 in lengths:
        raise ValueError(f"a pack needs documents of at least one token; got lengths {lengths}")
    return lengths


def _later_prompts(documents: Sequence[Document], starts: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the (begin, end) of a row's targets that the documents' no_loss leaves out."""
    for document, start in zip(documents, starts, strict=False):
        for begin, end in document.no_loss:
            yield start + begin - 1, start + end - 1  # the target of a place is the token after it


def pack_rows(rows: Sequence[Sequence[Document]], device: torch.device) -> list[PackedBatch]:
    """Pack each row's documents, on the device that trains on them.

    On a CPU this is PackedBatch.build. On a card, kit.kernels.packing builds each row from the step's token
    ids, which are copied there as int32 with their offsets and prompt lengths. The host waits for neither.
    Raises ValueError for a row without documents and for an empty document.
    """
    if device.type == "cpu" or not rows:
        return [PackedBatch.build(row) for row in rows]
    return _pack_on_device(rows, device)


def _pack_on_device(rows: Sequence[Sequence[Document]], device: torch.device) -> list[PackedBatch]:
    num_tokens, plan, sizes = 0, [], []
    for row in rows:
        offsets = list(accumulate(_lengths(row), initial=num_tokens))
        plan += [*offsets, *(document.prompt_len for document in row)]
        sizes += [len(row) + 1, len(row)]
        num_tokens = offsets[-1]

    # The host waits for a copy from pageable memory, and not for one from pinned memory, which torch reuses
    # only after the copy has read it.
    pin = device.type == "cuda"
    ids = torch.empty(num_tokens, dtype=torch.int32, pin_memory=pin)
    torch.cat([document.ids.int() for row in rows for document in row], out=ids)
    plan = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=pin).copy_(torch.tensor(plan))
    ids, plan = (
        torch.empty(x.shape, dtype=x.dtype, device=device).copy_(x, non_blocking=True) for x in (ids, plan)
    )

    parts = plan.split(sizes)
    batches = []
    for row, offsets, prompt_lens in zip(rows, parts[::2], parts[1::2], strict=True):
        lengths = _lengths(row)
        packed = pack_row(ids, offsets, prompt_lens, sum(lengths))
        num_targets = sum(document.num_targets for document in row)
        for begin, end in _later_prompts(row, accumulate(lengths, initial=0)):
            packed[1][begin:end] = IGNORE_INDEX
        batches.append(PackedBatch(*packed, max_seqlen=max(lengths), num_targets=num_targets))
    return batches
