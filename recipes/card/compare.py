"""How far results lie from the truth, beside torch's own error on the same inputs."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kit.recipes.card.results import Card, CardLost, Results, one_line

DTYPES = torch.bfloat16, torch.float16, torch.float32  # that kernels are checked in
ROUNDING = 4e-6  # relative error that a sum of V numbers in fp32 may have
SLICE = 2**24  # numbers compared at once: their float64 copies take 0.4 GiB


def name_of(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def normal(card: Card, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    """Return normal random numbers on the card."""
    return torch.randn(*shape, device=card.device).mul_(scale).to(dtype)


def running_sum(card: Card, lengths: list[int]) -> Tensor:
    """Return cu_seqlens of documents of these lengths, (documents + 1,) int32 on the card."""
    return torch.tensor([0, *lengths], device=card.device).cumsum(0).to(torch.int32)


def rms_error(a: Tensor, b: Tensor) -> float:
    """Return the root of the mean of (a - b)^2, in float64."""
    if a.shape != b.shape:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ")
    pieces = zip(a.detach().reshape(-1).split(SLICE), b.detach().reshape(-1).split(SLICE), strict=True)
    total = sum((x.double() - y.double()).square().sum() for x, y in pieces)
    return float(total / max(a.numel(), 1)) ** 0.5


def rms(x: Tensor) -> float:
    return rms_error(x, x.new_zeros(()).expand(x.shape))


def judge(results: Results, name: str, labels, ours, torchs, truths, floors, text: str = "", **more) -> None:
    """Record one check. It holds if the rms error of each tensor is at most twice torch's plus the floor.

    labels, ours, torchs, truths, floors: of each tensor of a result. torchs: computed by torch in the same
    dtype, or None. floors: allowed beyond twice torch's error, which may be zero by chance. more: of the row.
    """
    numbers, words, holds = {}, [], True
    for label, x, peer, truth, floor in zip(labels, ours, torchs, truths, floors, strict=True):
        error, size = rms_error(x, truth), rms(truth)
        torch_error = None if peer is None else rms_error(peer, truth)
        allowed = torch_error if torch_error is not None and math.isfinite(torch_error) else 0.0
        fine = error <= 2 * allowed + floor  # False for NaN
        holds &= fine
        numbers[label] = {"error": error, "torch_error": torch_error, "size": size, "floor": floor}

        relative = f"{error / size:.1e}" if size > 1e-9 else f"{error:.1e} absolute"
        beside = f" ({error / torch_error:.2f}x)" if torch_error else ""
        words.append(f"{label} {relative}{beside}" + ("" if fine else " WRONG"))
    results.check(name, holds, ", ".join([*words, text] if text else words), numbers=numbers, **more)


Tensors = list[Tensor]


def beside_float64(ours: Callable, reference: Callable, inputs: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """Return outputs and gradients of ours, of the reference on the same inputs, and on float64 ones."""
    truth = outputs_and_gradients(reference, [x.double() for x in inputs])
    torchs = outputs_and_gradients(reference, inputs)
    with poisoned():
        return outputs_and_gradients(ours, inputs), torchs, truth


def outputs_and_gradients(function: Callable, inputs: Tensors) -> Tensors:
    """Return the outputs, then the inputs' gradients. The upstream gradients are the same in every dtype."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    read = [output.detach().clone() for output in outputs]  # before backward overwrites what it may
    upstream = [
        torch.linspace(-1, 2, x.numel(), device=x.device).reshape(x.shape).to(x.dtype) for x in outputs
    ]
    torch.autograd.backward(outputs, upstream)
    return [*read, *(leaf.grad for leaf in leaves)]


Pairs = dict[str, tuple[Tensor, Tensor]]


def judge_equal(results: Results, name: str, pairs: Pairs, share: float = 0.0) -> None:
    """Record one check: the tensors of each pair hold the same bits, apart from a share of their elements."""
    numbers = {}
    for label, (a, b) in pairs.items():
        differ = a.numel() if a.shape != b.shape else int((a != b).sum())  # NaN differs from everything
        numbers[label] = {"error": differ, "torch_error": None, "size": a.numel()}
    wrong = {label: row["error"] for label, row in numbers.items() if row["error"]}
    holds = all(row["error"] <= share * row["size"] for row in numbers.values())
    differences = ", ".join(f"{n:,} of {numbers[label]['size']:,} in {label}" for label, n in wrong.items())
    results.check(name, holds, f"different: {differences}" if wrong else "the same bits", numbers=numbers)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what torch.empty, new_empty and empty_like return with NaN (integers: the largest value).

    This uses torch's own switch. A TorchDispatchMode would see each operator of ours as one call, and none of
    the allocations inside it.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fills = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cuBLAS may warn that its order of summation is not fixed
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = fills


def attempt(card: Card, function: Callable, *arguments):
    """Run a peer. Return (result, "") or (None, why it failed). Raise CardLost if the card is lost by it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = function(*arguments)
            card.synchronize()
        return result, ""
    except Exception as error:
        why = one_line(error)[:80]
        error.__traceback__ = None  # its frames hold tensors

    card.free()
    if card.is_lost():
        raise CardLost(f"a peer: {why}")
    return None, why
