"""The model with its slots on the device: prompts fill rows of the cache, and each row draws token by token.

What rows need from step to step stays on the device, in place: where they write, their last tokens, and the
places in their random streams. So a card can replay a step (kit/generate/graph.py). The host needs the tokens
themselves, to see which texts end, and reads copies of them afterwards.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate

import torch

from kit.generate.decode import make_decoder
from kit.generate.graph import steps_for
from kit.generate.kv_cache import SlotCache
from kit.generate.sampling import SamplingParams, sample
from kit.models.backbone import hidden_states, next_token_logits
from kit.packing import Document, PackedBatch


class Drawn:
    """Tokens that rows have drawn, with their log-probs, on their way to the host."""

    def __init__(self, tokens: torch.Tensor, logprobs: torch.Tensor):
        # copies, also on a CPU: the next step writes over these. From a card into pinned memory, which torch
        # allocates for such a copy
        self.tokens, self.logprobs = (x.to("cpu", non_blocking=True, copy=True) for x in (tokens, logprobs))
        self.arrived = torch.cuda.Event() if tokens.is_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def read(self) -> tuple[list[int], list[float]]:
        """Wait until they have arrived: the only wait of a step."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tokens.tolist(), self.logprobs.tolist()


def steps_ahead(device: torch.device) -> int:
    """Return how many steps are queued before one is read. A CPU would only compute tokens that are cut."""
    return 0 if device.type == "cpu" else 1


class Engine:
    """The model with its slots: `prefill` fills rows, `decode` advances rows 0..B-1 by one token."""

    def __init__(
        self, model, params: SamplingParams, num_slots: int, capacity: int, *, cuda_graphs: bool = True
    ):
        """cuda_graphs: replay token steps, on a card whose kernel reads the cache."""
        self.model, self.params, self.decoder = model, params, make_decoder(model)
        weight = model.get_input_embeddings().weight
        self.device, self.num_slots = weight.device, num_slots
        self.cache = SlotCache(model, num_slots, capacity)
        self.steps = steps_for(self.device, self.cache.uses_kernel, cuda_graphs)

        def state(dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(num_slots, dtype=dtype, device=self.device)

        # of each row: where its next token is written, its last drawn token (not yet in the cache), the key
        # of its random stream, and the number of tokens drawn so far
        self.positions, self.tokens, self.keys, self.drawn = state(), state(), state(), state()
        self.logprobs = state(torch.promote_types(weight.dtype, torch.float32))  # of the last drawn tokens
        self.state = {"positions": self.positions, "tokens": self.tokens, "keys": self.keys}
        self.state |= {"draws": self.drawn, "log-probs": self.logprobs}

    def _send(self, values: list[int]) -> torch.Tensor:
        """Copy integers to the device without waiting for what it computes."""
        return torch.tensor(values).to(self.device, non_blocking=True)

    def _draw(self, rows: torch.Tensor | slice, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = next_token_logits(self.model, hidden)
        tokens, logprobs = sample(logits, self.params, self.keys[rows], self.drawn[rows])
        self.tokens[rows], self.logprobs[rows] = tokens, logprobs
        self.drawn[rows] += 1
        return tokens, logprobs

    def prefill(self, rows: list[int], prompts: list[tuple[int, ...]], keys: list[int]) -> Drawn:
        """Read prompts into rows, equal ones once, and draw the first token of each row."""
        distinct = list(dict.fromkeys(prompts))
        # created outside of inference mode, where every layer would check the pack's bounds again
        with torch.inference_mode(False):
            documents = [Document(torch.tensor(prompt), 1) for prompt in distinct]
            pack = PackedBatch.build(documents).to(self.device)
        # where each prompt begins in the pack
        first = dict(zip(distinct, accumulate(map(len, distinct), initial=0), strict=False))
        starts, lengths = [first[prompt] for prompt in prompts], [len(prompt) for prompt in prompts]

        index = self._send(rows)
        self.keys[index] = self._send(keys)
        self.positions[index] = self._send(lengths)
        self.drawn[index] = 0
        self.cache.at_prefill(rows, starts, lengths)
        hidden = hidden_states(self.model, pack, cache=self.cache)
        ends = [start + length - 1 for start, length in zip(starts, lengths, strict=True)]
        return Drawn(*self._draw(index, hidden[self._send(ends)]))

    def decode(self, lengths: list[int]) -> Drawn:
        """Draw one more token for each of rows 0..B-1. lengths: positions that each holds, B of them."""
        num_rows = len(lengths)
        size = self.steps.size(num_rows, self.num_slots)
        if size > num_rows:  # free slots fill up the batch: they read one key, and write where nobody reads
            self.positions[num_rows:size] = 0
        self.steps(size, partial(self._step, size, max(lengths)), self.state)
        return Drawn(self.tokens[:num_rows], self.logprobs[:num_rows])

    def _step(self, size: int, longest: int) -> None:
        positions = self.positions[:size]
        self.cache.at_decode(positions, longest)
        self._draw(slice(size), self.decoder(self.tokens[:size], positions, self.cache))
        positions += 1

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        index, into = self._send(sources), self._send(targets)
        self.cache.move(index, into, length)
        for state in (self.positions, self.tokens, self.keys, self.drawn):
            state[into] = state[index]
