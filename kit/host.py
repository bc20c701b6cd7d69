"""CPU memory that holds what a card has no room for: layer inputs, optimizer states.

It is made by an operator of its own, so that a simulated step, where every device is a CPU, can tell it from the card's memory.
"""

from __future__ import annotations

import mmap
import warnings

import torch
from torch import Tensor


class _PinnedPages(mmap.mmap):
    """Pages that the driver keeps in place, so that copies to and from a card run beside everything else.

    Exactly as many as are asked for: torch's own pinned memory comes in powers of two, 512 MiB for a state of 302.
    """

    pinned = False

    def pin(self, address: int) -> None:
        """Raises RuntimeError if the system pins no more memory."""
        error = int(torch.cuda.cudart().cudaHostRegister(address, len(self), 0))
        if error:
            raise RuntimeError(f"cudaHostRegister returned error {error}")
        self.address, self.pinned = address, True

    def __del__(self):
        if self.pinned:
            torch.cuda.synchronize()  # a copy may still be reading
            torch.cuda.cudart().cudaHostUnregister(self.address)


@torch.library.custom_op("kit::host_empty", mutates_args=())
def _host_empty(num_bytes: int, pin: bool) -> Tensor:
    if not pin or not num_bytes:
        return torch.empty(num_bytes, dtype=torch.uint8)
    pages = _PinnedPages(-1, num_bytes)
    memory = torch.frombuffer(pages, dtype=torch.uint8)  # which keeps the pages alive
    pages.pin(memory.data_ptr())
    return memory


@_host_empty.register_fake
def _(num_bytes, pin):
    return torch.empty(num_bytes, dtype=torch.uint8)


def host_empty(num_bytes: int, *, for_card: bool) -> Tensor:
    """(num_bytes,) uint8 on the CPU, uninitialised; pinned if a card will copy from or to it.

    If the system pins no more, warns and gives pageable memory, for whose copies the card waits.
    """
    try:
        return _host_empty(num_bytes, for_card)
    except RuntimeError as error:
        warnings.warn(
            f"CPU memory is pageable, so the card waits for every copy: {error}. To pin it, free memory or raise the limit on "
            "locked memory (ulimit -l; under WSL, memory= in .wslconfig)",
            stacklevel=2,
        )
        return _host_empty(num_bytes, False)
