"""Which code runs: the Triton kernels on a GPU, plain torch everywhere else. Every file of kernels/ asks here.

macOS has no Triton. The kernels must still be *defined* there for their files to import, so `triton.jit` becomes a decorator
that returns its function, which nobody then calls.
"""

import os
import warnings
from functools import cache
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = SimpleNamespace(jit=lambda fn=None, **options: fn or (lambda f: f))
    tl = SimpleNamespace(constexpr=None)

HAS_TRITON = hasattr(triton, "__version__")
INTERPRET = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # Triton reads it at import too: the kernels run on CPU tensors, slowly


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels run for this tensor. They compute in fp32, so float64 (gradient checks) takes the torch path;
    so does bf16 in the interpreter, which does arithmetic on its bits (1.5 + 1.5 = inf)."""
    if not HAS_TRITON or tensor.dtype == torch.float64:
        return False
    return tensor.is_cuda or (INTERPRET and tensor.dtype != torch.bfloat16)


@cache
def has_tensor_cores(device: torch.device) -> bool:
    """Whether Triton's tl.dot reaches this CUDA card's tensor cores: from compute capability 8.0 on. Turing (7.5) has them, but
    the compiler multiplies without; there torch is faster, and we say so once."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        warnings.warn(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; Triton uses tensor cores from 8.0 on "
            "(RTX 30 and later), so attention runs in plain torch here: slower, and with more memory",
            stacklevel=2,
        )
    return major >= 8
