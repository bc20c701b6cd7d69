"""Linear layers whose frozen weight is kept in NF4 with double quantisation (Dettmers et al., QLoRA, 2023).

    W[i] = NF4_TABLE[code[i]] * scale[i // 64]            scale[b] = BYTE_TABLE[byte[b]] * scale_of_scales[b // 256] + offset

Blocks of 64 weights, in memory order, share a scale; blocks of 256 scales share an fp32 scale of their own, and an offset makes
them symmetric. 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight, and 1 KiB a layer for the table of bytes. Codes, tables and
kernels are bitsandbytes'; the layer that holds them is ours, because three things are wrong with bitsandbytes' own (0.50.2):
it cannot be built on fake tensors, on which memory is planned; on a CPU with AVX-512 it misplaces the scales of a matrix whose
rows are no multiple of 64; and on a CPU with bf16 instructions its first forward in eval mode repacks the weight for good, with
scales rounded to bf16 and no way back to training.
"""

from __future__ import annotations

import math

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUANT_TYPE = "nf4"
BLOCK = 64  # weights a scale, as in the paper
SCALE_BLOCK = 256  # scales a scale of scales: bitsandbytes' gemm_4bit knows no other
FUSED_ROWS = (
    1536  # up to here gemm_4bit may multiply without writing the weight out; above it dequantises as we do
)


class NF4Linear(nn.Linear):
    """A frozen linear layer in NF4: x (..., in_features) -> (..., out_features), in the dtype it was quantised from.

    It is an nn.Linear, as bitsandbytes' own layer is, so that peft wraps it like any other. Do not cast it with `.to(dtype)`:
    its scales are fp32. The backward pass gives x its gradient and dequantises again for it: nothing of the weight's full size
    is kept from one pass to the other.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device=None):
        """Memory for a layer with nothing in it, on fake tensors too; `quantise` fills one."""
        nn.Module.__init__(self)  # nn.Linear's own would make the full weight
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = dtype  # peft gives an adapter the dtype it finds under this name
        num_weights = in_features * out_features
        num_scales = math.ceil(num_weights / BLOCK)
        packed = torch.empty(
            math.ceil(num_weights / 2), 1, dtype=torch.uint8, device=device
        )  # two weights a byte
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)
            if bias
            else None
        )
        self.register_buffer("scale_bytes", torch.empty(num_scales, dtype=torch.uint8, device=device))
        self.register_buffer(
            "scale_scales",
            torch.empty(math.ceil(num_scales / SCALE_BLOCK), device=device, dtype=torch.float32),
        )
        self.register_buffer("scale_table", torch.empty(256, device=device, dtype=torch.float32))
        self.register_buffer("scale_offset", torch.empty((), device=device, dtype=torch.float32))

    @classmethod
    def like(cls, linear: nn.Linear, device: torch.device | str | None = None) -> NF4Linear:
        """A layer of the shape and dtype of `linear` with nothing in it. device: None = that of `linear`."""
        weight = linear.weight
        return cls(linear.in_features, linear.out_features, bias=linear.bias is not None, dtype=weight.dtype,
                   device=device or weight.device)  # fmt: skip

    @classmethod
    @torch.no_grad()
    def quantise(cls, linear: nn.Linear, device: torch.device | str) -> NF4Linear:
        """`linear` on `device` in NF4. It is rounded there: one full weight at a time is on the device."""
        layer = cls.like(linear, device)
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
        """The weight, (out_features, in_features), in compute_dtype."""
        scales = torch.ops.bitsandbytes.dequantize_blockwise(
            self.scale_bytes, self.scale_scales, self.scale_table, SCALE_BLOCK, torch.float32
        )
        scales += self.scale_offset
        shape = [
            self.in_features * self.out_features
        ]  # as one row: blocks run on from row to row, which the CPU kernel forgets
        flat = torch.ops.bitsandbytes.dequantize_4bit(
            self.weight, scales, BLOCK, QUANT_TYPE, shape, self.compute_dtype
        )
        return flat.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        if (
            not wants_gradient
            and self.in_features % BLOCK == 0
            and x.numel() <= FUSED_ROWS * self.in_features
        ):
            return torch.ops.bitsandbytes.gemm_4bit(
                x, self.weight, [self.out_features, self.in_features], self.scale_scales, BLOCK, QUANT_TYPE, self.bias,
                self.scale_bytes, self.scale_table, self.scale_offset,
            )  # fmt: skip
        return _DequantisedMatmul.apply(x, self)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class _DequantisedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantise(), layer.bias)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        return d_out @ ctx.layer.dequantise() if ctx.needs_input_grad[0] else None, None


def quantise_decoder(model: nn.Module, device: torch.device | str) -> None:
    """Move a model to `device` with every linear layer of its decoder in NF4; norms, embedding and head keep their dtype.

    Layer by layer: the device never holds more of the full weights than one layer's, and each is freed as it is replaced.
    """
    for parent, name in _decoder_linears(model):
        setattr(parent, name, NF4Linear.quantise(getattr(parent, name), device))
    model.to(device)


def simulate_quantised_decoder(model: nn.Module) -> None:
    """`quantise_decoder` for a model on fake tensors, whose weights cannot be read: the same layers with nothing in them."""
    for parent, name in _decoder_linears(model):
        setattr(parent, name, NF4Linear.like(getattr(parent, name)))


def _decoder_linears(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, attribute). The head is not in model.model; the layers themselves are not in the list, which would keep them."""
    decoder = model.model.modules()
    return [
        (parent, name)
        for parent in decoder
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
