"""The token step as one CUDA graph per number of rows. NOT RUN ON A GPU.

A step of a model of 24 layers is hundreds of launches; a graph is one. It repeats the same kernels at the
same addresses, so whatever a step reads and leaves has to stay in place between replays: weights, cache, and
the state of the rows (kit/generate/engine.py). What lives within a step lies in the graphs' own memory, which
they share: none reads what another left there.

The first step with a number of rows runs eagerly, which compiles kernels and creates workspaces; the second
is captured. Numbers of rows are rounded up, so that a batch that shrinks needs few graphs. The rows added
are free slots.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

# True: a card replays its steps. To be switched on once check_card, which runs both ways, has shown on a card
# that they draw the same tokens. A capture that fails switches it off
USES_GRAPHS = False


class Eager:
    """Steps run operator by operator."""

    def size(self, num_rows: int, num_slots: int) -> int:
        """Return the rows that a step computes for num_rows."""
        return num_rows

    def __call__(self, size: int, step: Callable[[], None]) -> None:
        """Run a step of `size` rows."""
        step()


class Graphs:
    """Steps are captured once per size and replayed: it is the second step of a size that is replayed.

    If a capture fails, a warning says so, and all steps run eagerly.
    """

    def __init__(self, recorder):
        """recorder: a Recorder, or another with its two methods; None = run all steps eagerly."""
        self.recorder = recorder
        self.graphs = {}  # size -> its graph; None: warmed up

    def size(self, num_rows: int, num_slots: int) -> int:
        """Return 8, 16, 24, 32, 48, 64, 96, 128, ...: by at most half more than num_rows from 17 on."""
        unit = max(8, 2 ** (num_rows - 1).bit_length() // 4)
        return min(-(-num_rows // unit) * unit, num_slots)

    def __call__(self, size: int, step: Callable[[], None]) -> None:
        if self.recorder is None:
            step()
        elif size not in self.graphs:
            self.graphs[size] = None
            self.recorder.warm_up(step)
        else:
            graph = self.graphs[size] or self._capture(size, step)
            graph.replay() if graph else step()

    def _capture(self, size: int, step: Callable[[], None]):
        try:
            self.graphs[size] = self.recorder.capture(step)
        except RuntimeError as error:
            global USES_GRAPHS  # torch may keep the memory of a failed capture: there must not be another
            USES_GRAPHS = False
            self.recorder = None
            self.graphs.clear()
            why = " ".join(str(error).split())[:200]
            warnings.warn(f"tokens are sampled without CUDA graphs, with more launches: {why}", stacklevel=2)
        return self.graphs.get(size)


class Recorder:
    """Captures steps on a stream of its own, as torch.cuda.graph asks for."""

    def __init__(self, device: torch.device):
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, step: Callable[[], None]) -> None:
        """Run a step on the stream, which has a workspace of cuBLAS of its own."""
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


def steps_for(device: torch.device, uses_kernel: bool) -> Steps:
    """Return how steps run. uses_kernel: the lengths of rows are read on the device alone."""
    captures = USES_GRAPHS and uses_kernel and device.type == "cuda"
    return Graphs(Recorder(device)) if captures else Eager()
