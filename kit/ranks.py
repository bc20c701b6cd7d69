"""The processes of one run. torchrun starts one per card, on one machine or several; each is called a rank.

    torchrun --nproc_per_node 2 recipes/gemma3_1b_8k.py

Every rank runs the same program. It takes its share of the work, and what it computes is summed or gathered.
Rank 0 prints, logs and saves. Without torchrun there is one process: `here()` is then `Alone`, which computes
nothing.

A rank that dies would leave the others waiting. So each rank counts up a number in a store that all of them
see, and a thread of each watches: if a rank has failed or is silent, the others end too and say which. Values
travel as JSON, tensors as they are.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

BEAT_EVERY = 2.0  # seconds
LOST_AFTER = 40.0  # seconds without a beat; a rank that computes still beats, since a thread does it
PATIENCE = timedelta(days=7)  # for a rank that is alive: it may have a longer share of the samples
STORE_WAITS = timedelta(seconds=60)  # for a machine that has not joined yet, or no longer answers
FAILED, DONE = "failed", "done"
ENDED = 1  # exit status of a rank that ends because another one has
Value = TypeVar("Value")


class EndedElsewhere(Exception):  # noqa: N818 - not an error of this rank
    """Another rank has failed, and says why itself."""


class Alone:
    """The only process of a run."""

    rank, count = 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this rank prints, logs and saves."""
        return self.rank == 0

    def share(self, items: Sequence[Value]) -> Sequence[Value]:
        """Return this rank's items: every count-th one."""
        return items[self.rank :: self.count]

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks. All of them must call this, in the same order."""

    def gather(self, value: Value) -> list[Value]:
        """Return the value that each rank passes, in their order. It must be JSON's."""
        return [value]

    def from_first(self, compute: Callable[[], Value]) -> Value:
        """Return what compute() returns on rank 0; it must be JSON's.

        If it raises there, the other ranks raise EndedElsewhere.
        """
        return compute()

    def check_same(self, facts: Mapping[str, object]) -> None:
        """Raise ValueError, naming the difference, if another rank has other facts. They must be JSON's."""

    def fail(self, why: str) -> None:
        """Let the other ranks end, too. why: as one line."""

    def leave(self) -> None:
        """Wait until all ranks have ended their work."""


class Ranks(Alone):
    """A process among several, which have all called join()."""

    def __init__(self, device: str):
        import torch
        from torch import distributed

        self.rank, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.name = f"rank {self.rank} on {platform.node()}"
        backend = "gloo"
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl"
        store, _, _ = next(distributed.rendezvous("env://", timeout=STORE_WAITS))
        distributed.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.count, timeout=PATIENCE
        )
        self.store = distributed.PrefixStore("kit", store.clone())  # a connection that nothing else blocks
        self.watch = _Watch(self)
        self.watch.start()

    def sum_(self, tensor: Tensor) -> None:
        from torch import distributed

        distributed.all_reduce(tensor)

    def gather(self, value: Value) -> list[Value]:
        import torch
        from torch import distributed

        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        distributed.all_gather(sizes, torch.tensor([len(data)]))
        longest = max(map(int, sizes))
        padded = torch.nn.functional.pad(data, (0, longest - len(data)))
        found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.count)]
        distributed.all_gather(found, padded)
        return [
            json.loads(x[: int(size)].numpy().tobytes()) for x, size in zip(found, sizes, strict=True)
        ]

    def from_first(self, compute: Callable[[], Value]) -> Value:
        value, error = None, None
        if self.is_first:
            try:
                value = compute()
            except BaseException as raised:
                error = raised
        value, has_failed = self.gather([value, error is not None])[0]
        if error is not None:
            raise error
        if has_failed:
            raise EndedElsewhere
        return value

    def check_same(self, facts: Mapping[str, object]) -> None:
        found = self.gather({"name": self.name, "facts": dict(facts)})
        first = found[0]
        for other in found[1:]:
            for fact in sorted({*first["facts"], *other["facts"]}):
                ours, theirs = first["facts"].get(fact), other["facts"].get(fact)
                if ours != theirs:
                    raise ValueError(
                        f"{fact} is {ours!r} on {first['name']} but {theirs!r} on {other['name']}; start all "
                        "ranks with the same flags, data and versions"
                    )

    def fail(self, why: str) -> None:
        self.store.compare_set(FAILED, "", f"{self.name}: {why}")
        self.watch.stop()

    def leave(self) -> None:
        from torch import distributed

        self.gather(DONE)
        self.watch.stop()
        distributed.destroy_process_group()


class _Watch(threading.Thread):
    """End this process if another rank has failed or is silent."""

    def __init__(self, ranks: Ranks):
        super().__init__(name="watch-ranks", daemon=True)
        self.ranks, self.store, self.stopped = ranks, ranks.store, threading.Event()
        watched = range(ranks.count) if ranks.is_first else [0]
        self.heard = {other: (b"", time.monotonic()) for other in watched if other != ranks.rank}

    def stop(self) -> None:
        self.stopped.set()

    def run(self) -> None:
        beats = 0
        while not self.stopped.wait(BEAT_EVERY):
            beats += 1
            try:
                self.store.set(f"beat {self.ranks.rank}", str(beats))
                why = self.store.get(FAILED).decode() if self.store.check([FAILED]) else self._silent()
            except RuntimeError as error:  # torch's for a connection that has broken
                why = f"the machine of rank 0 no longer answers ({str(error).splitlines()[0]})"
            if why and not self.stopped.is_set():
                self._end(why)

    def _silent(self) -> str:
        """Return which rank has not counted on for too long; "" = none."""
        now = time.monotonic()
        for other, (last, since) in self.heard.items():
            key = f"beat {other}"
            beat = self.store.get(key) if self.store.check([key]) else b""
            if beat != last:
                self.heard[other] = (beat, now)
            elif now - since > LOST_AFTER:
                why = f"rank {other} has been silent for {now - since:.0f} s"
                self.store.compare_set(FAILED, "", why)
                return why
        return ""

    def _end(self, why: str) -> None:
        """Leave at once: the main thread may wait for a rank that is gone. Files are whole or not there."""
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line per machine
            print(f"error: {self.ranks.name} ends: {why}. Go on with --resume", file=sys.stderr, flush=True)
        os._exit(ENDED)


_here = Alone()


def here() -> Alone:
    """Return what this process is among the ranks of its run."""
    return _here


def num_started() -> int:
    """Return how many processes torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str) -> Alone:
    """Join the other processes that torchrun has started, if there are any. device: "cuda" or "cpu".

    Raises ValueError if this machine has fewer cards than processes.
    """
    global _here
    if num_started() == 1 or isinstance(_here, Ranks):
        return _here
    if device == "cuda":
        import torch

        local, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= cards:
            raise ValueError(
                f"--nproc_per_node is above {local} but {platform.node()} has {cards} cards; pass "
                f"--nproc_per_node {max(cards, 1)}"
            )
    _here = Ranks(device)
    return _here


def leave() -> None:
    """Wait for the other ranks, and be alone again."""
    global _here
    _here.leave()
    _here = Alone()
