"""Choose which code runs: the Triton kernels on a GPU, plain torch everywhere else.

macOS has no Triton. The kernels must still be *defined* there for their files to import, so `triton.jit`
becomes a decorator that returns its function, which nobody then calls.
"""

import os
import warnings
from functools import cache
from types import SimpleNamespace

import torch

# A product and a sum are one instruction, as Triton 3.9 has it by default. It warns that 3.10 will round in
# between, which would change results, so the choice is made here.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = SimpleNamespace(jit=lambda fn=None, **options: fn or (lambda f: f))
    tl = SimpleNamespace(constexpr=None)

HAS_TRITON = hasattr(triton, "__version__")
# Triton reads it too when it is imported: the kernels then run on CPU tensors, slowly.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
CPU_BLOCK_BYTES = 2 * 2**20  # of rows, on a CPU: several passes over them in the L2 cache read memory once


def row_blocks(x: torch.Tensor) -> list[slice]:
    """Split the rows of x (N, columns) for the torch path: slices of a few rows each."""
    step = max(1, CPU_BLOCK_BYTES // max(x.shape[1] * x.element_size(), 1))
    return [slice(i, i + step) for i in range(0, x.shape[0], step)]


def side_by_side(x: torch.Tensor) -> torch.Tensor:
    """Return x (T, H, D) with the heads of a token in one piece: a copy if they are not."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def uses_triton(tensor: torch.Tensor) -> bool:
    """Return whether the Triton kernels run for this tensor.

    They compute in fp32, so float64 (gradient checks) takes the torch path. So does bf16 in the interpreter,
    which does arithmetic on its bits (1.5 + 1.5 = inf).
    """
    if not HAS_TRITON or tensor.dtype == torch.float64:
        return False
    return tensor.is_cuda or (INTERPRET and tensor.dtype != torch.bfloat16)


@cache
def compute_capability(device: torch.device) -> int:
    """Return what the kernels are compiled for: 89 for compute capability 8.9, 0 for a CPU.

    TRITON_OVERRIDE_ARCH=sm89 has Triton compile for another card than the one that is here.
    """
    if device.type != "cuda":
        return 0
    if override := os.environ.get("TRITON_OVERRIDE_ARCH"):
        return int(override.strip("sma"))
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def has_tensor_cores(device: torch.device) -> bool:
    """Return whether Triton's tl.dot uses this card's tensor cores: from compute capability 8.0 on.

    Turing (7.5) has tensor cores, but Triton's compiler does not use them. torch is faster there; a warning
    is printed once.
    """
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        warnings.warn(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; Triton uses "
            "tensor cores from 8.0 on (RTX 30 and later), so attention runs in plain torch here: slower, and "
            "with more memory",
            stacklevel=2,
        )
    return major >= 8
