"""The token step as one CUDA graph per number of rows. NOT RUN ON A GPU.

A step of a model of 24 layers is hundreds of launches; a graph is one. It repeats the same kernels at the
same addresses, so whatever a step reads and leaves has to stay in place between replays: weights, cache, and
the state of the rows (kit/generate/engine.py). What lives within a step lies in the graphs' own memory, which
they share: none reads what another left there.

The first step with a number of rows runs eagerly, which compiles kernels and creates workspaces; the second
is captured, and runs eagerly, too. The third proves the graph: it is replayed, and run eagerly from the same
state. The captured step has changed that state, so a value or an address that the graph has frozen shows as
another token or log-prob. Both must leave the same bits: the eager step runs on the stream of the capture,
with the same workspace, so cuBLAS has no reason to choose another algorithm. If they differ, a warning says
so, the eager step counts, and this process replays no graph any more. What a wrong graph writes elsewhere
than a step does is neither seen nor undone. From the fourth step on, steps are replayed.

Numbers of rows are rounded up, so that a batch that shrinks needs few graphs. The rows added are free slots.
"""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch

State = Mapping[str, torch.Tensor]  # what a step changes in place besides the cache, by name


class Eager:
    """Steps run operator by operator."""

    def size(self, num_rows: int, num_slots: int) -> int:
        """Return the rows that a step computes for num_rows."""
        return num_rows

    def __call__(self, size: int, step: Callable[[], None], state: State) -> None:
        """Run a step of `size` rows, which changes `state`."""
        step()


class Graphs:
    """Steps are captured once per size, proved once, and then replayed.

    If either fails, a warning says why, and all steps run eagerly.
    """

    # why none is used in this process any more, whatever is sampled next; "" = they are. torch may keep the
    # memory of a capture that failed, and what made one graph differ may make others differ unseen
    failure: ClassVar[str] = ""

    def __init__(self, recorder):
        """recorder: a Recorder, or another with its two methods; None = run all steps eagerly."""
        self.recorder = recorder
        self.graphs = {}  # size -> its graph; None: warmed up
        self.proved = set()  # sizes whose graph has left what an eager step leaves

    def size(self, num_rows: int, num_slots: int) -> int:
        """Return 8, 16, 24, 32, 48, 64, 96, 128, ...: by at most half more than num_rows from 17 on."""
        unit = max(8, 2 ** (num_rows - 1).bit_length() // 4)
        return min(-(-num_rows // unit) * unit, num_slots)

    def __call__(self, size: int, step: Callable[[], None], state: State) -> None:
        if self.recorder is None or Graphs.failure:
            step()
        elif size in self.proved:
            self.graphs[size].replay()
        elif size not in self.graphs:
            self.graphs[size] = None
            self.recorder.run(step)
        elif self.graphs[size] is None:
            self._capture(size, step)
            step()
        else:
            self._prove(size, step, state)

    def _capture(self, size: int, step: Callable[[], None]) -> None:
        try:
            self.graphs[size] = self.recorder.capture(step)
        except RuntimeError as error:
            self._give_up(_named(error.__context__ or error))  # what ended the capture comes before its end

    def _prove(self, size: int, step: Callable[[], None], state: State) -> None:
        """Replay a step, then run it eagerly from the same state.

        The eager one comes last, so that what it leaves counts, also in the cache. And the replay finds no
        keys of this step there: if it writes its own elsewhere, its tokens attend to others.
        """
        before = {name: values.clone() for name, values in state.items()}
        try:
            self.graphs[size].replay()
        except RuntimeError as error:
            self._give_up(_named(error))
        replayed = {name: values.clone() for name, values in state.items()}
        for name, values in state.items():
            values.copy_(before[name])
        self.recorder.run(step)
        if Graphs.failure:
            return

        different = [name for name, values in state.items() if not _same_bits(values, replayed[name])]
        if different:
            self._give_up(
                f"the graph of {size} rows left other {' and '.join(different)} than the same step run "
                "eagerly, which counts"
            )
        else:
            self.proved.add(size)

    def _give_up(self, why: str) -> None:
        Graphs.failure = why
        self.graphs.clear()
        warnings.warn(
            f"tokens are sampled without CUDA graphs, with more launches: {why}. If memory runs out later, "
            "start again with --no_cuda_graphs: torch may keep what a failed graph held",
            stacklevel=2,
        )


def _named(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors hold the same bits, NaN included. The host waits for the device."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class Recorder:
    """Captures steps on a stream that no other Recorder has while this one lives.

    cuBLAS has a workspace per stream, whose address graphs keep. torch frees it with the first graph of that
    stream that ends (pytorch issue 193402), and another engine's graphs would then write into freed memory.
    """

    idle: ClassVar[dict[torch.device, list[torch.cuda.Stream]]] = defaultdict(list)

    def __init__(self, device: torch.device):
        idle = self.idle[device]
        self.stream = idle.pop() if idle else torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        weakref.finalize(self, idle.append, self.stream)

    def run(self, step: Callable[[], None]) -> None:
        """Run a step eagerly on the stream, which has a workspace of cuBLAS of its own."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            step()
        current.wait_stream(self.stream)

    def capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Record what a step launches; nothing runs. Raises RuntimeError if it waits for the card."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do on the card, such as pinning memory, breaks no capture
        capturing = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
        with torch.cuda.stream(self.stream), capturing:  # the stream is left even if a capture cannot end
            step()
        return graph


Steps = Eager | Graphs


def steps_for(device: torch.device, uses_kernel: bool, cuda_graphs: bool) -> Steps:
    """Return how steps run. uses_kernel: the lengths of rows are read on the device alone."""
    replays = cuda_graphs and uses_kernel and device.type == "cuda" and not Graphs.failure
    return Graphs(Recorder(device)) if replays else Eager()
