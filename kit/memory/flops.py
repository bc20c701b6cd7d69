"""Count the FLOPs and bytes of training and sampling from a decoder's sizes.

Elementwise work, norms and launch overhead are ignored: next to the matmuls they are small.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from kit.models.families import head_dim, layer_windows
from kit.train.savings import Savings

NF4_BYTES = 4.6  # moved per weight and use: half a byte is read, two are written dequantised and read again


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder."""

    V: int  # rows of the vocabulary
    H: int  # hidden size
    L: int  # layers
    intermediate: int  # width of the feed-forward
    q: int  # width of all query heads
    kv: int  # width of all key heads
    windows: tuple[int, ...]  # positions that each sliding layer attends to
    tied: bool  # head and embedding are one weight

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Sizes:
        D = head_dim(config)
        return cls(
            V=config.vocab_size,
            H=config.hidden_size,
            L=config.num_hidden_layers,
            intermediate=config.intermediate_size,
            q=config.num_attention_heads * D,
            kv=config.num_key_value_heads * D,
            windows=tuple(window for window in layer_windows(config) if window is not None),
            tied=config.tie_word_embeddings,
        )

    @property
    def linears(self) -> int:
        """Weights of the linear layers of all decoder layers: four of the attention, three of the rest."""
        return self.L * self.H * (2 * self.q + 2 * self.kv + 3 * self.intermediate)

    @property
    def weights(self) -> int:
        """All weights but norms and biases."""
        return self.linears + self.V * self.H * (1 if self.tied else 2)

    def adapters(self, rank: int) -> int:
        """Return the number of weights of LoRA adapters on all linear layers."""
        per_layer = 2 * (self.H + self.q) + 2 * (self.H + self.kv) + 3 * (self.H + self.intermediate)
        return self.L * rank * per_layer

    def forward_flops(self, T: int) -> int:
        """Return the layers' FLOPs for one document of T tokens.

        They are 2 per weight and token, and 4q per query-key pair that is visible.
        """
        spans = [min(T, window) for window in self.windows] + [T] * (self.L - len(self.windows))
        pairs = sum(span * (2 * T - span + 1) // 2 for span in spans)
        return 2 * T * self.linears + 4 * pairs * self.q

    def row_flops(self, T: int, savings: Savings, qlora_rank: int = 0) -> int:
        """Return the FLOPs of a training row that is one document of T tokens, recomputation included.

        Full fine-tuning: the backward pass costs two forward passes. QLoRA: one, as frozen weights need no
        gradient.
        """
        passes = (2 if qlora_rank else 3) + savings.recompute
        head = 4 if qlora_rank else 6 + 2 * (savings.head_update == "blocked")  # blocks recompute the logits
        return passes * self.forward_flops(T) + head * T * self.V * self.H

    def token_step(self, num_slots: int, length: int, *, nf4: bool = False) -> tuple[int, float]:
        """Return (FLOPs, bytes moved) of sampling one token per slot, with `length` positions in the cache.

        A step reads the weights once (bf16, or the layers in NF4) and every slot's keys and values.
        """
        positions = sum(min(length, window) for window in self.windows)
        positions += length * (self.L - len(self.windows))  # in all layers of one slot

        head = self.V * self.H
        weights = (NF4_BYTES if nf4 else 2) * self.linears + 2 * head
        return 2 * num_slots * (self.linears + head), weights + num_slots * 2 * 2 * self.kv * positions
