"""The sampler's KV cache: one preallocated row a slot, and in sliding layers a ring that holds the window and nothing else.

    position p of a row lies in place p mod W,   W = min(window, capacity) in sliding layers, capacity in all others
    seen from position q, place s holds position q - ((q - s) mod W), and is empty where that is negative

One formula serves both kinds of layer: where W is the whole capacity nothing ever wraps. Gemma-3-1B keeps a window of 512 in 22
of its 26 layers: a row of 16,384 positions takes 75 MiB in bf16 instead of 416.
"""

from __future__ import annotations

import torch
from transformers import Cache

from kit.attention import head_dim, layer_windows


class SlotCache(Cache):
    """Keys and values (S, Hkv, W, D) a layer. `at_prefill` and `at_decode` say what the next forward pass touches."""

    def __init__(self, model, num_slots: int, capacity: int):
        super().__init__(layers=[])
        config, weight = model.config, model.get_input_embeddings().weight
        self.windows = layer_windows(config)
        self.sizes = [min(window or capacity, capacity) for window in self.windows]
        # never attended before it is written, but garbage may be NaN, and 0 * NaN in a masked product is NaN
        self.keys = [
            torch.zeros(num_slots, config.num_key_value_heads, W, head_dim(config), dtype=weight.dtype, device=weight.device)
            for W in self.sizes
        ]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.kinds = list(getattr(config, "layer_types", None) or ()) if config.model_type != "llama" else []
        self.rows = self.lengths = self.source = self.positions = None
        self.length = 0

    def at_prefill(self, rows: torch.Tensor, lengths: torch.Tensor, source: torch.Tensor):
        """Whole prompts come next: row rows[i] gets prompt source[i], of which several rows may share one; lengths (B,) of each
        row's prompt. Returns the masks for prompts that are padded on the right up to `lengths.max()`."""
        self.rows, self.lengths, self.source, self.positions, self.length = rows, lengths, source, None, 0
        steps = torch.arange(int(lengths.max()), device=rows.device)
        # causality hides the padding
        distance = (steps[:, None] - steps[None, :])[None, None]  # (1, 1, L, L)
        return self._masks(lambda layer: (distance >= 0) & (distance < (self.windows[layer] or len(steps))))

    def at_decode(self, positions: torch.Tensor, length: int):
        """One token comes next for each of rows 0..B-1, at positions (B,), all below `length`. Returns the masks."""
        self.rows = torch.arange(len(positions), device=positions.device)
        self.positions, self.length = positions, length

        def seen(layer):
            W = self.sizes[layer]
            places = torch.arange(min(W, length), device=positions.device)
            return ((positions[:, None] - places) % W <= positions[:, None])[:, None, None]  # (B, 1, 1, places)

        return self._masks(seen)

    def _masks(self, seen_of):
        """What a model's forward takes: one mask, or one for each kind of layer. Added to the scores, 0 where a place is seen: a
        boolean one would be turned into such numbers again in every layer."""

        def mask_of(layer):
            seen = seen_of(layer)
            return torch.zeros(seen.shape, dtype=self.keys[0].dtype, device=seen.device).masked_fill_(~seen, -torch.inf)

        if not self.kinds:
            return mask_of(0)
        return {kind: mask_of(self.kinds.index(kind)) for kind in set(self.kinds)}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values, W = self.keys[layer_idx], self.values[layer_idx], self.sizes[layer_idx]
        if self.positions is None:  # prefill: prompts attend to themselves alone
            for held, states in ((keys, key_states), (values, value_states)):
                if states.shape[2] <= W:  # the padding's keys are overwritten before decoding looks there
                    held[self.rows, :, : states.shape[2]] = states[self.source]
                else:
                    held[self.rows] = states[self.source[:, None], :, self._last_positions(W)].transpose(1, 2)
            return key_states, value_states
        places = self.positions % W
        keys[self.rows, :, places] = key_states[:, :, 0]
        values[self.rows, :, places] = value_states[:, :, 0]
        B, width = len(self.rows), min(W, self.length)
        return keys[:B, :, :width], values[:B, :, :width]

    def _last_positions(self, W: int) -> torch.Tensor:
        """(B, W): which of a prompt's positions each place of a ring holds; 0 for places that stay empty."""
        last = self.lengths[:, None] - 1
        return (last - (last - torch.arange(W, device=last.device)) % W).clamp(min=0)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row of `length` positions over another."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


def cache_bytes(model, num_slots: int, capacity: int) -> int:
    """Bytes of the KV cache for num_slots rows of `capacity` positions (prompt and response together)."""
    config = model.config
    positions = sum(min(window or capacity, capacity) for window in layer_windows(config))
    per_position = 2 * config.num_key_value_heads * head_dim(config) * model.get_input_embeddings().weight.element_size()
    return num_slots * positions * per_position
