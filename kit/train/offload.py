"""Keep layer inputs in CPU memory between the forward and the backward pass, and gradients until the update.

Forward: each input is copied to the CPU while the layers after it run. Backward: while one layer's attention
runs, the input of the layer before it is copied back. It is not copied earlier, because memory peaks in the
feed-forward before that. The device holds the last layer's input, which is needed at once, and during the
backward pass one or two staged inputs. HostGradients says how gradients move.

On a GPU the CPU memory is pinned and both directions run on one side stream; elsewhere the same copies run in
place. A stream is created once per run: each new one would get memory of its own from the allocator. NOT RUN
ON A GPU. Why the order of the streams is right, for inputs:
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
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

IN_FLIGHT = 2  # inputs on the device while they are copied to the CPU: the running layer's, and one that lags
ROUNDING = 2**20  # bytes: rows differ by a few tokens, and a slightly longer one should fit the same buffer
STAGING = 2  # the most inputs on the device on the way back: the running layer's and the next one's
PIECE = 2**22  # numbers of a gradient that come back together: 8 MiB in bf16, long enough for the bus


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


class SideStream:
    """Copy on a stream beside the compute stream. On a CPU, where there is none, copy in place."""

    def __init__(self, device: torch.device | None = None):
        self.stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None
        self.leaving: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()  # copies to the CPU

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Run the block's operators on the side stream, after all that is queued on the compute stream."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):  # None changes nothing
            yield

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event | None:
        """Copy on the side stream. Return the event of the copy; None without streams."""
        with self._beside():
            target.copy_(source, non_blocking=True)
        return self._event()

    def _event(self) -> torch.cuda.Event | None:
        """Return an event that marks the end of what is queued on the side stream; None without streams."""
        return self.stream and self.stream.record_event()

    def _free_oldest(self) -> None:
        """Free the tensor that has been leaving for longest, once it has been copied."""
        _, event = self.leaving[0]
        self.wait_for(event)
        self.leaving.popleft()

    def wait_for(self, event: torch.cuda.Event | None) -> None:
        """Make the compute stream wait for an event of the side stream; None = for nothing."""
        if event is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(event)

    def wait_for_copies(self) -> None:
        """Make the compute stream wait for all that is queued on the side stream."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


class HostInputs(SideStream):
    """Move inputs to CPU memory and back.

    Call keep in a layer's forward pass, flush after the last layer's, and fetch and done around a backward
    pass.
    """

    def __init__(self):
        super().__init__()  # keep creates the stream, on the device of the first input
        self.buffers: list[torch.Tensor] = []  # free CPU memory, kept between steps
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
        self.wait_for(kept.loaded)
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
            self.wait_for_copies()
            self.staged.pop(0).on_device = None
        kept.on_device = torch.empty_like(kept.on_host, device=kept.device)
        kept.loaded = self._copy(kept.on_device, kept.on_host)
        self.staged.append(kept)


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class HostGradients(SideStream):
    """Add up gradients in CPU memory over the rows of a step, and bring them back for the update.

    Call begin before a step, begin_row before each backward pass, add when a gradient is complete, norm and
    then returned after the last row, and after_update once the weights are updated. The sums lie in one piece
    of CPU memory of exactly their size, in the parameters' dtype.

    The sum so far comes back to the device in pieces, is added there, and leaves again: from a step's second
    row on, a gradient crosses the bus twice per row. In return the sum is autograd's, grad += new, to the
    bit. A CPU would add bf16 slowly, and fp32 sums would take twice the memory and be other numbers. A tied
    head's gradient leaves twice per row: after the loss, and after the lookup's part was added to it. In
    blocks, it leaves once.

    At most in_flight bytes of gradients are on the device while they are copied: those of one layer. A larger
    gradient, such as the head's, is waited for at once.

    parameters: whose gradients are added up; None = all that are trained.

    Why the order of the streams is right:
    - The side stream alone touches the sums in CPU memory, so every copy follows the ones queued before it.
      The same holds for the slab through which the sum so far passes.
    - A gradient was computed by the compute stream, for which the side stream waits. It stays referenced
      until the compute stream has waited for its event, so nothing overwrites its memory before.
    - The norms are computed on the side stream, in its own memory. The compute stream waits for it before it
      reads them. When this memory is used again, the side stream has waited for the compute stream.
    - Gradients that come back do so as inputs do.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter] | None = None):
        parameters = parameters or trained(model)
        device, dtype = parameters[0].device, parameters[0].dtype
        super().__init__(device)
        self.in_flight = max(sum(p.nbytes for p in trained(layer)) for layer in model.model.layers)
        sizes = [parameter.numel() for parameter in parameters]
        num_bytes = sum(parameter.nbytes for parameter in parameters)
        self.memory = host_empty(num_bytes, for_card=device.type == "cuda").view(dtype)
        self.sums = dict(zip(parameters, self.memory.split(sizes), strict=True))
        self.slab = torch.empty(min(PIECE, max(sizes)), dtype=dtype, device=device)
        self.norms: dict[nn.Parameter, list[Tensor]] = {}  # of the sums' parts; no entry = no gradient so far

    def begin(self, num_rows: int) -> None:
        """Forget all sums, also those of a step that stopped half-way. num_rows: as in Updates.begin."""
        self.wait_for_copies()
        self.leaving.clear()
        self.norms.clear()

    def begin_row(self) -> None:
        """No-op: one process adds up every row in the same way."""

    def add(self, parameter: nn.Parameter) -> None:
        """Add parameter.grad to its sum, and free it as soon as in_flight allows."""
        gradient, parameter.grad = parameter.grad, None
        self.add_to_sum(parameter, [(0, gradient)])

    @torch.no_grad()
    def add_to_sum(self, parameter: nn.Parameter, parts: Iterable[tuple[int, Tensor]]) -> None:
        """parts: as for Updates.use_parts, in the parameter's dtype. Each row may cut them elsewhere."""
        has_sum, norms = parameter in self.norms, []
        for first, gradient in parts:
            gradient = gradient.reshape(-1)
            total = self.sums[parameter][first : first + len(gradient)]
            with self._beside():
                if has_sum:
                    for part, earlier in zip(gradient.split(PIECE), total.split(PIECE), strict=True):
                        part.add_(self.slab[: len(part)].copy_(earlier, non_blocking=True))
                norms.append(torch.nn.utils.get_total_norm([gradient]))
                total.copy_(gradient, non_blocking=True)

            self.leaving.append((gradient, self._event()))
            while sum(leaving.nbytes for leaving, _ in self.leaving) > self.in_flight:
                self._free_oldest()
        self.norms[parameter] = norms

    def norm(self, loss: Tensor) -> Tensor:
        """Return the norm of all sums, as torch.nn.utils.clip_grad_norm_ computes it.

        loss: of this rank, which is replaced by the step's.
        """
        self.wait_for_copies()
        self.leaving.clear()
        return torch.nn.utils.get_total_norm(chain.from_iterable(self.norms.get(p, ()) for p in self.sums))

    def pop(self, parameter: nn.Parameter) -> Tensor:
        """Return a sum on the device, in the parameter's shape, and start a new one."""
        del self.norms[parameter]
        gradient = torch.empty_like(parameter)
        self._copy(gradient.view(-1), self.sums[parameter])
        self.wait_for_copies()
        return gradient

    def returned(self, most: int) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
        """Yield (parameter, first, the sum of its flattened elements from `first` on), one after another.

        A piece has at most `most` elements. The next one is copied while the caller uses this one.
        """
        arriving = deque()
        for parameter in (p for p in self.sums if p in self.norms):
            for first in range(0, max(parameter.numel(), 1), most):
                part = self.sums[parameter][first : first + most]
                gradient = torch.empty_like(part, device=parameter.device)
                arriving.append((parameter, first, gradient, self._copy(gradient, part)))
                if len(arriving) == 2:
                    yield self._arrived(*arriving.popleft())
        while arriving:
            yield self._arrived(*arriving.popleft())

    def after_update(self) -> None:
        """No-op: one process updates all weights itself."""

    def _arrived(self, parameter, first: int, gradient: Tensor, event) -> tuple:
        self.wait_for(event)
        return parameter, first, gradient


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
        self.address, self.pinned, self.device = address, True, torch.cuda.current_device()

    def __del__(self):
        if self.pinned:
            torch.cuda.synchronize(self.device)  # a copy may still be reading
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
