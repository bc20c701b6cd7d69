"""Keep layer inputs in CPU memory between the forward and the backward pass.

Forward: each input is copied to the CPU while the layers after it run. Backward: while one layer's attention
runs, the input of the layer before it is copied back. It is not copied earlier, because memory peaks in the
feed-forward before that. The device holds the last layer's input, which is needed at once, and during the
backward pass one or two staged inputs.

On a GPU the CPU memory is pinned and both directions run on one side stream; elsewhere the same copies run in
place. NOT RUN ON A GPU. Why the order of the streams is right:
- To the CPU: the side stream waits for the compute stream, which has just computed x. x stays referenced
  until the compute stream has waited for the copy, so nothing can overwrite its memory before it was read.
  record_stream would do the same, but it frees memory when the GPU gets there, while a CPU that runs ahead is
  already allocating: the peak would depend on timing. Here it does not.
- Back: staged memory belongs to the compute stream. The side stream waits for the compute stream before it
  writes there, so all earlier uses of this memory come first. The compute stream waits for the copy's event
  before it reads, and the memory is freed only after that.
- A CPU buffer is used again once its copy back is queued on the side stream. The next write to it is queued
  on the same stream, behind that copy.
"""

from __future__ import annotations

import contextlib
import mmap
import warnings
import weakref
from collections import deque

import torch
from torch import Tensor

IN_FLIGHT = 2  # inputs on the device while they are copied to the CPU: the running layer's, and one that lags
ROUNDING = 2**20  # bytes: rows differ by a few tokens, and a slightly longer one should fit the same buffer
STAGING = 2  # the most inputs on the device on the way back: the running layer's and the next one's


class KeptInput:
    """A layer's input between its forward and its backward pass."""

    def __init__(self, x: torch.Tensor, index: int, previous: KeptInput | None):
        self.index = index
        self.previous = previous  # the input of the layer before it, which the backward pass needs next
        self.device = x.device
        self.on_device: torch.Tensor | None = None  # kept there, or staged
        self.buffer: torch.Tensor | None = None  # CPU memory, as bytes
        self.on_host: torch.Tensor | None = None  # the input, a view of the buffer
        self.loaded: torch.cuda.Event | None = None  # recorded after its copy back to the device


class HostInputs:
    """Move inputs to CPU memory and back.

    Call keep in a layer's forward pass, flush after the last layer's, and fetch and done around a backward
    pass.
    """

    def __init__(self):
        self.buffers: list[torch.Tensor] = []  # free CPU memory, kept between steps
        self.stream: torch.cuda.Stream | None = None
        self.leaving: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()  # copies to the CPU
        self.staged: list[KeptInput] = []  # copied back to the device, or on the way
        self.latest = lambda: None  # weak reference to the input kept last

    def keep(self, x: torch.Tensor, index: int, *, on_device: bool) -> KeptInput:
        """Keep x, the input of layer `index`, of any shape. on_device: copy nothing; it is needed at once."""
        previous = self.latest()
        if previous is not None and previous.index != index - 1:  # of another forward pass
            previous = None
        kept = KeptInput(x, index, previous)
        self.latest = weakref.ref(kept)
        if on_device:
            kept.on_device = x
            return kept
        if x.is_cuda and self.stream is None:
            self.stream = torch.cuda.Stream(x.device)
        kept.buffer = self.take(x.nbytes, pin=x.is_cuda)
        kept.on_host = kept.buffer[: x.nbytes].view(x.dtype).view(x.shape)
        while len(self.leaving) >= IN_FLIGHT:
            self._free_oldest()
        self.leaving.append((x, self._copy(kept.on_host, x)))
        return kept

    def flush(self) -> None:
        """Free the inputs that are being copied: after the last layer, before the head needs the memory."""
        while self.leaving:
            self._free_oldest()

    def fetch(self, kept: KeptInput) -> torch.Tensor:
        """Return the input on the device. Raises RuntimeError if done() was called for it."""
        if kept.on_device is None and kept.on_host is None:
            raise RuntimeError(
                "a layer's input is gone: with offload a graph runs backward once, without retain_graph"
            )
        if kept.on_device is None:
            self._stage(kept)
        if kept.loaded is not None:
            torch.cuda.current_stream(kept.device).wait_event(kept.loaded)
        return kept.on_device

    def prefetch(self, kept: KeptInput) -> None:
        """Start copying the input that is needed after this one. Call it when the device has room for it."""
        previous = kept.previous
        if previous is not None and previous.on_host is not None and previous.on_device is None:
            self._stage(previous)

    def done(self, kept: KeptInput) -> None:
        """Free the input's memory on the device and on the CPU: the layer's backward pass is queued."""
        if kept.buffer is not None:
            self.buffers.append(kept.buffer)
        kept.on_device = kept.on_host = kept.buffer = None
        self.staged = [other for other in self.staged if other is not kept]

    def take(self, num_bytes: int, *, pin: bool) -> torch.Tensor:
        """Return a free CPU buffer of at least num_bytes, or a new one, in multiples of ROUNDING."""
        for i, buffer in enumerate(self.buffers):
            if buffer.nbytes >= num_bytes:
                return self.buffers.pop(i)
        if self.buffers:
            self.buffers.pop()  # rows have become longer: replace the small buffers one by one
        return host_empty(-(-num_bytes // ROUNDING) * ROUNDING, for_card=pin)

    def _stage(self, kept: KeptInput) -> None:
        while len(self.staged) >= STAGING:  # left over from a backward pass that stopped half-way
            self._wait_for_copies(kept.device)
            self.staged.pop(0).on_device = None
        kept.on_device = torch.empty_like(kept.on_host, device=kept.device)
        kept.loaded = self._copy(kept.on_device, kept.on_host)
        self.staged.append(kept)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event | None:
        """Copy on the side stream, after all that is queued on the compute stream.

        Return the event of the copy; None without streams.
        """
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def _free_oldest(self) -> None:
        x, event = self.leaving.popleft()
        if event is not None:
            torch.cuda.current_stream(x.device).wait_event(event)

    def _wait_for_copies(self, device: torch.device) -> None:
        if self.stream is not None:
            torch.cuda.current_stream(device).wait_stream(self.stream)


class _PinnedPages(mmap.mmap):
    """CPU memory that the driver keeps in place, so that copies from and to a card run beside other work.

    Its size is exact. torch's own pinned memory comes in powers of two: 512 MiB for a state of 302.
    """

    pinned = False

    def pin(self, address: int) -> None:
        """Pin the pages at this address. Raises RuntimeError if the system pins no more memory."""
        error = int(torch.cuda.cudart().cudaHostRegister(address, len(self), 0))
        if error:
            with contextlib.suppress(RuntimeError):  # the next launch reports the error: let it be this one
                torch.ones(1, device="cuda")
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
    """Return (num_bytes,) uint8 on the CPU, uninitialised; pinned if a card will copy from or to it.

    If the system pins no more memory, warn and return pageable memory, for whose copies the card waits.
    """
    try:
        return _host_empty(num_bytes, for_card)
    except RuntimeError as error:
        warnings.warn(
            f"CPU memory is pageable, so the card waits for every copy: {error}. To pin it, free memory or "
            "raise the limit on locked memory (ulimit -l; under WSL, memory= in .wslconfig)",
            stacklevel=2,
        )
        return _host_empty(num_bytes, False)
