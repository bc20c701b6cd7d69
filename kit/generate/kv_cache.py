"""The sampler's KV cache: one preallocated row per slot, and in sliding layers a ring that holds the window and nothing else.

    position p of a row lies in place p mod W,   W = min(window, capacity) in sliding layers, capacity in all others
    seen from position q, place s holds position q - ((q - s) mod W), and is empty where that is negative, s > q

One formula serves both kinds of layer: where W is the whole capacity nothing ever wraps. Gemma-3-1B keeps a window of 512 in 22
of its 26 layers: a row of 16,384 positions takes 75 MiB in bf16 instead of 416.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from transformers import Cache

from kit.models.families import head_dim, layer_windows

BUCKET = 16  # attended length is rounded up to this many positions, so that shapes repeat
# on a CPU one more call of attention takes as long as reading so many bytes of keys and values; on a card rows run beside one
# another within a call and several calls one after another: there all rows are read together
CALL_BYTES = 2**18
SORTED_BY = 256  # where rows are grouped: those whose lengths differ by less may lie in any order, since to move one costs more
MOVED_AT_ONCE = 1_024  # positions: bounds the copy that moving rows holds


class SlotCache(Cache):
    """Keys and values (S, Hkv, W, D) a layer. `at_prefill` and `at_decode` say what the next forward pass touches."""

    def __init__(self, model, num_slots: int, capacity: int):
        super().__init__(layers=[])
        config, weight = model.config, model.get_input_embeddings().weight
        self.windows = layer_windows(config)
        self.sizes = [min(window or capacity, capacity) for window in self.windows]
        # not zeros: on a CPU memory is taken when it is first written, and most answers end long before the capacity
        self.keys = [
            torch.empty(
                num_slots,
                config.num_key_value_heads,
                W,
                head_dim(config),
                dtype=weight.dtype,
                device=weight.device,
            )
            for W in self.sizes
        ]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        heads = torch.arange(num_slots * config.num_key_value_heads, device=weight.device).view(num_slots, -1)
        self.starts = {
            W: heads * W for W in self.sizes
        }  # where each row's heads begin, (S, Hkv), in a layer's (S * Hkv * W, D)
        self.zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
        self.cleared = dict.fromkeys(self.sizes, 0)  # size -> places of every row that hold no garbage
        position_bytes = (
            2 * config.num_key_value_heads * head_dim(config) * weight.element_size()
        )  # of one layer
        grouping = weight.device.type == "cpu"
        self.min_saved = (
            CALL_BYTES // position_bytes if grouping else math.inf
        )  # places whose reading another group must save
        self.sorted_by = (
            SORTED_BY if grouping else math.inf
        )  # places by which rows may differ and lie in any order
        # size of a layer -> for every position that the prompts leave there: its row, its place, and its token in the pack
        self.prompt_places: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.places: dict[
            int, torch.Tensor
        ] = {}  # size of a layer -> where the next position of each row and head lies in it
        self.readers: dict[
            int, list[tuple[slice, int, torch.Tensor]]
        ] = {}  # size -> groups of rows: rows, places, mask

    def at_prefill(self, rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """A pack of whole prompts comes next: row rows[i] gets the lengths[i] tokens that begin at starts[i] in the pack. Several
        rows may share one prompt."""
        device = self.starts[self.sizes[0]].device
        for W in self.cleared:
            self._clear(W, min(max(lengths), W))
            kept = [min(length, W) for length in lengths]  # a ring holds a prompt's last W positions
            row = torch.tensor(rows).repeat_interleave(torch.tensor(kept))
            position = torch.cat([torch.arange(n - k, n) for n, k in zip(lengths, kept, strict=True)])
            token = position + torch.tensor(starts).repeat_interleave(torch.tensor(kept))
            self.prompt_places[W] = row.to(device), (position % W).to(device), token.to(device)

    def at_decode(self, positions: torch.Tensor, lengths: list[int]) -> None:
        """One token comes next for each of rows 0..B-1, at positions (B,), which `lengths` repeats on the host. Rows side by side
        that are about as long are read together, as far as the longest of them."""
        for W in self.cleared:
            widths = [min(-(-(length + 1) // BUCKET) * BUCKET, W) for length in lengths]
            q, s = positions[:, None], torch.arange(max(widths), device=positions.device)
            mask = self._added(s > q)[
                :, None, None
            ]  # (B, 1, 1, places); once q has passed W, every place is of the window
            self._clear(W, max(widths))
            self.places[W] = (self.starts[W][: len(positions)] + (positions % W)[:, None]).flatten()
            self.readers[W] = [(rows, n, mask[rows, ..., :n]) for rows, n in grouped(widths, self.min_saved)]

    def _clear(self, W: int, end: int) -> None:
        """Zeros in places up to `end` that were never written: masked as they are, 0 * NaN is NaN."""
        if self.cleared[W] < end:
            for i in (i for i, size in enumerate(self.sizes) if size == W):
                self.keys[i][:, :, self.cleared[W] : end] = 0
                self.values[i][:, :, self.cleared[W] : end] = 0
            self.cleared[W] = end

    def _added(self, unseen: torch.Tensor) -> torch.Tensor:
        """What is added to the scores, 0 where a place is seen: a boolean mask would be turned into it in every layer."""
        return torch.where(unseen, -torch.inf, self.zero)

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put the new tokens' keys and values (B, Hkv, D) in their places."""
        places = self.places[self.sizes[layer]]
        for held, states in ((self.keys[layer], keys), (self.values[layer], values)):
            held.view(-1, held.shape[-1]).index_copy_(0, places, states.reshape(-1, held.shape[-1]))

    def groups(self, layer: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(rows, their keys and values (rows, Hkv, places, D), the mask to add to their scores)."""
        for rows, width, mask in self.readers[self.sizes[layer]]:
            yield rows, self.keys[layer][rows, :, :width], self.values[layer][rows, :, :width], mask

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """transformers' interface: keys and values (1, Hkv, T, D) of a pack of prompts go to their rows, and the pack attends to
        itself alone."""
        row, place, token = self.prompt_places[self.sizes[layer_idx]]
        for held, states in ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states)):
            held[row, :, place] = states[0, :, token].transpose(0, 1)  # (positions, Hkv, D)
        return key_states, value_states

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Rows `targets` become what rows `sources` were, up to position `length`. Rows may be in both."""
        for tensor in (*self.keys, *self.values):
            end = min(length, tensor.shape[2])
            for start in range(0, end, MOVED_AT_ONCE):
                places = slice(start, min(start + MOVED_AT_ONCE, end))
                tensor[targets, :, places] = tensor[sources, :, places]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # transformers asks before a prompt is read


def grouped(widths: list[int], min_saved: float) -> list[tuple[slice, int]]:
    """(rows, places to read) of runs of rows, each read as far as its widest row needs: cut in two, and again, where a cut saves
    the reading of more than min_saved places."""
    runs, waiting = [], [(0, len(widths))]
    while waiting:
        start, end = waiting.pop()
        run = widths[start:end]
        widest = max(run)
        if widest > min(run):
            before, after = list(accumulate(run, max)), list(accumulate(reversed(run), max))[::-1]
            areas = [(i * before[i - 1] + (len(run) - i) * after[i], i) for i in range(1, len(run))]
            area, i = min(areas)
            if len(run) * widest - area > min_saved:
                waiting += [(start + i, end), (start, start + i)]
                continue
        runs.append((slice(start, end), widest))
    return runs


def cache_bytes(model, num_slots: int, capacity: int) -> int:
    """Bytes of the KV cache for num_slots rows of `capacity` positions (prompt and response together)."""
    config = model.config
    positions = sum(min(window or capacity, capacity) for window in layer_windows(config))
    per_position = (
        2 * config.num_key_value_heads * head_dim(config) * model.get_input_embeddings().weight.element_size()
    )
    return num_slots * positions * per_position
