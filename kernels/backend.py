"""Which code runs: the Triton kernels on a GPU, plain torch everywhere else. Every file of kernels/ asks here.

macOS has no Triton. The kernels must still be *defined* there for their files to import, so `triton.jit` becomes a decorator
that returns its function, which nobody then calls.
"""

import os
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = SimpleNamespace(jit=lambda fn: fn)
    tl = SimpleNamespace(constexpr=None)

HAS_TRITON = hasattr(triton, "__version__")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it at import too: the kernels run on CPU tensors, slowly


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels run for this tensor. They compute in fp32, so float64 (gradient checks) takes the torch path;
    so does bf16 in the interpreter, which does arithmetic on its bits (1.5 + 1.5 = inf)."""
    if not HAS_TRITON or tensor.dtype == torch.float64:
        return False
    return tensor.is_cuda or (INTERPRET and tensor.dtype != torch.bfloat16)
