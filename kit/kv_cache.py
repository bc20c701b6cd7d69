"""The sampler's KV cache: one preallocated row a slot, and in sliding layers a ring that holds the window and nothing else.

    position p of a row lies in place p mod W,   W = min(window, capacity) in sliding layers, capacity in all others
    seen from position q, place s holds position q - ((q - s) mod W), and is empty where that is negative, s > q

One formula serves both kinds of layer: where W is the whole capacity nothing ever wraps. Gemma-3-1B keeps a window of 512 in 22
of its 26 layers: a row of 16,384 positions takes 75 MiB in bf16 instead of 416.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate

import torch
from transformers import Cache

from kit.attention import head_dim, layer_windows

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
            torch.empty(num_slots, config.num_key_value_heads, W, head_dim(config), dtype=weight.dtype, device=weight.device)
            for W in self.sizes
        ]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        heads = torch.arange(num_slots * config.num_key_value_heads, device=weight.device).view(num_slots, -1)
        self.starts = {W: heads * W for W in self.sizes}  # where each row's heads begin, (S, Hkv), in a layer's (S * Hkv * W, D)
        self.zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
        self.cleared = dict.fromkeys(self.sizes, 0)  # size -> places of every row that hold no garbage
        self.kinds = list(getattr(config, "layer_types", None) or ()) if config.model_type != "llama" else []
        position_bytes = 2 * config.num_key_value_heads * head_dim(config) * weight.element_size()  # of one layer
        grouping = weight.device.type == "cpu"
        self.min_saved = CALL_BYTES // position_bytes if grouping else math.inf  # places whose reading another group must save
        self.sorted_by = SORTED_BY if grouping else math.inf  # places by which rows may differ and lie in any order
        self.rows = self.lengths = self.source = None
        self.places: dict[int, torch.Tensor] = {}  # size of a layer -> where the next position of each row and head lies in it
        self.readers: dict[int, list[tuple[slice, int, torch.Tensor]]] = {}  # size -> groups of rows: rows, places, mask

    def at_prefill(self, rows: torch.Tensor, lengths: torch.Tensor, source: torch.Tensor):
        """Whole prompts come next: row rows[i] gets prompt source[i], of which several rows may share one; lengths (B,) of each
        row's prompt. Returns the masks for prompts that are padded on the right up to `lengths.max()`."""
        self.rows, self.lengths, self.source = rows, lengths, source
        steps = torch.arange(int(lengths.max()), device=rows.device)
        for W in self.cleared:
            self._clear(W, min(len(steps), W))
        distance = (steps[:, None] - steps[None, :])[None, None]  # (1, 1, L, L); causality hides the padding

        def mask_of(layer):
            return self._added((distance < 0) | (distance >= (self.windows[layer] or len(steps))))

        if not self.kinds:
            return mask_of(0)
        return {kind: mask_of(self.kinds.index(kind)) for kind in set(self.kinds)}

    def at_decode(self, positions: torch.Tensor, lengths: list[int]) -> None:
        """One token comes next for each of rows 0..B-1, at positions (B,), which `lengths` repeats on the host. Rows side by side
        that are about as long are read together, as far as the longest of them."""
        for W in self.cleared:
            widths = [min(-(-(length + 1) // BUCKET) * BUCKET, W) for length in lengths]
            q, s = positions[:, None], torch.arange(max(widths), device=positions.device)
            mask = self._added(s > q)[:, None, None]  # (B, 1, 1, places); once q has passed W, every place is of the window
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
        """transformers' interface: the prompts' keys and values go to their rows, and prompts attend to themselves alone."""
        W = self.sizes[layer_idx]
        for held, states in ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states)):
            if states.shape[2] <= W:  # the padding's keys are overwritten before decoding looks there
                held[self.rows, :, : states.shape[2]] = states[self.source]
            else:
                held[self.rows] = states[self.source[:, None], :, self._last_positions(W)].transpose(1, 2)
        return key_states, value_states

    def _last_positions(self, W: int) -> torch.Tensor:
        """(B, W): which of a prompt's positions each place of a ring holds; 0 for places that stay empty."""
        last = self.lengths[:, None] - 1
        return (last - (last - torch.arange(W, device=last.device)) % W).clamp(min=0)

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
    per_position = 2 * config.num_key_value_heads * head_dim(config) * model.get_input_embeddings().weight.element_size()
    return num_slots * positions * per_position
