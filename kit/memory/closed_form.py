"""A second opinion on the memory plan: what a training step holds, by a closed formula of the model's sizes.

The plan (kit.memory.simulate) simulates the step; this adds up what it should find, at each of the moments
that can be the worst: the loss, one layer's backward pass, the head's blocks. It costs nothing, so that
settings can be compared by it before one is simulated. Good to a tenth for the six models whose configs ship
with the kit.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from kit.kernels.linear_cross_entropy_blocks import BLOCK_BYTES
from kit.kernels.linear_cross_entropy_chunks import rows_per_chunk
from kit.memory import live_bytes
from kit.memory.seconds import Sizes
from kit.memory.simulate import card_bytes
from kit.train.optimizer import AdamW8bit
from kit.train.savings import Savings


def formula_total(
    config: PreTrainedConfig, row_tokens: int, savings: Savings, qlora_rank: int = 0, *, rows: int = 1
) -> int:
    """Plan.total by the formula."""
    return card_bytes(sum(formula(config, row_tokens, savings, qlora_rank, rows=rows).values()))


def formula(
    config: PreTrainedConfig, row_tokens: int, savings: Savings, qlora_rank: int = 0, *, rows: int = 1
) -> dict[str, int]:
    """Bytes of each owner at the worst moment, for bf16 weights. rows: of a step; from the second one on, a row's loss finds the
    gradients of those before it."""
    T, sizes = row_tokens, Sizes.of(config)
    V, H, L, intermediate, q, kv = sizes.V, sizes.H, sizes.L, sizes.intermediate, sizes.q, sizes.kv
    head = V * H * (1 if sizes.tied else 2)
    trainable = sizes.linears + head
    weights = 2 * trainable
    if qlora_rank:
        trainable = L * qlora_rank * (2 * (H + q) + 2 * (H + kv) + 3 * (H + intermediate))
        weights = round(sizes.linears * 4.127 / 8) + 2 * (head + trainable)
    row = T * H * 2  # bytes of one (T, H) in bf16
    on_card = min(AdamW8bit.SLAB, V * H) * 2 if savings.offload_optimizer else trainable
    states = round(on_card * (8 if savings.optimizer == "adamw" else 2 + 8 / 256))
    gradients = 0 if savings.update_in_backward else 2 * trainable
    whole = savings.head_update == "whole" and not qlora_rank
    tile = min(savings.tile_tokens or T, T)
    # a tile's gate, up, activation and product, their gradients; attention's q, k, v and out with gradients, and in fp32 in norms
    layer = tile * 8 * intermediate * 2 + T * 3 * (q + kv) * 2 + 2 * row
    if not qlora_rank:
        layer += 2 * sizes.attention + sizes.mlp * (6 if tile < T else 2)
    else:
        layer += 2 * H * intermediate  # one weight, dequantised
    inputs = row * (2 if savings.offload_inputs else L + 1)
    if (
        not savings.recompute
    ):  # the norms' inputs in fp32, what they make of them, their outputs; q, k, v, out; a tile's four
        inputs = L * T * (16 * H + 4 * (q + kv) + 8 * intermediate)
    chunk = rows_per_chunk(T, V, H, 2, savings.logit_rows) * 2 * (V + 3 * H)
    norm_graph = 0 if savings.recompute else 5 * row  # the last norm's, two fp32 copies and a bf16 one
    at_loss = {
        live_bytes.INPUTS: inputs,
        live_bytes.LOGITS: chunk,
        live_bytes.HEAD: 4 * V * H if whole else 0,
        live_bytes.REST: row + norm_graph,
    }
    if rows > 1:
        at_loss[live_bytes.GRADIENTS] = gradients
    in_layer = {
        live_bytes.INPUTS: inputs,
        live_bytes.LAYER: layer,
        live_bytes.HEAD: 2 * V * H if whole else 0,
    }
    if not savings.update_in_backward:
        in_layer[live_bytes.GRADIENTS] = gradients - in_layer[live_bytes.HEAD]
    block = min(V, BLOCK_BYTES // (2 * T + 4 * H)) * (2 * T + 4 * H)
    in_head = {} if whole or qlora_rank else {live_bytes.HEAD: block, live_bytes.REST: 6 * row}
    in_update = {}
    if (
        savings.optimizer == "adamw"
    ):  # its step takes four fp32 copies of one parameter, of which the largest is the head
        in_update = {live_bytes.GRADIENTS: gradients, live_bytes.REST: 0 if qlora_rank else 16 * V * H}
    worst = max(at_loss, in_layer, in_head, in_update, key=lambda owners: sum(owners.values()))
    return {live_bytes.WEIGHTS: weights, live_bytes.OPTIMIZER: states} | worst
