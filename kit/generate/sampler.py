"""The batched sampler: S slots, each a row of one preallocated KV cache with its own write position.

A finished row is refilled with the next prompt at once, so long answers do not hold up short ones. When no
prompt is left, the active rows are moved together and the batch shrinks. Prompts are read as a pack, without
padding or masks, as training reads its rows; equal prompts that are read together are read once. Single
tokens go through kit/generate/decode.py. LoRA and quantised layers work.

A card computes while the host reads: the next step is queued before the host waits for the tokens of the last
one. So a row may run one token past its end. That token is cut, and its place in the cache lies inside the
row, where the next text overwrites or hides it, like the text before.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace

import torch

from kit.generate.engine import Drawn, Engine, steps_ahead
from kit.generate.sampling import SamplingParams, check_finite, stream_key
from kit.generate.slots import choose_slots
from kit.machine import return_memory
from kit.models.backbone import context_length
from kit.progress import Progress

PREFILL_TOKENS = 8192  # of prompts that are packed and read together: bounds the activations of a prefill


@dataclass(frozen=True)
class Completion:
    """The response to one prompt."""

    ids: list[int]  # the end-of-text id included, if there is one
    logprobs: list[float]  # of each id, under the distribution it was drawn from
    finished: bool  # False: cut off at max_new_tokens
    text: str = ""  # set if generate was given `decode`
    # from its prefill to its end, while the rest of the batch runs too
    seconds: float = field(default=0.0, compare=False)


@dataclass
class _Slot:
    """A prompt in progress."""

    request: int  # index of the prompt; -1 = free, or ended
    prompt_length: int = 0
    drawn: int = 0  # tokens, of which the host has received `ids`
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    @property
    def length(self) -> int:
        """Positions in the cache, which does not hold the last drawn token yet."""
        return self.prompt_length + self.drawn - 1


def generate(
    model,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    num_slots: int,
    seed: int,
    eos_token_id: int | Sequence[int],
    keys: Sequence[object] | None = None,
    cuda_graphs: bool = True,
    decode: Callable[[list[int]], str] | None = None,
    on_finish: Callable[[int, Completion], None] | None = None,
    description: str = "generating",
) -> list[Completion]:
    """Sample one completion per prompt, and return them in the order of the prompts.

    model: as kit.models.load returns it. prompts: token ids.
    num_slots: rows decoded at once; 0 = as many as memory holds. Fewer are used, and a line says so, if a
    card does not hold them. keys: with `seed` the name of each prompt's random stream, for example
    (question id, sample index); None = the prompt's index.
    cuda_graphs: on a card, replay the step of a token (kit/generate/graph.py); off: launch its kernels.
    decode: ids -> text. on_finish(index, completion): called when a completion ends. description: of the
    progress; "" = show none.
    Raises ValueError for a family that cannot be run, an empty prompt, and logits that are not finite, and if
    a prompt and max_new_tokens exceed the model's context.
    """
    done: list[Completion | None] = [None] * len(prompts)
    how = {"num_slots": num_slots, "seed": seed, "eos_token_id": eos_token_id, "keys": keys}
    steps = stream(model, prompts, params, **how, cuda_graphs=cuda_graphs)
    progress = Samples(len(prompts), description)
    with progress if description else nullcontext(), closing(steps):  # also if on_finish raises
        for step in steps:
            progress.tokens += len(step)
            for index, _, ended in step:
                if ended:
                    completion = replace(ended, text=decode(ended.ids) if decode else "")
                    done[index] = completion
                    progress.finish(completion)
                    if on_finish:
                        on_finish(index, completion)
    return done


Step = list[tuple[int, int, Completion | None]]  # of each row: index of its prompt, token, what that ends


def stream(
    model,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    num_slots: int,
    seed: int,
    eos_token_id: int | Sequence[int],
    keys: Sequence[object] | None = None,
    cuda_graphs: bool = True,
) -> Generator[Step]:
    """Sample as `generate` does, and yield after every step, for example to let another model take one.

    Arguments and errors are those of `generate`. Close what it returns if you leave it early.
    """
    prompts = [tuple(prompt) for prompt in prompts]
    keys = list(range(len(prompts))) if keys is None else list(keys)
    _check(model, prompts, params, num_slots, keys)
    capacity = max(map(len, prompts), default=0) + params.max_new_tokens
    num_slots = choose_slots(model, num_slots, len(prompts), capacity) if prompts else 0
    stop = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    streams = [stream_key(seed, key) for key in keys]
    return _run_slots(model, prompts, params, streams, stop, num_slots, capacity, cuda_graphs)


# without inference mode, 10 % of the time of a small model's many tiny operations is autograd's bookkeeping
@torch.inference_mode()
def _run_slots(
    model,
    prompts: list[tuple[int, ...]],
    params: SamplingParams,
    streams: list[int],
    stop: set[int],
    num_slots: int,
    capacity: int,
    cuda_graphs: bool,
) -> Generator[Step]:
    if not prompts:
        return
    slots = [_Slot(-1) for _ in range(num_slots)]
    engine = Engine(model, params, num_slots, capacity, cuda_graphs=cuda_graphs)
    waiting, ahead = deque(range(len(prompts))), steps_ahead(engine.device)
    queued: deque[tuple[list[_Slot], Drawn]] = deque()

    def receive(num_left: int) -> Iterator[Step]:
        """Read queued steps until num_left are left, and free the slots whose responses end."""
        while len(queued) > num_left:
            owners, drawn = queued.popleft()
            received = zip(owners, *drawn.read(), strict=True)
            received = [each for each in received if each[0].request >= 0]  # else it had ended: cut
            check_finite([logprob for _, _, logprob in received])
            step = []
            for slot, token, logprob in received:
                slot.ids.append(token)
                slot.logprobs.append(logprob)
                index, completion = slot.request, None
                if token in stop or len(slot.ids) == params.max_new_tokens:
                    slot.request, seconds = -1, time.perf_counter() - slot.start
                    completion = Completion(slot.ids, slot.logprobs, token in stop, seconds=seconds)
                step.append((index, token, completion))
            yield step

    training = model.training
    model.eval()
    try:
        while waiting or queued or any(slot.request >= 0 for slot in slots):
            while waiting and any(slot.request < 0 for slot in slots):
                free = [row for row, slot in enumerate(slots) if slot.request < 0]
                requests = _next_prompts(waiting, prompts, len(free))
                rows = free[: len(requests)]
                for row, request in zip(rows, requests, strict=True):
                    slots[row] = _Slot(request, len(prompts[request]), 1)
                keys = [streams[i] for i in requests]
                drawn = engine.prefill(rows, [prompts[i] for i in requests], keys)
                queued.append(([slots[row] for row in rows], drawn))
                yield from receive(ahead)

            arrange(slots, engine)
            active = [slot for slot in slots if slot.request >= 0]
            if any(slot.drawn < params.max_new_tokens for slot in active):
                queued.append((active, engine.decode([slot.length for slot in active])))
                for slot in active:
                    slot.drawn += 1
                yield from receive(ahead)
            else:  # all that is left to know has been drawn
                yield from receive(0)
    finally:
        model.train(training)
        device, engine = engine.device, None
        return_memory(device)  # of the cache: training needs it


def _check(model, prompts: list[tuple[int, ...]], params: SamplingParams, num_slots: int, keys: list) -> None:
    if num_slots < 0:
        raise ValueError(
            f"num_slots is {num_slots} but must be >= 1, rows decoded at once, or 0: as many as memory holds"
        )
    if len(keys) != len(prompts):
        raise ValueError(f"there are {len(keys)} keys for {len(prompts)} prompts; pass one key per prompt")
    if () in prompts:
        raise ValueError(f"prompt {prompts.index(())} is empty; a prompt has at least one token")
    key, longest = max(zip(keys, prompts, strict=True), key=lambda pair: len(pair[1]), default=(None, ()))
    room = context_length(model) - len(longest)
    if room < params.max_new_tokens:
        way = f"max_new_tokens <= {room}" if room > 0 else "a model with a longer context, or leave it out"
        raise ValueError(
            f"prompt {key} has {len(longest)} tokens and max_new_tokens is {params.max_new_tokens}, but the "
            f"model was made for {context_length(model)} in all; pass {way}"
        )


def _next_prompts(waiting: deque[int], prompts: list[tuple[int, ...]], num_free: int) -> list[int]:
    """Take prompts from the front, as many as the free rows and PREFILL_TOKENS allow; at least one."""
    requests = [waiting.popleft()]
    distinct = {prompts[requests[0]]}
    while waiting and len(requests) < num_free:
        wider = distinct | {prompts[waiting[0]]}
        if len(wider) > len(distinct) and sum(map(len, wider)) > PREFILL_TOKENS:
            break
        distinct = wider
        requests.append(waiting.popleft())
    return requests


def arrange(slots: list[_Slot], engine) -> None:
    """Move active rows so that the batch is rows 0..B-1. A row that is already among these stays there."""
    active = [row for row, slot in enumerate(slots) if slot.request >= 0]
    targets = [row for row in range(len(active)) if slots[row].request < 0]
    sources = [row for row in active if row >= len(active)]
    if not sources:
        return
    engine.move(sources, targets, max(slots[row].length for row in sources))
    for source, target in zip(sources, targets, strict=True):
        slots[source], slots[target] = slots[target], slots[source]


class Samples(Progress):
    """The progress of samples: also tokens per second, mean length and how many were truncated."""

    def __init__(self, total: int, description: str):
        super().__init__(description, "samples", total)
        self.tokens = self.finished_tokens = self.truncated = 0

    def finish(self, completion: Completion) -> None:
        self.finished_tokens += len(completion.ids)
        self.truncated += not completion.finished
        self.update()

    @property
    def text(self) -> str:
        mean = f"{self.finished_tokens / self.done:,.0f}" if self.done else "?"
        return f"{self.tokens / self.seconds:,.0f} tokens/s, mean length {mean}, truncated {self.truncated}"
