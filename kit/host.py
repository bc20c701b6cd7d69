"""CPU memory that holds what a card has no room for: layer inputs, optimizer states.

It is made by an operator of its own, so that a simulated step, where every device is a CPU, can tell it from the card's memory.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


@torch.library.custom_op("kit::host_empty", mutates_args=())
def _host_empty(num_bytes: int, pin: bool) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pin)


@_host_empty.register_fake
def _(num_bytes, pin):
    return torch.empty(num_bytes, dtype=torch.uint8)


class Host:
    """Gives out CPU memory, pinned where a card asks for it; where pinning fails it warns once and gives pageable memory."""

    def __init__(self):
        self.can_pin = True

    def empty(self, num_bytes: int, *, for_card: bool) -> Tensor:
        """(num_bytes,) uint8 on the CPU, uninitialised."""
        if for_card and self.can_pin:
            try:
                return _host_empty(num_bytes, True)
            except RuntimeError as error:
                self.can_pin = False
                warnings.warn(f"CPU memory is pageable, so the card waits for every copy: {error}", stacklevel=2)
        return _host_empty(num_bytes, False)
