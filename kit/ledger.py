"""Every live byte of a training step and its owner: the same count for a real step and for one on fake tensors.

Bytes are those of storages, each rounded up as torch's CUDA allocator rounds it, from the operator that made it until the last
tensor on it is gone. Memory made by kit.host is the CPU's and counts apart. What an operator needs inside itself (a library's
workspace) is not seen; our kernels need none that matters.
"""

from __future__ import annotations

import weakref
from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUNDING = 512  # bytes: the CUDA allocator's smallest unit
HOST = "CPU memory"
WEIGHTS, OPTIMIZER, GRADIENTS = "weights", "optimizer", "gradients"
INPUTS, LAYER, HEAD, LOGITS, REST = "layer inputs", "one layer", "head gradient", "logits chunk", "rows of the loss"


class Ledger(TorchDispatchMode):
    """The with-block. `peak`, `owners` and `when` tell the worst moment; `host_peak` is the CPU's."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.V, self.H = model.get_output_embeddings().weight.shape
        self.live: dict[int, tuple[int, str]] = {}  # storage -> bytes, owner
        self.totals: Counter[str] = Counter()
        self.now = self.peak = self.host_peak = 0
        self.owners: dict[str, int] = {}
        self.when = ""
        self.phase, self.owner = "before", REST
        for parameter in model.parameters():
            self.enter(parameter, WEIGHTS)
        for buffer in model.buffers():
            self.enter(buffer, WEIGHTS)
        self.hooks = list(self._watch(model))

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def enter(self, tensor: torch.Tensor, owner: str) -> None:
        """Count a tensor made before the block, or give one that was counted another owner."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            num_bytes, before = self.live[key]
            self.totals[before] -= num_bytes
            self.totals[owner] += num_bytes
            self.live[key] = num_bytes, owner
            return
        num_bytes = -(-storage.nbytes() // ROUNDING) * ROUNDING
        self.live[key] = num_bytes, owner
        self.totals[owner] += num_bytes
        if owner == HOST:
            self.host_peak = max(self.host_peak, self.totals[HOST])
        else:
            self.now += num_bytes
            if self.now > self.peak:
                self.peak, self.when, self.owners = self.now, self.phase, dict(self.totals)
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        num_bytes, owner = self.live.pop(key)
        self.totals[owner] -= num_bytes
        self.now -= num_bytes * (owner != HOST)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.live:
                self.enter(x, HOST if func._schema.name == "kit::host_empty" else self._owner_of(x))
        return out

    def _owner_of(self, x: torch.Tensor) -> str:
        """By what only the head has: a matrix of V columns is a chunk of logits; V / 2 rows of H or more, its gradient."""
        if x.dim() == 2 and x.shape[1] == self.V:
            return LOGITS
        if self.phase != "forward" and x.numel() >= self.V * self.H // 2:
            return HEAD
        return self.owner

    def _watch(self, model: nn.Module):
        """Hooks that tell where the step is."""
        layers, norm = model.model.layers, model.model.norm

        def at(phase: str, owner: str) -> None:
            self.phase, self.owner = phase, owner

        yield model.model.register_forward_pre_hook(lambda *_: at("forward", INPUTS))
        yield norm.register_forward_hook(lambda *_: at("loss", REST))
        for i, layer in enumerate(layers):
            # the feed-forward's norms and tiles belong to the layer whose attention ran last
            yield layer.self_attn.register_forward_pre_hook(
                lambda *_, i=i: at(f"{'forward' if self.phase.startswith('forward') else 'backward'}, layer {i + 1}", LAYER)
            )
            yield layer.register_forward_hook(lambda module, args, out: self._layer_done(out))
        for parameter in model.parameters():
            if parameter.requires_grad:
                yield parameter.register_post_accumulate_grad_hook(self._gradient_arrived)

    def _layer_done(self, out: torch.Tensor) -> None:
        self.enter(out, INPUTS)
        self.phase, self.owner = "forward", INPUTS

    def _gradient_arrived(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None and parameter.grad.untyped_storage()._cdata in self.live:
            self.enter(parameter.grad, GRADIENTS)
