"""
Count what a call moves and multiplies, on a CPU: bytes loaded and stored, flops of the matmuls, launches.

    with Counter() as counter:
        linear_cross_entropy(hidden, weight, targets).backward()
    counter.total, counter.by_operator["aten::mm"]

How it works. Every torch operator is one launch that reads each of its inputs once and writes each of its
outputs once; views and allocations are free; flops are those of torch.utils.flop_counter. For an operator of
torch.library, what its implementation calls is counted and not the operator itself. (Fake tensors run no
implementation: the operator then counts like any other, each input read once, each result and each mutated
argument written once, and LAUNCHES has its launches.) Triton kernels are counted by
tests/kernels/triton_counting.py alone.

What the count means: the traffic if nothing stayed in a cache between two kernels. A torch operator is
assumed to be perfect: cuBLAS reads a matrix several times, a log-softmax reads a long row twice, and both
count once, whereas a Triton kernel that reads a row twice counts twice. Tiles that a Triton matmul reads
again count each time; on a GPU many of them come from the L2 cache. The count is not a time.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Count:
    launches: int = 0
    bytes_loaded: int = 0
    bytes_stored: int = 0
    flops: int = 0

    @property
    def bytes(self) -> int:
        return self.bytes_loaded + self.bytes_stored

    def __add__(self, other: Count) -> Count:
        return Count(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Count) -> Count:
        return Count(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


# Operators that read only as many elements of an argument as another one, or the result ("out"), has.
PARTIAL_READS = {
    "index_select": ("self", "out"), "gather": ("self", "out"), "index": ("self", "out"),
    "embedding": ("weight", "out"),
    "nll_loss_forward": ("self", "target"), "nll_loss_backward": ("self", None),
}  # fmt: skip
# In-place operators that write only as many elements as this argument has, and do not read the old values.
PARTIAL_WRITES = {"index_copy_": "source", "scatter_": "index"}
OVERWRITES = {"copy_", "fill_", "zero_", *PARTIAL_WRITES}
CREATES = ("new_", "zeros_like", "ones_like", "full_like")  # these use only the shape of their argument
FREE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
FREE |= {"set_", "_unsafe_view", "_reshape_alias"}
FREE |= {"item", "_local_scalar_dense", "promote_types", "lift_fresh"}  # these answer on the host
# Operators of ours that launch several kernels on a card. The rest of those in a training step launch one.
LAUNCHES = {"kit::rms_norm_backward": 2, "kit::packed_attention_backward": 2, "kit::decode_attention": 2}


class Counter(TorchDispatchMode):
    """Count inside a with-block. Read `total` and `by_operator` inside or after it."""

    def __init__(self):
        super().__init__()
        self.by_operator: dict[str, Count] = defaultdict(Count)
        self._inside: list[str] = []  # operators of torch.library that are open

    @property
    def total(self) -> Count:
        return sum(self.by_operator.values(), Count())

    def add(self, name: str, count: Count) -> None:
        self.by_operator[self._inside[0] if self._inside else name] += count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_fake = any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs)))
        if func.namespace == "prim":  # queries, such as a tensor's device
            return func(*args, **kwargs)
        if func.namespace != "aten" and not is_fake:
            self._inside.append(func._schema.name)
            try:
                with self:
                    return func.redispatch(_IMPLEMENTATION, *args, **kwargs)
            finally:
                self._inside.pop()
        out = func(*args, **kwargs)
        name, count = func._schema.name, count_operator(func, args, kwargs, out)
        if count.launches:
            self.add(name, replace(count, launches=LAUNCHES.get(name, 1)))
        return out


# where custom_op registers an implementation
_IMPLEMENTATION = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)


def count_operator(func, args: tuple, kwargs: dict, out) -> Count:
    """Count one operator; without a launch if it only creates a view or allocates."""
    name = func._schema.name.removeprefix("aten::")
    plain_name = name.rstrip("_")  # addmm_ multiplies as addmm does
    if func.is_view or name in FREE:
        return Count()

    arguments = func._schema.arguments
    inputs = dict(zip((x.name for x in arguments), args, strict=False)) | kwargs
    written = {x.name for x in arguments if x.alias_info and x.alias_info.is_write}
    if name == "copy_" and _start(inputs["self"]) == _start(inputs["src"]):
        return Count()  # onto itself: so the interpreter copies its arguments back
    results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    if not written and any(_start(x) in {_start(y) for y in _tensors(inputs)} for x in results if x.numel()):
        return Count()  # reshape and contiguous of a tensor that needs no copy

    loaded, read_name, read_like = {}, *PARTIAL_READS.get(name, (None, None))
    for argument, value in inputs.items():
        if name.startswith(CREATES):
            break
        updates = name.endswith("_") and name not in OVERWRITES  # reads the old values of what it writes
        is_read = argument not in written or func.namespace != "aten" or updates
        if plain_name in ("addmm", "baddbmm", "addmv") and argument == "self" and inputs.get("beta", 1) == 0:
            is_read = False
        for x in _tensors({argument: value}):
            if argument == read_name:
                like = results[0] if read_like == "out" else inputs[read_like] if read_like else None
                loaded[_start(x)] = 0 if like is None else like.numel() * x.element_size()
            elif is_read:
                loaded[_start(x)] = max(loaded.get(_start(x), 0), _bytes(x))

    if name in PARTIAL_WRITES:
        stored = inputs[PARTIAL_WRITES[name]].numel() * inputs["self"].element_size()
    else:
        mutated = [] if func.namespace == "aten" else _tensors({name: inputs.get(name) for name in written})
        stored = sum(_bytes(x) for x in results + mutated)  # an aten operator returns what it mutates
    formula = flop_registry.get(getattr(torch.ops.aten, plain_name, None))
    flops = formula(*args, **{k: v for k, v in kwargs.items() if k != "out"}, out_val=out) if formula else 0
    return Count(1, sum(loaded.values()), stored, flops)


def _tensors(inputs: dict) -> list[Tensor]:
    return [x for value in inputs.values() for x in tree_leaves(value) if isinstance(x, Tensor)]


def _start(x: Tensor) -> tuple[int, int]:
    """Return the byte at which a tensor begins, by its storage's identity: fake tensors have no address."""
    return x.untyped_storage()._cdata, x.storage_offset() * x.element_size()


def _bytes(x: Tensor) -> int:
    """Return the bytes of the elements in memory: an expanded dimension counts as one element."""
    size = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        size *= length if stride else min(length, 1)
    return size
