"""
Counts what a call moves and multiplies, on a CPU: bytes loaded and stored, flops of the matmuls, launches.

    with Counter() as counter:
        linear_cross_entropy(hidden, weight, targets).backward()
    counter.total, counter.by_operator["aten::mm"]

How it works. Every torch operator is one launch that reads each of its inputs once and writes each of its outputs once; views and
allocations are free; flops are those of torch.utils.flop_counter. A Triton kernel (TRITON_INTERPRET=1) is one launch, and each of
its loads, stores and atomics counts as often as it runs, at the elements its mask lets through. An operator of torch.library is
opened: what its implementation calls is counted, not the operator. (On fake tensors nothing can be opened: there it counts like
any other, each input read once, each result and each mutated argument written once.)

What the count is: the traffic if nothing stayed in a cache between two kernels. A torch operator is taken for perfect: cuBLAS
reads a matrix several times, a log-softmax of a long row twice, and both count as once, whereas a Triton kernel that reads a row
twice counts as twice. Tiles that a Triton matmul reads again count each time; on a GPU much of that comes from the L2 cache.
What it is not: time.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import astuple, dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kit.kernels.backend import INTERPRET


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

    def __mul__(self, times: int) -> Count:
        return Count(*(a * times for a in astuple(self)))

    __rmul__ = __mul__


# Operators that read only as much of an argument as another one, or the result ("out"), has elements.
PARTIAL_READS = {
    "index_select": ("self", "out"), "gather": ("self", "out"), "index": ("self", "out"), "embedding": ("weight", "out"),
    "nll_loss_forward": ("self", "target"), "nll_loss_backward": ("self", None),
}  # fmt: skip
# In-place operators that write only what they are given, and whose own old values they do not read.
PARTIAL_WRITES = {"index_copy_": "source", "scatter_": "index"}
OVERWRITES = {"copy_", "fill_", "zero_", *PARTIAL_WRITES}
CREATES = ("new_", "zeros_like", "ones_like", "full_like")  # they take only the shape of what they are given
FREE = {
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "set_",
    "_unsafe_view",
    "_reshape_alias",
}
FREE |= {"item", "_local_scalar_dense", "promote_types", "lift_fresh"}  # answers on the host


class Counter(TorchDispatchMode):
    """The with-block. `total` and `by_operator` may be read inside it and after. Triton kernels count in the interpreter only."""

    def __init__(self):
        super().__init__()
        self.by_operator: dict[str, Count] = defaultdict(Count)
        self._inside: list[str] = []  # operators of torch.library that are open
        self._restore = None

    @property
    def total(self) -> Count:
        return sum(self.by_operator.values(), Count())

    def add(self, name: str, count: Count) -> None:
        self.by_operator[self._inside[0] if self._inside else name] += count

    def __enter__(self):
        if INTERPRET and self._restore is None:
            self._restore = _count_triton(self.add)
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        if self._restore is not None and not self._inside:
            self._restore()
            self._restore = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_fake = any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs)))
        if func.namespace == "prim":  # questions, such as which device
            return func(*args, **kwargs)
        if func.namespace != "aten" and not is_fake:
            self._inside.append(func._schema.name)
            try:
                with self:
                    return func.redispatch(_IMPLEMENTATION, *args, **kwargs)
            finally:
                self._inside.pop()
        out = func(*args, **kwargs)
        count = count_operator(func, args, kwargs, out)
        if count.launches:
            self.add(func._schema.name, count)
        return out


_IMPLEMENTATION = torch._C.DispatchKeySet(
    torch._C.DispatchKey.CompositeExplicitAutograd
)  # where custom_op registers it


def count_operator(func, args: tuple, kwargs: dict, out) -> Count:
    """One aten operator; no launch where it only makes a view or an allocation."""
    name = func._schema.name.removeprefix("aten::")
    plain_name = name.rstrip("_")  # addmm_ multiplies as addmm does
    if func.is_view or name in FREE:
        return Count()
    inputs = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    written = {
        argument.name
        for argument in func._schema.arguments
        if argument.alias_info and argument.alias_info.is_write
    }
    if name == "copy_" and _start(inputs["self"]) == _start(inputs["src"]):
        return Count()  # onto itself: the interpreter hands its arguments back so
    results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    if not written and any(_start(x) in {_start(y) for y in _tensors(inputs)} for x in results if x.numel()):
        return Count()  # reshape and contiguous of what is so already
    loaded, read_name, read_like = {}, *PARTIAL_READS.get(name, (None, None))
    for argument, value in inputs.items():
        if name.startswith(CREATES):
            break
        is_read = (
            argument not in written
            or func.namespace != "aten"
            or (name.endswith("_") and name not in OVERWRITES)
        )
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
    """The byte at which a tensor begins; its storage's identity, as fake tensors have no address."""
    return x.untyped_storage()._cdata, x.storage_offset() * x.element_size()


def _bytes(x: Tensor) -> int:
    """Of the elements that exist: an expanded dimension is one of them, however often it shows."""
    size = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        size *= length if stride else min(length, 1)
    return size


def _count_triton(add):
    """Puts a builder that counts in the place of the interpreter's own; returns what undoes it. No class is touched."""
    import triton.runtime.interpreter as interpreter

    class CountingBuilder(interpreter.InterpreterBuilder):
        def set_grid_dim(self, *grid):
            super().set_grid_dim(*grid)
            add("triton", Count(launches=1))

        def create_masked_load(self, ptrs, mask, *rest):
            add("triton", Count(bytes_loaded=_masked_bytes(ptrs, mask)))
            return super().create_masked_load(ptrs, mask, *rest)

        def create_masked_store(self, ptrs, value, mask, *rest):
            add("triton", Count(bytes_stored=_masked_bytes(ptrs, mask)))
            return super().create_masked_store(ptrs, value, mask, *rest)

        def create_atomic_rmw(self, op, ptr, val, mask, *rest):
            n = _masked_bytes(ptr, mask)
            add("triton", Count(bytes_loaded=n, bytes_stored=n))
            return super().create_atomic_rmw(op, ptr, val, mask, *rest)

        def create_atomic_cas(self, ptr, *rest):
            n = ptr.data.size * _element_bytes(ptr)
            add("triton", Count(bytes_loaded=n, bytes_stored=n))
            return super().create_atomic_cas(ptr, *rest)

        def create_dot(self, a, b, d, *rest):
            add("triton", Count(flops=2 * d.data.size * a.data.shape[-1]))
            return super().create_dot(a, b, d, *rest)

    before = interpreter.interpreter_builder
    counting = CountingBuilder()
    counting.options = before.options

    def put(builder):
        interpreter.interpreter_builder = interpreter.interpreter_semantic.builder = builder

    put(counting)
    return lambda: put(before)


def _masked_bytes(ptrs, mask) -> int:
    """Bytes behind the pointers that the mask, broadcast over them, lets through."""
    return int(mask.data.sum()) * (ptrs.data.size // mask.data.size) * _element_bytes(ptrs)


def _element_bytes(ptrs) -> int:
    return max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
