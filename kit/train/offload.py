"""Offload: layer inputs wait in CPU memory between the forward and the backward pass.

Forward: each input is copied to the CPU while the layers after it run. Backward: while one layer's attention runs, the input of
the layer before it is copied back; not earlier, because the feed-forward before it is the fullest moment. On the device stay the
last layer's input, which is needed at once, and one or two staged inputs during the backward pass.

On a GPU the CPU memory is pinned and both directions run on one side stream; elsewhere the same copies run in place. NOT RUN ON A
GPU. The order that makes the streams right:
- to the CPU: the side stream waits for the compute stream, which has just made x. x stays referenced until the compute stream has
  waited for the copy, so its memory cannot be written before it was read. record_stream would do the same, but gives memory back
  when the GPU gets there, while a CPU that runs ahead is already allocating: the peak would depend on timing. Here it does not.
- back: staged memory is the compute stream's. The side stream waits for the compute stream before it writes there: all that used
  this memory before has been given to the compute stream by then. The compute stream waits for the copy's event before it reads,
  and the memory is given back only after that.
- CPU memory is handed on once its copy back has been given to the side stream; what is written to it next follows on that stream.
"""

from __future__ import annotations

import contextlib
import mmap
import warnings
import weakref
from collections import deque

import torch
from torch import Tensor

IN_FLIGHT = 2  # inputs whose device memory is held on the way to the CPU: the running layer's, and one whose copy may lag
ROUNDING = 2**20  # bytes: rows differ by a few tokens, and the next, slightly longer one should find room
STAGING = 2  # most inputs on the device on the way back: the running layer's and the next one's


class KeptInput:
    """One layer's input between its forward and its backward pass."""

    def __init__(self, x: torch.Tensor, index: int, previous: KeptInput | None):
        self.index = index
        self.previous = (
            previous  # of the layer before it in the same forward pass: needed next in the backward pass
        )
        self.device = x.device
        self.on_device: torch.Tensor | None = None  # kept there, or staged
        self.buffer: torch.Tensor | None = None  # CPU memory, as bytes
        self.on_host: torch.Tensor | None = None  # the input, in it
        self.loaded: torch.cuda.Event | None = None  # its copy back to the device is done


class HostInputs:
    """keep in a layer's forward pass, flush after the last; fetch and done around a layer's backward pass."""

    def __init__(self):
        self.buffers: list[torch.Tensor] = []  # CPU memory not in use; it is kept between steps
        self.stream: torch.cuda.Stream | None = None
        self.leaving: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()
        self.staged: list[KeptInput] = []  # whose inputs are on the way back or there
        self.latest = lambda: None  # weak reference to the input kept last

    def keep(self, x: torch.Tensor, index: int, *, on_device: bool) -> KeptInput:
        """x: the input of layer `index`, any shape. on_device: it is needed again at once, copy nothing."""
        previous = self.latest()
        kept = KeptInput(x, index, previous if previous is not None and previous.index == index - 1 else None)
        self.latest = weakref.ref(kept)
        if on_device:
            kept.on_device = x
            return kept
        if x.is_cuda and self.stream is None:
            self.stream = torch.cuda.Stream(x.device)
        kept.buffer = self.take(x.nbytes, pin=x.is_cuda)
        kept.on_host = kept.buffer[: x.nbytes].view(x.dtype).view(x.shape)
        while len(self.leaving) >= IN_FLIGHT:
            self._let_go()
        self.leaving.append((x, self._copy(kept.on_host, x)))
        return kept

    def flush(self) -> None:
        """Hold no input on its way any more: after the last layer, before the head needs the memory."""
        while self.leaving:
            self._let_go()

    def fetch(self, kept: KeptInput) -> torch.Tensor:
        """The input on the device. Raises RuntimeError where done() was called for it."""
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
        """The input needed after this one sets out; call it when the device has room for it."""
        previous = kept.previous
        if previous is not None and previous.on_host is not None and previous.on_device is None:
            self._stage(previous)

    def done(self, kept: KeptInput) -> None:
        """The layer's backward pass was given to the device: its memory is free, there and on the CPU."""
        if kept.buffer is not None:
            self.buffers.append(kept.buffer)
        kept.on_device = kept.on_host = kept.buffer = None
        self.staged = [other for other in self.staged if other is not kept]

    def take(self, num_bytes: int, *, pin: bool) -> torch.Tensor:
        """CPU memory of at least num_bytes from what is free, or new, in whole steps of ROUNDING."""
        for i, buffer in enumerate(self.buffers):
            if buffer.nbytes >= num_bytes:
                return self.buffers.pop(i)
        if self.buffers:
            self.buffers.pop()  # too small for the packs that come now
        return host_empty(-(-num_bytes // ROUNDING) * ROUNDING, for_card=pin)

    def _stage(self, kept: KeptInput) -> None:
        while len(self.staged) >= STAGING:  # of a backward pass that stopped half-way
            self._wait_for_copies(kept.device)
            self.staged.pop(0).on_device = None
        kept.on_device = torch.empty_like(kept.on_host, device=kept.device)
        kept.loaded = self._copy(kept.on_device, kept.on_host)
        self.staged.append(kept)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event | None:
        """On the side stream, behind all that the compute stream was given so far. Returns its event; None without streams."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def _let_go(self) -> None:
        x, event = self.leaving.popleft()
        if event is not None:
            torch.cuda.current_stream(x.device).wait_event(event)

    def _wait_for_copies(self, device: torch.device) -> None:
        if self.stream is not None:
            torch.cuda.current_stream(device).wait_stream(self.stream)


class _PinnedPages(mmap.mmap):
    """Pages that the driver keeps in place, so that copies to and from a card run beside everything else.

    Exactly as many as are asked for: torch's own pinned memory comes in powers of two, 512 MiB for a state of 302.
    """

    pinned = False

    def pin(self, address: int) -> None:
        """Raises RuntimeError if the system pins no more memory."""
        error = int(torch.cuda.cudart().cudaHostRegister(address, len(self), 0))
        if error:
            with contextlib.suppress(
                RuntimeError
            ):  # the error waits in the runtime for the next launch to report it: be that one
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
