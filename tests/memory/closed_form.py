"""A second opinion on the memory plan: what a training step holds, by a closed formula of the model's sizes.

The plan (kit.memory.simulate) simulates the step; the formula adds up what the simulation should find, at
each of the moments that can be the worst: the loss, one layer's backward pass, the blocks of the head. It
agrees within a tenth for all models whose configs ship with the kit.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from kit.kernels.linear_cross_entropy_blocks import BLOCK_BYTES
from kit.kernels.linear_cross_entropy_chunks import rows_per_chunk
from kit.memory import live_bytes
from kit.memory.flops import Sizes
from kit.train.optimizer import AdamW8bit
from kit.train.savings import Savings

STATES = 2 + 8 / 256  # bytes per trained weight: two 8-bit states and their scales
NF4 = 4.127 / 8  # bytes per weight, scales included


def formula(
    config: PreTrainedConfig, row_tokens: int, savings: Savings, qlora_rank: int = 0, *, rows: int = 1
) -> dict[str, int]:
    """Return owner -> bytes at the worst moment, for bf16 weights and 8-bit optimizer states.

    rows: rows of a step. From the second one on, the loss of a row finds the gradients of those before it.
    """
    T, sizes = row_tokens, Sizes.of(config)
    V, H, L, intermediate, q, kv = sizes.V, sizes.H, sizes.L, sizes.intermediate, sizes.q, sizes.kv
    trained, weights = sizes.weights, 2 * sizes.weights
    if qlora_rank:
        trained = sizes.adapters(qlora_rank)
        weights = round(NF4 * sizes.linears) + 2 * (sizes.weights - sizes.linears + trained)
    states = (STATES + 2 * savings.exact_weights) * trained
    if savings.offload_optimizer:
        states = 2 * (STATES + 2 * savings.exact_weights) * min(AdamW8bit.SLAB, V * H)
    gradients = 0 if savings.update_in_backward or savings.offload_gradients else 2 * trained

    row = T * H * 2  # bytes of one (T, H) in bf16
    whole_head = savings.head_update == "whole" and not qlora_rank
    inputs = row * (2 if savings.offload_inputs else L + 1)
    # inputs and results of two norms; q, k, v and out; the feed-forward's gate, up and product
    if not savings.recompute:
        inputs = L * T * 2 * (4 * H + 2 * (q + kv) + 3 * intermediate)

    chunk = rows_per_chunk(T, V, H, 2, savings.logit_rows) * 2 * (V + 3 * H)
    at_loss = {
        live_bytes.INPUTS: inputs,
        live_bytes.LOGITS: chunk,
        live_bytes.HEAD: 4 * V * H if whole_head else 0,
        live_bytes.REST: row,
        live_bytes.GRADIENTS: gradients if rows > 1 else 0,
    }

    head_gradient = 2 * V * H if whole_head and not savings.offload_gradients else 0
    one_layer = 2 * (trained if qlora_rank else sizes.linears) // L if savings.offload_gradients else 0
    in_layer = {
        live_bytes.INPUTS: inputs,
        live_bytes.LAYER: _layer(sizes, T, savings, qlora_rank),
        live_bytes.HEAD: head_gradient,
        live_bytes.GRADIENTS: gradients - head_gradient if gradients else one_layer,  # on its way
    }

    block = min(V, BLOCK_BYTES // (2 * T + 4 * H)) * (2 * T + 4 * H)
    in_head = {} if whole_head or qlora_rank else {live_bytes.HEAD: block, live_bytes.REST: 6 * row}

    worst = max(at_loss, in_layer, in_head, key=lambda owners: sum(owners.values()))
    return {live_bytes.WEIGHTS: weights, live_bytes.OPTIMIZER: round(states)} | worst


def _layer(sizes: Sizes, T: int, savings: Savings, qlora_rank: int) -> int:
    """Return the bytes of one layer's backward pass."""
    tile = min(savings.tile_tokens or T, T)
    # gate and up, whose gradients are written over them, the product and its gradient
    feed_forward = tile * 4 * sizes.intermediate * 2
    attention = T * 2 * (sizes.q + sizes.kv) * 2  # q, k, v and out
    if qlora_rank:
        weights = 2 * sizes.H * sizes.intermediate  # one weight, dequantised
    else:  # gradients; of tiles, sums in fp32 besides
        feed_forward_bytes = 6 if tile < T else 2
        weights = sizes.H * (4 * (sizes.q + sizes.kv) + 3 * sizes.intermediate * feed_forward_bytes)
    return feed_forward + attention + 2 * T * sizes.H * 2 + weights
