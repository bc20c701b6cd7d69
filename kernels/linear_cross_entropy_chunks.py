"""
A linear head in chunks of rows, forth and back; the (N, V) logits are never held.

    logits = hidden[rows] @ weight.T
    dhidden[rows] = scale * slope * (dlogits @ weight)          dweight += scale * dlogits.T @ (slope * hidden[rows])

A row's slope multiplies the thin (R, H) matrices, never the (R, V) one. dweight is summed in fp32: a bf16 sum of 16 chunks loses
what the small ones add. It costs 4VH bytes (1.1 GiB at V = 262,144, H = 1,152), nothing for a frozen head. For a bf16 weight the
sum lies in two halves, and is rounded to bf16 in the first half's own memory: no moment holds both dweights.
"""

import functools
import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

MAX_CHUNK_BYTES = (
    512 * 2**20
)  # of logits: small beside a 3B model, and from here on larger chunks are no faster
MIN_ROWS = 512  # each chunk reads W and rewrites dW: chunks of 128 rows move four times the bytes that chunks of 1,024 do
COPIED_ELEMENTS = 2**16  # of dweight that are rounded through a copy: small, and the rest takes a dozen steps
# where 16-bit factors cannot be added to an fp32 sum in one call, a product of this many bytes is added at a time: on a card few
# enough to stay in its cache, else memory moves three times as much; on a CPU it bounds the copy
PRODUCT_BYTES = {"cuda": 2 * 2**20, "cpu": 32 * 2**20}


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are held in: fp32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def rows_per_chunk(N: int, V: int, H: int, element_size: int, max_rows: int = 0) -> int:
    """Rows of logits made at once: as many as fit MAX_CHUNK_BYTES with the three thin (R, H) matrices beside them, but never
    under MIN_ROWS, even if the chunk is larger then (fp32 and V = 262,144: 512 rows are 512 MiB). N rows that need k chunks go
    in k equal ones: no remainder of one row pays for a whole trip through W and dW. max_rows: the most instead; 0 = none."""
    most = max_rows or max(MIN_ROWS, MAX_CHUNK_BYTES // ((V + 3 * H) * element_size))
    return math.ceil(N / math.ceil(N / most)) if N else 0


def logit_chunks(
    hidden: Tensor, weight: Tensor, kept: Tensor, max_rows: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields (rows, x (R, H), logits (R, V)). The logits are one buffer: a fresh one a chunk would be paged in anew each time.
    max_rows: most rows of a chunk; 0 = as rows_per_chunk."""
    size = rows_per_chunk(len(kept), *weight.shape, weight.element_size(), max_rows)
    if size:
        buffer = weight.new_empty(size, weight.shape[0])
        for rows in kept.split(size):
            x = hidden.index_select(0, rows).to(weight.dtype)
            yield rows, x, torch.mm(x, weight.T, out=buffer[: len(rows)])


class HeadGradients:
    """dhidden and dweight; None if autograd does not ask for one. overwrite: dhidden is hidden's own memory, and the caller
    zeroes the rows that are never added."""

    def __init__(self, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool], *, overwrite: bool = False):
        # a mean over 16k tokens leaves fp16's range until the loss scale comes: fp16's gradients stay fp32 until backward
        self.dtypes = [torch.float32 if x.dtype == torch.float16 else x.dtype for x in (hidden, weight)]
        self.dhidden = None
        if needs[0]:
            self.dhidden = (
                hidden.detach() if overwrite else hidden.new_zeros(hidden.shape, dtype=self.dtypes[0])
            )
        rows = halves(len(weight)) if self.dtypes[1] == torch.bfloat16 else [len(weight)]
        self.dweight = (
            [weight.new_empty(n, weight.shape[1], dtype=wide(weight.dtype)) for n in rows]
            if needs[1]
            else None
        )
        self.beta = 0.0  # the first chunk overwrites: zeros would be one more trip through V * H numbers

    def add(
        self, rows: Tensor, x: Tensor, dlogits: Tensor, weight: Tensor, slope: Tensor | None, scale: float
    ) -> None:
        """x = hidden[rows] (R, H), dlogits (R, V), weight (V, H), slope (R,) or None = 1 everywhere."""
        if self.dhidden is not None:
            dx = _product(dlogits, weight)
            dx = dx.to(torch.promote_types(dx.dtype, self.dhidden.dtype)) * (
                scale if slope is None else (slope * scale)[:, None]
            )
            self.dhidden.index_copy_(0, rows, dx.to(self.dhidden.dtype))
        if self.dweight is not None:
            x = x if slope is None else (x * slope[:, None]).to(x.dtype)
            for part, columns in zip(
                self.dweight, dlogits.split([len(part) for part in self.dweight], dim=1), strict=True
            ):
                add_matmul_(part, columns.T, x, scale, self.beta)
            self.beta = 1.0

    def finish(self) -> list[Tensor | None]:
        """[dhidden, dweight]."""
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
    """Both fp32 halves as one bf16 tensor, in the memory of the first, which is not the smaller.

    Elements s to 2s are read from bytes 4s to 8s and written to bytes 2s to 4s, which were read before; only the very first go
    through a copy.
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
    """gradients *= upstream, in place, in their inputs' dtypes."""
    for gradient in gradients:
        if gradient is not None:
            _scale_(gradient, upstream)
    return [g if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; in fp32 on a card, where a sum over V is split into parts, and the parts of a bf16 product are added in bf16."""
    return torch.mm(a, b, torch.float32) if a.is_cuda and a.itemsize == 2 else a @ b


@torch.library.custom_op("kit::add_matmul_", mutates_args=("total",))
def add_matmul_(total: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> None:
    """total = beta * total + alpha * a @ b, where a and b may be 16-bit and total fp32."""
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
    """Whether this torch multiplies 16-bit matrices into an fp32 sum in one call. Warns if not: the loss is slower then."""
    total, a = torch.zeros(16, 16, device="cuda"), torch.zeros(16, 16, device="cuda", dtype=dtype)
    try:
        torch.addmm(total, a, a, torch.float32, out=total)
    except (RuntimeError, TypeError) as error:
        warnings.warn(
            f"torch {torch.__version__} cannot add {dtype} products to an fp32 sum in one call ({error}), so the head's gradient "
            "takes longer; another release of torch may",
            stacklevel=2,
        )
        return False
    return True


@torch.library.custom_op("kit::scale_", mutates_args=("gradient",))
def _scale_(gradient: Tensor, upstream: Tensor) -> None:
    """gradient *= upstream (one number), in place and in fp32: a 0-dim GPU factor would be rounded to bf16 first."""
    if gradient.is_cuda:
        gradient.mul_(upstream.expand_as(gradient))
    elif upstream.item() != 1:  # nearly always 1, and on a CPU looking costs nothing
        gradient.mul_(upstream.item())


@add_matmul_.register_fake
def _(total, a, b, alpha, beta):
    return None


@_scale_.register_fake
def _(gradient, upstream):
    return None


IGNORE_INDEX = -100  # torch's default, and what every collator writes


def checked(
    hidden, weight, targets, softcap, temperature, max_rows=0
) -> tuple[Tensor, Tensor, torch.dtype, list[float]]:
    """(hidden (N, H), targets (N,), compute dtype, [1 / temperature, softcap or 0]). Raises ValueError."""
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"weight is a {type(weight).__name__}, not a tensor: a module may add something to its weight (a LoRA adapter does), "
            "and this function would leave that out; keep adapters off the output head (peft: leave lm_head out of "
            "target_modules) or merge them, then pass module.weight"
        )
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; needed are (..., H) and (V, H): "
            "pass the head's weight as nn.Linear keeps it, not transposed"
        )
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden has positions {tuple(hidden.shape[:-1])} but targets has {tuple(targets.shape)}; "
            "shift both before the call: hidden[:, :-1] and targets[:, 1:], or targets padded with ignore_index at the end"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets is {targets.dtype} but class indices are needed; pass targets.long()")
    if not hidden.device == weight.device == targets.device:
        raise ValueError(
            f"hidden is on {hidden.device}, weight on {weight.device}, targets on {targets.device}; move them to one device"
        )
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; both must be floating point: a quantised head (4 or 8 bit) "
            "must be dequantised first, or better left out of quantisation"
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
            f"hidden is {dtype} but weight is {weight.dtype}; cast one, or call under torch.autocast({device!r})"
        )
    return (
        hidden.reshape(-1, hidden.shape[-1]),
        targets.reshape(-1).long(),
        dtype,
        [1 / temperature, softcap or 0.0],
    )


@torch.library.custom_op("kit::kept_rows", mutates_args=())
def kept_rows(targets: Tensor, V: int, ignore_index: int) -> Tensor:
    """Indices of the targets that count. On a GPU this waits for the device: the number of matmul rows depends on it. Reading
    the range right after that wait costs microseconds, and an index past the end would make the kernels read foreign memory."""
    kept = (targets != ignore_index).nonzero()[:, 0]
    if len(kept):
        low, high = torch.stack(targets[kept].aminmax()).tolist()
        if low < 0 or high >= V:
            raise ValueError(
                f"targets reach from {low} to {high} but weight has {V} rows, ids 0 to {V - 1}, and ignore_index is "
                f"{ignore_index}; check that tokenizer and model belong together, or pass the targets' own ignore_index"
            )
    return kept


@kept_rows.register_fake
def _(targets, V, ignore_index):
    return torch.empty_like(
        targets
    )  # fake targets have no values: all are kept, so a memory plan is an upper bound
