"""What a step and each saving cost in seconds: an estimate from counted flops and bytes and an assumed card, never a timing.

    seconds = flops / FLOPS, or bytes / BANDWIDTH, or bytes over the bus / BUS          one of the three for each saving

Copies over the bus may hide behind computation: theirs is the most they can cost. Launches, and matmuls too small to fill a card,
are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from kit.kernels.linear_cross_entropy_chunks import rows_per_chunk
from kit.models.families import head_dim, layer_windows
from kit.train.savings import Savings

FLOPS = 40e12  # a second in bf16 matmuls; about what an RTX 4070 reaches of its peak
BANDWIDTH = 400e9  # bytes a second of the card's own memory
BUS = 12e9  # bytes per second to and from pinned CPU memory: half of PCIe 4.0 x16, all of x8
ASSUMED = f"estimated for a card of {FLOPS / 1e12:.0f} TFLOP/s, {BANDWIDTH / 1e9:.0f} GB/s, {BUS / 1e9:.0f} GB/s over the bus"


@dataclass(frozen=True)
class Sizes:
    """A decoder's sizes: what flops and bytes are counted from."""

    V: int  # rows of the vocabulary
    H: int  # hidden size
    L: int  # layers
    intermediate: int  # width of the feed-forward
    q: int  # width of all query heads
    kv: int  # width of all key heads
    windows: tuple[int, ...]  # of the sliding layers
    tied: bool  # head and embedding are one weight

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Sizes:
        D = head_dim(config)
        return cls(
            config.vocab_size, config.hidden_size, config.num_hidden_layers, config.intermediate_size,
            config.num_attention_heads * D, config.num_key_value_heads * D,
            tuple(window for window in layer_windows(config) if window is not None), config.tie_word_embeddings,
        )  # fmt: skip

    @property
    def mlp(self) -> int:
        """Numbers in one layer's feed-forward."""
        return 3 * self.H * self.intermediate

    @property
    def attention(self) -> int:
        """Numbers in one layer's four projections."""
        return self.H * (2 * self.q + 2 * self.kv)

    @property
    def linears(self) -> int:
        return self.L * (self.mlp + self.attention)

    def forward_flops(self, T: int) -> int:
        """Of the layers, for one document of T tokens: 2 a weight and token, 4q a pair that see each other."""
        spans = [min(T, window) for window in self.windows] + [T] * (self.L - len(self.windows))
        pairs = sum(span * (2 * T - span + 1) // 2 for span in spans)
        return 2 * T * self.linears + 4 * pairs * self.q


def step_seconds(config: PreTrainedConfig, T: int, savings: Savings, qlora_rank: int = 0) -> float:
    """The step without what `extra_seconds` lists: forward, backward (twice that; with a frozen model once, besides attention's)
    and the head's matmuls."""
    sizes = Sizes.of(config)
    head = (4 if qlora_rank else 6) * T * sizes.V * sizes.H
    return ((2 if qlora_rank else 3) * sizes.forward_flops(T) + head) / FLOPS


def extra_seconds(
    config: PreTrainedConfig, T: int, savings: Savings, qlora_rank: int = 0
) -> dict[str, float]:
    """What each saving that is on adds to a step of one row of T tokens. Savings that move no byte more are not listed."""
    sizes, found = Sizes.of(config), {}
    if savings.recompute:
        found["recompute"] = sizes.forward_flops(T) / FLOPS
    if 0 < savings.tile_tokens < T:
        tiles = -(-T // savings.tile_tokens)
        # a tile more reads the weights for forward, dX and dW's input, and, if they train, adds a bf16 gradient to an fp32 sum
        found["tile_tokens"] = (tiles - 1) * sizes.L * sizes.mlp * (4 if qlora_rank else 4 + 10) / BANDWIDTH
    if savings.offload_inputs:
        found["offload_inputs"] = 2 * (sizes.L - 1) * T * sizes.H * 2 / BUS
    if savings.logit_rows:
        usual, now = (
            -(-T // rows_per_chunk(T, sizes.V, sizes.H, 2, rows)) for rows in (0, savings.logit_rows)
        )
        found["logit_rows"] = (
            max(now - usual, 0) * sizes.V * sizes.H * (4 if qlora_rank else 4 + 8) / BANDWIDTH
        )
    if savings.head_update == "blocked" and not qlora_rank:
        found["head_update"] = 2 * T * sizes.V * sizes.H / FLOPS
    if savings.offload_optimizer and not qlora_rank:
        numbers = sizes.linears + sizes.V * sizes.H * (1 if sizes.tied else 2)
        found["offload_optimizer"] = 2 * numbers * (8 if savings.optimizer == "adamw" else 2) / BUS
    if qlora_rank:
        found["qlora_rank"] = (
            2 * sizes.linears * 4.6 / BANDWIDTH
        )  # half a byte read, two written, two read: forward and backward
    return found
