"""
The gradient of the head's weight, one block of the vocabulary at a time: the whole gradient never exists.

    forward    loss, dhidden[rows] = dlogits @ weight, and logsumexp of every row; no dweight
    later      for each block b of the vocabulary, dweight[b] = dlogits[:, b].T @ hidden, where
               dlogits = softmax - one-hot comes from recomputed logits and the logsumexp of the forward pass

How it works. hidden (N, H), targets and logsumexp are small and stay in memory. From them any block of
columns of the logits can be recomputed on its own, and with it the gradient of the block's rows of weight.
The caller updates these rows at once and frees the block: no later block reads them. A tied embedding adds
the few rows that its lookup contributed, block by block.

16,384 tokens of Gemma-3-1B (V = 262,144, H = 1,152): this saves the fp32 sum of dweight, 1.1 GiB; its bf16
copy, which a tied embedding keeps through the whole backward pass, 0.6 GiB; and the dense gradient of the
lookup, 0.6 GiB. It costs one more matmul, 2NVH flops.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kit.kernels.cross_entropy import IGNORE_INDEX
from kit.kernels.linear_cross_entropy_chunks import (
    MAX_CHUNK_BYTES,
    HeadGradients,
    add_matmul_,
    checked,
    kept_rows,
    logit_chunks,
    wide,
)
from kit.kernels.linear_cross_entropy_rows import block_gradients_, row_gradients_

VOCABULARY_UNIT = 256  # rows: a block then ends where a block of 8-bit optimizer state does, whatever H is
BLOCK_BYTES = MAX_CHUNK_BYTES // 2  # logits and dweight of a block: 6,912 rows of Gemma-3-1B at 16,384 tokens


def loss_without_dweight(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, *,
    softcap: float | None = None, max_rows: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the sum of token losses * scale, its dhidden, and what dweight_blocks needs to compute dweight
    later.

    hidden (N, H), weight (V, H), targets (N,), softcap and max_rows are those of linear_cross_entropy.
    Autograd differentiates nothing here.
    Returns (loss, fp32 scalar; dhidden (N, H); kept (K,) int64, the rows that count; their logsumexp (K,)
    fp32).
    """
    hidden, targets, dtype, score = checked(hidden, weight, targets, softcap, 1.0)
    kept = kept_rows(targets, weight.shape[0], IGNORE_INDEX)
    loss, logsumexp = hidden.new_zeros((), dtype=wide(dtype)), hidden.new_empty(len(kept), dtype=wide(dtype))
    gradients, done = HeadGradients(hidden, weight, (True, False)), 0
    for rows, x, logits in logit_chunks(hidden, weight, kept, max_rows):
        target = targets[rows]
        z_target = logits.gather(1, target[:, None])[:, 0].to(wide(dtype))
        if softcap is not None:
            z_target = softcap * torch.tanh(z_target / softcap)
        logprobs = row_gradients_(logits, target, *score)
        logsumexp[done : done + len(rows)] = z_target - logprobs
        done += len(rows)
        loss -= logprobs.sum()
        gradients.add(rows, x, logits, weight, None, scale)

    logits = None  # frees the chunk
    return loss * scale, gradients.finish()[0].to(hidden.dtype), kept, logsumexp


def dweight_blocks(
    hidden: Tensor, weight: Tensor, targets: Tensor, kept: Tensor, logsumexp: Tensor, scale: float, *,
    softcap: float | None = None, block_bytes: int | None = None,
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """Yield (first row, dweight of weight[first : first + B], (B, H) fp32), one block of the vocabulary at a
    time.

    Recomputing the logits of the blocks costs one more matmul (2NVH flops in all). The caller may update the
    rows of a block when it gets them: no later block reads them. block_bytes: the size of a block's logits
    (K, B) and its dweight; None = BLOCK_BYTES.
    """
    x, target = hidden.index_select(0, kept), targets.index_select(0, kept)
    row_bytes = len(kept) * x.element_size() + weight.shape[1] * wide(weight.dtype).itemsize
    per_block = max((block_bytes or BLOCK_BYTES) // row_bytes // VOCABULARY_UNIT, 1) * VOCABULARY_UNIT
    for first in range(0, weight.shape[0], per_block):
        part = weight[first : first + per_block]
        dweight = weight.new_zeros(part.shape, dtype=wide(weight.dtype))
        if len(kept):
            logits = x @ part.T
            block_gradients_(logits, target, logsumexp, first, 1.0, softcap or 0.0)
            add_matmul_(dweight, logits.T, x, scale, 0.0)
            logits = None
        yield first, dweight
