"""The processes of one run. torchrun starts one per card, on one machine or several; each is called a rank.

    torchrun --nproc_per_node 2 recipes/gemma3_1b_8k.py

Every rank runs the same program. It takes its share of the work, and what it computes is summed or gathered.
Rank 0 prints, logs and saves. Without torchrun there is one process: `here()` is then `Alone`, which computes
nothing.

A rank that dies would leave the others waiting. So each rank counts up a number in a store that all of them
see, and a thread of each watches: if a rank has failed or is silent, the others end too and say which. Values
travel as JSON, tensors as they are.

torchrun ends the other processes of a machine as soon as one of them has failed. It passes Ctrl-C on to all
of them and waits for 30 seconds (--shutdown_timeout) before it kills what is left; a second Ctrl-C kills at
once. SIGTERM, which schedulers send, ends them without waiting: have them send SIGINT instead.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Work

BEAT_EVERY = 2.0  # seconds
LOST_AFTER = 40.0  # seconds without a beat; a rank that computes still beats, since a thread does it
GRACE = 2.0  # seconds in which a rank may find its own error before it ends because of another's
PATIENCE = timedelta(days=7)  # for a rank that is alive: it may have a longer share of the samples
STORE_WAITS = timedelta(seconds=60)  # for a machine that has not joined yet, or no longer answers
SAID_WITHIN = 10.0  # seconds for rank 0 to say why all end, before the rank that failed says it
FAILED, JOINED, DONE = "failed", "joined", "done"
ENDED = 1  # exit status of a rank that ends because another one has
CUT_OFF = re.compile("gloo|NCCL|[Cc]onnection")  # in torch's errors if another rank is gone
Value = TypeVar("Value")


class EndedElsewhere(Exception):
    """Rank 0 has failed, and says why itself."""


class Alone:
    """The only process of a run."""

    rank, count, name = 0, 1, ""  # name: of the rank and its machine

    @property
    def is_first(self) -> bool:
        """Whether this rank prints, logs and saves."""
        return self.rank == 0

    def share(self, items: Sequence[Value]) -> Sequence[Value]:
        """Return this rank's items: every count-th one."""
        return items[self.rank :: self.count]

    def to_first(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return on rank 0 its tensors, and in CPU memory those that it lacks and another rank has."""
        return tensors

    def gather(self, value: Value) -> list[Value]:
        """Return the value that each rank passes, in their order. It must be JSON's."""
        return [value]

    def from_first(self, compute: Callable[[], Value]) -> Value:
        """Return what compute() returns on rank 0; it must be JSON's.

        If it raises there, the other ranks raise EndedElsewhere.
        """
        value, error = None, None
        if self.is_first:
            try:
                value = compute()
            except BaseException as raised:
                error = raised
        value, has_failed = self.gather([value, error is not None])[0]
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame, and whatever compute holds
        if has_failed:
            raise EndedElsewhere
        return value

    def check_same(self, facts: Mapping[str, object]) -> None:
        """Raise ValueError, naming the difference, if another rank has other facts. They must be JSON's."""
        first, *others = self.gather({"name": self.name, "facts": dict(facts)})
        for other in others:
            for fact in sorted({*first["facts"], *other["facts"]}):
                ours, theirs = first["facts"].get(fact), other["facts"].get(fact)
                if ours != theirs:
                    raise ValueError(
                        f"{fact} is {ours!r} on {first['name']} but {theirs!r} on {other['name']}; start all "
                        "ranks with the same flags, data and versions"
                    )

    def leave(self) -> None:
        """Wait until all ranks have ended their work."""


class Ranks(Alone):
    """A process among several, which have all called join()."""

    def __init__(self, device: str):
        import torch
        from torch import distributed

        self.rank, self.count, self.name = int(os.environ["RANK"]), num_started(), _name()
        backend = "gloo"
        if device == "cuda":
            torch.cuda.set_device(_local_rank())
            backend = "cpu:gloo,cuda:nccl"
        store, _, _ = next(distributed.rendezvous("env://", timeout=STORE_WAITS))
        self.store = distributed.PrefixStore("kit", store.clone())  # a connection that nothing else blocks
        self._wait_for_all()
        self.how_to_go_on = lambda: "Go on with --resume"  # is called when this rank ends for another's sake
        self.watch = _Watch(self)
        self.watch.start()
        distributed.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.count, timeout=PATIENCE
        )

    def _wait_for_all(self) -> None:
        """Wait until every rank is here. Raises ValueError naming one that is not."""
        self.store.set(f"{JOINED} {self.rank}", self.name)
        for other in range(self.count):
            try:
                self.store.wait([f"{JOINED} {other}"], STORE_WAITS)
            except RuntimeError:
                raise ValueError(
                    f"rank {other} of {self.count} has not started within {STORE_WAITS.seconds} s of "
                    f"{self.name}; see what its machine says, and start all of them again"
                ) from None

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks. All of them must call this, in the same order."""
        self.start_sum(tensor).wait()

    def start_sum(self, tensor: Tensor, *, only_on: int | None = None) -> Work:
        """Start sum_, and return at once. Call wait() of what is returned before the sum is read.

        only_on: the one rank that gets the sum; the others' tensors are undefined then. None = all get it.
        """
        from torch import distributed

        if only_on is None:
            return distributed.all_reduce(tensor, async_op=True)
        return distributed.reduce(tensor, dst=only_on, async_op=True)

    def start_copy(self, tensor: Tensor, source: int) -> Work:
        """Start replacing a tensor by the one of rank `source`, as start_sum does."""
        from torch import distributed

        return distributed.broadcast(tensor, src=source, async_op=True)

    def to_first(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        import torch
        from torch import distributed

        layouts = {name: [str(x.dtype).split(".")[1], list(x.shape)] for name, x in tensors.items()}
        first, *others = self.gather(layouts)
        found = dict(tensors)
        for rank, layouts in enumerate(others, 1):
            for name, (dtype, shape) in layouts.items():
                if self.is_first and name not in first:
                    found[name] = torch.empty(shape, dtype=getattr(torch, dtype))
                    distributed.recv(found[name], src=rank)
                elif self.rank == rank and name not in first:
                    distributed.send(tensors[name].cpu().contiguous(), dst=0)
        return found

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
        return [json.loads(x[: int(size)].numpy().tobytes()) for x, size in zip(found, sizes, strict=True)]

    def fail(self, why: str) -> None:
        """Let the other ranks end, too. why: as one line."""
        with suppress(RuntimeError):  # the machine of rank 0 is gone, which the others see
            self.store.compare_set(FAILED, "", f"{self.name}: {why}")
        self.watch.stopped.set()

    def leave(self) -> None:
        from torch import distributed

        self.gather(DONE)
        self.watch.stopped.set()
        distributed.destroy_process_group()


class _Watch(threading.Thread):
    """End this process if another rank has failed or is silent."""

    def __init__(self, ranks: Ranks):
        super().__init__(name="watch-ranks", daemon=True)
        self.ranks, self.store, self.stopped = ranks, ranks.store, threading.Event()
        watched = range(ranks.count) if ranks.is_first else [0]
        self.heard = {other: (b"", 0) for other in watched if other != ranks.rank}

    def run(self) -> None:
        beats = 0
        while not self.stopped.wait(BEAT_EVERY):
            beats += 1
            try:
                self.store.set(f"beat {self.ranks.rank}", str(beats))
                why = self.store.get(FAILED).decode() if self.store.check([FAILED]) else self._silent()
            except RuntimeError as error:  # torch's for a connection that has broken
                why = f"the machine of rank 0 no longer answers ({str(error).splitlines()[0]})"
            if why and not self.stopped.wait(GRACE):
                self._end(why)

    def _silent(self) -> str:
        """Return which rank has sent no new beat for too long; "" = none.

        Time is counted in beats of this rank: if all are suspended, nobody is silent.
        """
        for other, (last, missed) in self.heard.items():
            key = f"beat {other}"
            beat = self.store.get(key) if self.store.check([key]) else b""
            missed = missed + 1 if beat == last else 0
            self.heard[other] = (beat, missed)
            if missed * BEAT_EVERY > LOST_AFTER:
                why = f"rank {other} has been silent for {missed * BEAT_EVERY:.0f} s"
                self.store.compare_set(FAILED, "", why)
                return why
        return ""

    def _end(self, why: str) -> None:
        """Leave at once: the main thread may wait for a rank that is gone. Files are whole or not there."""
        try:
            rest = self.ranks.how_to_go_on()
            if _local_rank() == 0:  # one line per machine
                print(f"error: {why}. {rest}", file=sys.__stderr__, flush=True)
        finally:
            os._exit(ENDED)


_here = Alone()


def here() -> Alone:
    """Return what this process is among the ranks of its run."""
    return _here


def num_started() -> int:
    """Return how many processes torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_started_first() -> bool:
    """Return whether this process will be rank 0."""
    return num_started() == 1 or os.environ["RANK"] == "0"


def _name() -> str:
    return f"rank {os.environ['RANK']} on {platform.node()}"


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def join(device: str) -> Alone:
    """Join the other processes that torchrun has started, if there are any. device: "cuda" or "cpu".

    Raises ValueError if this machine has fewer cards than processes, and if one of them does not start.
    """
    global _here
    if num_started() == 1 or isinstance(_here, Ranks):
        return _here
    if device == "cuda":
        import torch

        cards = torch.cuda.device_count()
        if not cards:
            device = "cpu"  # whatever needs a card says so, and what works without one
        elif _local_rank() >= cards:
            raise ValueError(
                f"--nproc_per_node is above {_local_rank()} but {platform.node()} has {cards} cards; pass "
                f"--nproc_per_node {cards}"
            )
    _here = Ranks(device)
    return _here


def leave() -> None:
    """Wait for the other ranks, and be alone again."""
    global _here
    _here.leave()
    _here = Alone()


def mute(*, all_but_one_per_machine: bool = False) -> None:
    """Print nothing from here on, unless this is rank 0 (or, where asked for, the first of its machine)."""
    if not (is_started_first() or (all_but_one_per_machine and _local_rank() == 0)):
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end


def end(error: BaseException, text: str, status: int) -> None:
    """End this process after an error, and with it all ranks; do nothing if it is the only one.

    text: what to print; "" = nothing. Mostly all ranks have the same error: rank 0 prints it, and torchrun
    ends the others of its machine. If only another rank has failed, rank 0 says which and why. If it does
    not, that rank prints the text itself, and a traceback at once. After Ctrl-C only rank 0 prints.
    """
    if num_started() == 1:
        return
    if isinstance(error, EndedElsewhere):
        text = ""
    elif isinstance(_here, Ranks):
        if isinstance(error, RuntimeError) and CUT_OFF.search(str(error)):
            _here.watch.join(2 * LOST_AFTER + 10 * GRACE)  # it learns which rank is gone, and ends this one
        if isinstance(error, KeyboardInterrupt) and not _here.is_first:
            time.sleep(SAID_WITHIN)  # all have it, and rank 0 may have a tracker to close
        _here.fail(" ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":"))
    try:
        if not is_started_first():
            if isinstance(error, KeyboardInterrupt):
                return
            if "Traceback" not in text:
                time.sleep(SAID_WITHIN)
            text = text and f"{_name()}: {text}"
        if text:
            print(text, file=sys.__stderr__, flush=True)
    finally:  # not by SystemExit: threads of torch.distributed may abort a process that ends in order
        os._exit(status)
