"""Count Triton kernels, too: in the interpreter, a program at a time.

A kernel is one launch, and each of its loads, stores and atomics counts whenever it runs, with the elements
that its mask selects.
"""

import counting
from counting import Count

from kit.kernels.backend import INTERPRET


class Counter(counting.Counter):
    """Count Triton kernels under "triton", or under the operator of torch.library that launches them."""

    _restore = None

    def __enter__(self):
        if INTERPRET and self._restore is None:
            self._restore = _count_triton(self.add)
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        if self._restore is not None and not self._inside:
            self._restore()
            self._restore = None


def _count_triton(add):
    """Replace the interpreter's builder by one that counts, and return a function that undoes it.

    No class is changed.
    """
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
    builder = CountingBuilder()
    builder.options = before.options

    def put(one):
        interpreter.interpreter_builder = interpreter.interpreter_semantic.builder = one

    put(builder)
    return lambda: put(before)


def _masked_bytes(ptrs, mask) -> int:
    """Return the bytes at the pointers that the mask, broadcast over them, selects."""
    return int(mask.data.sum()) * (ptrs.data.size // mask.data.size) * _element_bytes(ptrs)


def _element_bytes(ptrs) -> int:
    return max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
