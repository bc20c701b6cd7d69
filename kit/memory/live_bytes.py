"""Every live byte of a training step and its owner: the same count for a real step and for one on fake tensors.

Bytes are those of storages, each rounded up as torch's CUDA allocator rounds it, from the operator that made
it until the last tensor on it is gone. Memory made by kit.train.offload is the CPU's and counts apart. What
an operator needs inside itself (a library's workspace) is not seen; our kernels need none that matters.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """The with-block: how many bytes of storage live that operators made inside it, now and at most. Run the real function on
    fake tensors (torch's FakeTensorMode) and it tells the memory of shapes that fit no machine."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.live: dict[int, int] = {}  # storage -> bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (
            func.namespace == "prim"
        ):  # questions, such as which device: more than half of all calls on fake tensors
            return func(*args, **(kwargs or {}))
        given = set(_storages((*args, *(kwargs or {}).values())))
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                key = x.untyped_storage()._cdata
                if key not in self.live and key not in given:
                    self.made(func, x)
        return out

    def made(self, func, x: Tensor) -> None:
        """An operator returned a storage that is neither its argument's nor known."""
        storage = x.untyped_storage()
        self.live[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, key: int) -> None:
        self.now -= self.live.pop(key)


def _storages(arguments: Iterable) -> Iterator[int]:
    """Of an operator's tensors, which stand alone or in lists; pytree, which knows more, takes longer than the operator."""
    for x in arguments:
        if isinstance(x, Tensor):
            yield x.untyped_storage()._cdata
        elif isinstance(x, (list, tuple)):
            yield from _storages(x)


ROUNDING = 512  # bytes: the CUDA allocator's smallest unit
HOST = "CPU memory"
WEIGHTS, OPTIMIZER, GRADIENTS = "weights", "optimizer", "gradients"
INPUTS, LAYER, HEAD, LOGITS, REST = (
    "layer inputs",
    "one layer",
    "head gradient",
    "logits chunk",
    "rows of the loss",
)


class Ledger(LiveBytes):
    """The with-block. `peak`, `owners` and `when` tell the worst moment; `host_peak` is the CPU's."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.V, self.H = model.get_output_embeddings().weight.shape
        self.owner_of: dict[int, str] = {}  # storage -> owner
        self.totals: Counter[str] = Counter()
        self.host_peak = 0
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
            self.totals[self.owner_of[key]] -= self.live[key]
            self.totals[owner] += self.live[key]
            self.owner_of[key] = owner
            return
        num_bytes = -(-storage.nbytes() // ROUNDING) * ROUNDING
        self.live[key], self.owner_of[key] = num_bytes, owner
        self.totals[owner] += num_bytes
        if owner == HOST:
            self.host_peak = max(self.host_peak, self.totals[HOST])
        else:
            self.now += num_bytes
            if self.now > self.peak:
                self.peak, self.when, self.owners = self.now, self.phase, dict(self.totals)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        num_bytes, owner = self.live.pop(key), self.owner_of.pop(key)
        self.totals[owner] -= num_bytes
        self.now -= num_bytes * (owner != HOST)

    def made(self, func, x: torch.Tensor) -> None:
        """The owner shows in what only the head has: a matrix of V columns is a chunk of logits, one of at least V / 2 rows of H
        its gradient."""
        owner = self.owner
        if func._schema.name == "kit::host_empty":
            owner = HOST
        elif x.dim() == 2 and x.shape[1] == self.V:
            owner = LOGITS
        elif x.dim() == 2 and x.shape[1] == self.H and x.shape[0] >= self.V // 2:
            owner = HEAD
        self.enter(x, owner)

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
                lambda *_, i=i: at(
                    f"{'forward' if self.phase.startswith('forward') else 'backward'}, layer {i + 1}", LAYER
                )
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
