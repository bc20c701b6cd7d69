"""The sampler's KV cache: one preallocated row per slot; in sliding layers a ring that holds the window.

Position p of a row is stored in place p mod W, with W = min(window, capacity) in sliding layers and W =
capacity in all others. Seen from position q, place s holds position q - ((q - s) mod W); it is empty if that
is negative, which is the case if s > q.

One formula serves both kinds of layer: if W is the whole capacity, nothing ever wraps. Gemma-3-1B has a
window of 512 in 22 of its 26 layers, so a row of 16,384 positions takes 75 MiB in bf16 instead of 416.

On a card, kit/kernels/decode_attention.py reads each row to its own length, which stays on the device. Where
it does not run (a CPU, a card without Triton or older than RTX 30), all rows are read as far as the longest,
under a mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kit.kernels.decode_attention import decode_attention, obstacle, runs_kernel
from kit.models.families import head_dim, layer_windows

BUCKET = 16  # positions; attended length is rounded up to a multiple of it, so that shapes repeat
MOVED_AT_ONCE = 1_024  # positions; bounds the copy that a move makes


class SlotCache:
    """Keys and values, (S, Hkv, W, D) per layer. at_prefill and at_decode prepare it for a forward pass."""

    def __init__(self, model, num_slots: int, capacity: int):
        config, weight = model.config, model.get_input_embeddings().weight
        self.sizes = _sizes(config, capacity)
        num_heads, width = config.num_key_value_heads, head_dim(config)
        like = {"dtype": weight.dtype, "device": weight.device}
        # not zeros: a CPU allocates memory on first write, and most answers end long before the capacity
        self.keys = [torch.empty(num_slots, num_heads, W, width, **like) for W in self.sizes]
        self.values = [torch.empty_like(keys) for keys in self.keys]

        self.numbers = torch.arange(num_slots, device=weight.device)
        self.zero = torch.zeros((), **like)
        self.uses_kernel = _takes_kernel(config, weight)
        # size -> places of every row that hold no garbage; the kernel reads none
        self.cleared = {W: W if self.uses_kernel else 0 for W in self.sizes}

        # by the size W of a layer: row, place and token in the pack of every position that the prompts leave
        self.prompt_places: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        # where each row writes its next position, (B,)
        self.places: dict[int, torch.Tensor] = {}
        # how many places are read, and what each row sees of them: for the kernel its length, (B,), otherwise
        # what is added to its scores, (B, 1, 1, places)
        self.seen: dict[int, tuple[int, torch.Tensor]] = {}

    def at_prefill(self, rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Prepare for a pack of whole prompts, which several rows may share.

        Row rows[i] gets the lengths[i] tokens that begin at starts[i] in the pack.
        """
        for W in self.cleared:
            self._clear(W, min(max(lengths), W))
            kept = [min(length, W) for length in lengths]  # a ring holds a prompt's last W positions
            row = torch.tensor(rows).repeat_interleave(torch.tensor(kept))
            position = torch.cat([torch.arange(n - k, n) for n, k in zip(lengths, kept, strict=True)])
            token = position + torch.tensor(starts).repeat_interleave(torch.tensor(kept))
            places = row, position % W, token
            self.prompt_places[W] = tuple(x.to(self.zero.device, non_blocking=True) for x in places)

    def at_decode(self, positions: torch.Tensor, longest: int) -> None:
        """Prepare for one token in each of rows 0..B-1, at positions (B,). longest: the largest of them.

        The kernel needs positions alone.
        """
        lengths = positions + 1
        for W in self.cleared:
            self.places[W] = positions % W
            if self.uses_kernel:
                self.seen[W] = W, lengths
                continue
            width = min(-(-(longest + 1) // BUCKET) * BUCKET, W)
            unseen = torch.arange(width, device=positions.device) >= lengths[:, None]  # none from W on
            # added to the scores: a boolean mask would be converted in every layer
            self.seen[W] = width, torch.where(unseen, -torch.inf, self.zero)[:, None, None]
            self._clear(W, width)

    def _clear(self, W: int, end: int) -> None:
        """Write zeros to the places up to `end` that hold garbage: they are masked, but 0 * NaN is NaN."""
        if self.cleared[W] < end:
            for i in (i for i, size in enumerate(self.sizes) if size == W):
                self.keys[i][:, :, self.cleared[W] : end] = 0
                self.values[i][:, :, self.cleared[W] : end] = 0
            self.cleared[W] = end

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the new tokens' keys and values, (B, Hkv, D) of any strides, to their places."""
        places = self.places[self.sizes[layer]]
        rows = self.numbers[: len(places)]
        self.keys[layer][rows, :, places] = keys
        self.values[layer][rows, :, places] = values

    def rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return keys and values of rows 0..B-1, (B, Hkv, places, D), and what each row sees of them."""
        width, seen = self.seen[self.sizes[layer]]
        B = len(seen)
        return self.keys[layer][:B, :, :width], self.values[layer][:B, :, :width], seen

    def attend(self, layer: int, q: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend from the queries of rows 0..B-1 to what each row sees, (B, Hq, D) -> (B, Hq, D)."""
        if self.uses_kernel:
            return decode_attention(q, *self.rows(layer), scale=scale)
        keys, values, mask = self.rows(layer)
        # the query heads of a group are rows of one small matrix, so that K and V are read once
        grouped = q.unflatten(1, (keys.shape[1], -1))  # (B, Hkv, Hq / Hkv, D)
        # not with cuDNN's attention, which compiles a plan per length and number of rows
        backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(backends) if q.is_cuda else nullcontext():
            attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        return attended.flatten(1, 2)

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the keys and values of a pack of prompts, (T, Hkv, D), in their rows."""
        row, place, token = self.prompt_places[self.sizes[layer]]
        for held, states in ((self.keys[layer], keys), (self.values[layer], values)):
            held[row, :, place] = states[token]  # (positions, Hkv, D)

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Copy rows `sources` to rows `targets`, up to position `length`."""
        for tensor in (*self.keys, *self.values):
            end = min(length, tensor.shape[2])
            for start in range(0, end, MOVED_AT_ONCE):
                places = slice(start, min(start + MOVED_AT_ONCE, end))
                tensor[targets, :, places] = tensor[sources, :, places]


def _sizes(config, capacity: int) -> list[int]:
    """Return the places of a row in each layer: W."""
    return [min(window or capacity, capacity) for window in layer_windows(config)]


def _takes_kernel(config, weight: torch.Tensor) -> bool:
    """Return whether the kernel reads this cache. Warns if it would run here but does not take the model."""
    heads_per_group = config.num_attention_heads // config.num_key_value_heads
    return runs_kernel(weight) and _takes(head_dim(config), heads_per_group)


@cache
def _takes(width: int, heads_per_group: int) -> bool:
    if why := obstacle(width, heads_per_group):
        warnings.warn(
            f"tokens are sampled with torch's attention, as far as the longest row: {why}", stacklevel=3
        )
    return not why


def cache_bytes(model, num_slots: int, capacity: int) -> int:
    """Return the bytes of a KV cache of num_slots rows. capacity: positions, prompt and response alike."""
    config = model.config
    element_bytes = model.get_input_embeddings().weight.element_size()
    position_bytes = 2 * config.num_key_value_heads * head_dim(config) * element_bytes
    return num_slots * sum(_sizes(config, capacity)) * position_bytes
