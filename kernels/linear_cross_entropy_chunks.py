"""
A linear head in chunks of rows, forward and backward, without ever holding the (N, V) logits.

    logits = hidden[rows] @ weight.T
    dhidden[rows] = scale * slope * (dlogits @ weight)
    dweight      += scale * dlogits.T @ (slope * hidden[rows])

A row's slope multiplies the thin (R, H) matrices, never the (R, V) one. dweight is summed in fp32, because a
bf16 sum of 16 chunks loses what the small ones add. It costs 4VH bytes (1.1 GiB at V = 262,144, H = 1,152),
and nothing for a frozen head. For a bf16 weight the sum is kept in two halves and rounded to bf16 inside the
memory of the first, so that an fp32 and a bf16 dweight never exist side by side.
"""

import functools
import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

MAX_CHUNK_BYTES = 512 * 2**20  # of logits: small beside a 3B model, and larger chunks are no faster
MIN_ROWS = 512  # a chunk reads weight and rewrites dweight: 128 rows move four times the bytes of 1,024
COPIED_ELEMENTS = 2**16  # of dweight, rounded through a copy: small, and the rest takes a dozen steps
# If 16-bit factors cannot be added to an fp32 sum in one call, products of this many bytes are added one by
# one. On a card they stay in its cache, or three times as much memory would move; on a CPU this bounds the
# copy.
PRODUCT_BYTES = {"cuda": 2 * 2**20, "cpu": 32 * 2**20}


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def rows_per_chunk(N: int, V: int, H: int, element_size: int, max_rows: int = 0) -> int:
    """Return the rows of logits per chunk.

    As many as fit MAX_CHUNK_BYTES with the three thin (R, H) matrices beside them, but never under MIN_ROWS,
    even if the chunk is larger then (fp32 and V = 262,144: 512 rows are 512 MiB). N rows that need k chunks
    are split into k equal ones: a remainder of one row would cost a whole trip through weight and dweight.
    max_rows: the limit to use instead; 0 = none.
    """
    most = max_rows or max(MIN_ROWS, MAX_CHUNK_BYTES // ((V + 3 * H) * element_size))
    return math.ceil(N / math.ceil(N / most)) if N else 0


def logit_chunks(
    hidden: Tensor, weight: Tensor, kept: Tensor, max_rows: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (rows, x (R, H), logits (R, V)) of each chunk of the rows that are kept.

    The logits of all chunks share one buffer: the system would page in a fresh one for each chunk.
    max_rows: most rows per chunk; 0 = rows_per_chunk decides.
    """
    size = rows_per_chunk(len(kept), *weight.shape, weight.element_size(), max_rows)
    if size:
        buffer = weight.new_empty(size, weight.shape[0])
        for rows in kept.split(size):
            x = hidden.index_select(0, rows).to(weight.dtype)
            yield rows, x, torch.mm(x, weight.T, out=buffer[: len(rows)])


class HeadGradients:
    """Sum dhidden and dweight over the chunks; None if autograd does not ask for one.

    overwrite: write dhidden over hidden. The caller then zeroes the rows that are never added.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool], *, overwrite: bool = False):
        # a mean over 16k tokens leaves fp16's range until backward applies the loss scale: fp32 until then
        self.dtypes = [torch.float32 if x.dtype == torch.float16 else x.dtype for x in (hidden, weight)]
        self.dhidden = None
        if needs[0] and overwrite:
            self.dhidden = hidden.detach()
        elif needs[0]:
            self.dhidden = hidden.new_zeros(hidden.shape, dtype=self.dtypes[0])

        self.dweight = None
        if needs[1]:
            V, H = weight.shape
            rows = halves(V) if self.dtypes[1] == torch.bfloat16 else [V]
            self.dweight = [weight.new_empty(n, H, dtype=wide(weight.dtype)) for n in rows]
        self.beta = 0.0  # the first chunk overwrites: zeros would be one more trip through V * H numbers

    def add(
        self, rows: Tensor, x: Tensor, dlogits: Tensor, weight: Tensor, slope: Tensor | None, scale: float
    ) -> None:
        """Add a chunk: x = hidden[rows] (R, H), dlogits (R, V), weight (V, H), slope (R,) or None = 1."""
        if self.dhidden is not None:
            dx = _product(dlogits, weight)
            dx = dx.to(torch.promote_types(dx.dtype, self.dhidden.dtype))
            dx = dx * (scale if slope is None else (slope * scale)[:, None])
            self.dhidden.index_copy_(0, rows, dx.to(self.dhidden.dtype))

        if self.dweight is not None:
            x = x if slope is None else (x * slope[:, None]).to(x.dtype)
            columns = dlogits.split([len(part) for part in self.dweight], dim=1)
            for part, dlogits_of_part in zip(self.dweight, columns, strict=True):
                add_matmul_(part, dlogits_of_part.T, x, scale, self.beta)
            self.beta = 1.0

    def finish(self) -> list[Tensor | None]:
        """Return [dhidden, dweight]."""
        if self.dweight is None:
            return [self.dhidden, None]
        if not self.beta:
            for part in self.dweight:
                part.zero_()
        dweight = self.dweight[0] if len(self.dweight) == 1 else join_narrowed(*self.dweight)
        return [self.dhidden, dweight]


def halves(n: int) -> list[int]:
    return [n - n // 2, n // 2]


def join_narrowed(first: Tensor, second: Tensor) -> Tensor:
    """Return both fp32 halves as one bf16 tensor, in the memory of the first, which is at least as large.

    Elements s to 2s are read from bytes 4s to 8s and written to bytes 2s to 4s, which were read before; only
    the very first go through a copy.
    """
    source, target = first.view(-1), first.view(-1).view(torch.bfloat16)
    n = len(source)
    start = min(COPIED_ELEMENTS, n)
    target[:start] = source[:start].to(torch.bfloat16)
    while start < n:
        stop = min(2 * start, n)
        target[start:stop] = source[start:stop]
        start = stop
    target[n : n + second.numel()] = second.view(-1)
    return target[: n + second.numel()].view(-1, first.shape[1])


def scaled(
    gradients: list[Tensor | None], upstream: Tensor, dtypes: tuple[torch.dtype, ...]
) -> list[Tensor | None]:
    """Multiply the gradients by upstream, in place, and return them in the dtypes of their inputs."""
    for gradient in gradients:
        if gradient is not None:
            _scale_(gradient, upstream)
    return [g if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b. On a card in fp32: it splits a sum over V into parts, and would add them in bf16."""
    return torch.mm(a, b, torch.float32) if a.is_cuda and a.itemsize == 2 else a @ b


@torch.library.custom_op("kit::add_matmul_", mutates_args=("total",))
def add_matmul_(total: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> None:
    """Compute total = beta * total + alpha * a @ b; a and b may be 16-bit and total fp32."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, alpha=alpha, beta=beta, out=total)
    elif _adds_in_fp32(a):
        torch.addmm(total, a, b, torch.float32, alpha=alpha, beta=beta, out=total)
    else:
        _add_matmul_in_pieces_(total, a, b, alpha, beta)


def _add_matmul_in_pieces_(total: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> None:
    rows = max(PRODUCT_BYTES[a.device.type] // (b.shape[1] * 4), 1)
    for part, some in zip(total.split(rows), a.split(rows), strict=True):
        if a.is_cuda:
            product = torch.mm(some, b, torch.float32)
            part.mul_(beta).add_(product, alpha=alpha) if beta else torch.mul(product, alpha, out=part)
        else:
            torch.addmm(part, some.float(), b.float(), alpha=alpha, beta=beta, out=part)


def _adds_in_fp32(a: Tensor) -> bool:
    with torch.cuda.device_of(a):
        return a.is_cuda and _cuda_adds_in_fp32(a.dtype)


@functools.cache
def _cuda_adds_in_fp32(dtype: torch.dtype) -> bool:
    """Return whether this torch adds the product of 16-bit matrices to an fp32 sum in one call.

    Warns if not: the loss is slower then.
    """
    total, a = torch.zeros(16, 16, device="cuda"), torch.zeros(16, 16, device="cuda", dtype=dtype)
    try:
        torch.addmm(total, a, a, torch.float32, out=total)
    except (RuntimeError, TypeError) as error:
        warnings.warn(
            f"torch {torch.__version__} cannot add {dtype} products to an fp32 sum in one call ({error}), so "
            "the head's gradient takes longer; another release of torch may be able to",
            stacklevel=2,
        )
        return False
    return True


@torch.library.custom_op("kit::scale_", mutates_args=("gradient",))
def _scale_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiply gradient by upstream, one number, in place and in fp32.

    A 0-dim factor on a GPU would be rounded to bf16 first.
    """
    if gradient.is_cuda:
        gradient.mul_(upstream.expand_as(gradient))
    elif upstream.item() != 1:  # it is nearly always 1, and reading it on a CPU costs nothing
        gradient.mul_(upstream.item())


@add_matmul_.register_fake
def _(total, a, b, alpha, beta):
    return None


@_scale_.register_fake
def _(gradient, upstream):
    return None


def checked(
    hidden, weight, targets, softcap, temperature, max_rows=0
) -> tuple[Tensor, Tensor, torch.dtype, list[float]]:
    """Return (hidden (N, H), targets (N,), dtype of the matmuls, [1 / temperature, softcap or 0]).

    Raises ValueError for arguments that do not fit together.
    """
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"weight is a {type(weight).__name__}, not a tensor: a module may add something to its weight (a "
            "LoRA adapter does), and this function would leave that out; keep adapters off the output head "
            "(peft: leave lm_head out of target_modules) or merge them, then pass module.weight"
        )
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; needed are (..., H) "
            "and (V, H): pass the head's weight as nn.Linear keeps it, not transposed"
        )
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden has positions {tuple(hidden.shape[:-1])} but targets has {tuple(targets.shape)}; shift "
            "both before the call: hidden[:, :-1] and targets[:, 1:], or targets padded with ignore_index at "
            "the end"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets is {targets.dtype} but class indices are needed; pass targets.long()")
    if not hidden.device == weight.device == targets.device:
        raise ValueError(
            f"hidden is on {hidden.device}, weight on {weight.device}, targets on {targets.device}; "
            "move them to one device"
        )
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; both must be floating point: a quantised "
            "head (4 or 8 bit) must be dequantised first, or better left out of quantisation"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap} but must be positive; pass None for no cap")
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature} but must be positive; pass 1.0 for the model's own distribution"
        )
    if max_rows < 0:
        raise ValueError(
            f"max_rows is {max_rows} but must be >= 0; pass 0 for as many rows of logits as half a GiB holds"
        )

    dtype, device = hidden.dtype, hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif weight.dtype != dtype:
        raise ValueError(
            f"hidden is {dtype} but weight is {weight.dtype}; cast one, or call under "
            f"torch.autocast({device!r})"
        )
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    return rows, flat, dtype, [1 / temperature, softcap or 0.0]


@torch.library.custom_op("kit::kept_rows", mutates_args=())
def kept_rows(targets: Tensor, V: int, ignore_index: int) -> Tensor:
    """Return the indices of the targets that count. Raises ValueError for a target outside 0 .. V - 1.

    On a GPU this waits for the device: the number of matmul rows depends on it. Reading the range right after
    that wait costs microseconds, and an index past the end would make the kernels read foreign memory.
    """
    kept = (targets != ignore_index).nonzero()[:, 0]
    if len(kept):
        low, high = torch.stack(targets[kept].aminmax()).tolist()
        if low < 0 or high >= V:
            raise ValueError(
                f"targets reach from {low} to {high} but weight has {V} rows, ids 0 to {V - 1}, and "
                f"ignore_index is {ignore_index}; check that tokenizer and model belong together, or pass "
                "the ignore_index that the targets use"
            )
    return kept


@kept_rows.register_fake
def _(targets, V, ignore_index):
    # fake targets have no values: all are kept, so that a memory plan is an upper bound
    return torch.empty_like(targets)
