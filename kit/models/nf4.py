"""Linear layers whose frozen weight is kept in NF4 with double quantisation (Dettmers et al., QLoRA, 2023).

    W[i] = NF4_TABLE[code[i]] * scale[i // 64]
    scale[b] = BYTE_TABLE[byte[b]] * scale_of_scales[b // 256] + offset

Blocks of 64 weights, in memory order, share a scale; blocks of 256 scales share an fp32 scale of their own,
and an offset makes them symmetric. That is 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits per weight, and 1 KiB
per layer for the table of bytes. Codes, tables and kernels are bitsandbytes'. The layer around them is ours,
because bitsandbytes' own (0.50.2) has three faults:

1. It cannot be built on fake tensors, on which memory is planned.
2. On a CPU with AVX-512 it misplaces the scales of a matrix whose rows are no multiple of 64.
3. On a CPU with bf16 instructions its first forward in eval mode repacks the weight for good: the scales are
   rounded to bf16, and training is no longer possible.
"""

from __future__ import annotations

import math

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUANT_TYPE = "nf4"
BLOCK = 64  # weights per scale, as in the paper
SCALE_BLOCK = 256  # scales per scale of scales; bitsandbytes' gemm_4bit supports no other value
# up to this many rows, gemm_4bit may multiply without writing the weight out; above, it dequantises as we do
FUSED_ROWS = 1536


class NF4Linear(nn.Linear):
    """A frozen linear layer in NF4: x (..., in_features) -> (..., out_features), in its original dtype.

    Like bitsandbytes' own layer it is an nn.Linear, so that peft wraps it like any other. Do not cast it with
    `.to(dtype)`: its scales are fp32. The backward pass dequantises again to compute the gradient of x, so no
    full-size weight is kept between the passes.
    """

    def __init__(self, linear: nn.Linear, device: torch.device | str | None = None):
        """Allocate a layer like `linear`, in shape and dtype, without filling it. device: None = its own."""
        nn.Module.__init__(self)  # nn.Linear's own would allocate the full weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = linear.weight.dtype  # peft gives an adapter the dtype it finds under this name
        device = device or linear.weight.device

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        num_weights = linear.weight.numel()
        num_scales = math.ceil(num_weights / BLOCK)
        packed = empty(math.ceil(num_weights / 2), 1, dtype=torch.uint8)  # two weights per byte
        self.weight = nn.Parameter(packed, requires_grad=False)
        bias = None if linear.bias is None else empty(self.out_features, dtype=self.compute_dtype)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("scale_bytes", empty(num_scales, dtype=torch.uint8))
        num_blocks = math.ceil(num_scales / SCALE_BLOCK)
        self.register_buffer("scale_scales", empty(num_blocks, dtype=torch.float32))
        self.register_buffer("scale_table", empty(256, dtype=torch.float32))
        self.register_buffer("scale_offset", empty(dtype=torch.float32))

    @classmethod
    @torch.no_grad()
    def quantise(cls, linear: nn.Linear, device: torch.device | str) -> NF4Linear:
        """Quantise `linear` to NF4 on `device`, which holds its full weight meanwhile."""
        layer = cls(linear, device)
        weight = linear.weight.to(device)
        packed, state = bnb.quantize_4bit(
            weight, blocksize=BLOCK, quant_type=QUANT_TYPE, compress_statistics=True
        )
        layer.weight.copy_(packed)
        layer.scale_bytes.copy_(state.absmax)
        layer.scale_scales.copy_(state.state2.absmax)
        layer.scale_table.copy_(state.state2.code)
        layer.scale_offset.copy_(state.offset)
        if linear.bias is not None:
            layer.bias.copy_(linear.bias)
        return layer

    def dequantise(self) -> Tensor:
        """Return the weight, (out_features, in_features), in compute_dtype."""
        scales = torch.ops.bitsandbytes.dequantize_blockwise(
            self.scale_bytes, self.scale_scales, self.scale_table, SCALE_BLOCK, torch.float32
        )
        scales += self.scale_offset
        # as one row: blocks continue from row to row, which the CPU kernel ignores
        shape = [self.in_features * self.out_features]
        flat = torch.ops.bitsandbytes.dequantize_4bit(
            self.weight, scales, BLOCK, QUANT_TYPE, shape, self.compute_dtype
        )
        return flat.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        few_rows = x.numel() <= FUSED_ROWS * self.in_features
        if not wants_gradient and few_rows and self.in_features % BLOCK == 0:
            shape = [self.out_features, self.in_features]
            scales = (self.scale_bytes, self.scale_table, self.scale_offset)
            return torch.ops.bitsandbytes.gemm_4bit(
                x, self.weight, shape, self.scale_scales, BLOCK, QUANT_TYPE, self.bias, *scales
            )
        return _DequantisedMatmul.apply(x, self)


class _DequantisedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantise(), layer.bias)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        return d_out @ ctx.layer.dequantise() if ctx.needs_input_grad[0] else None, None


def quantise_decoder(model: nn.Module, device: torch.device | str) -> None:
    """Move a model to `device`, with all linear layers of its decoder in NF4; all else keeps its dtype.

    This happens layer by layer: the device never holds more than one full weight.
    """
    for parent, name in _decoder_linears(model):
        setattr(parent, name, NF4Linear.quantise(getattr(parent, name), device))
    model.to(device)


def simulate_quantised_decoder(model: nn.Module) -> None:
    """Do what quantise_decoder does, to a model on fake tensors, which cannot be read: layers stay empty."""
    for parent, name in _decoder_linears(model):
        setattr(parent, name, NF4Linear(getattr(parent, name)))


def _decoder_linears(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return (parent, attribute name) of each; the layers themselves would be kept in memory by the list.

    The head is not among them: it is outside model.model.
    """
    children = ((parent, *child) for parent in model.model.modules() for child in parent.named_children())
    return [(parent, name) for parent, name, child in children if type(child) is nn.Linear]
