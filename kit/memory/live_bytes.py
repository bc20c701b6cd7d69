"""Count every live byte of a training step and its owner, in the same way for a real step and for one on fake
tensors.

Bytes are those of storages, rounded up as torch's CUDA allocator rounds them. A storage counts from the
operator that creates it until the last tensor on it is gone. Memory created by kit.train.offload is the CPU's
and counts apart. What an operator needs inside itself (a library's workspace) is not seen; our kernels need
none that matters.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kit.models.families import OTHER, family_of
from kit.models.layers import layer_of, norm_of


class LiveBytes(TorchDispatchMode):
    """A with-block that counts the bytes of storages created inside it: now alive, and at most.

    Run a function on fake tensors (torch's FakeTensorMode) in it to measure shapes that fit no machine.
    rounding: bytes; a storage counts as a multiple of this.
    """

    def __init__(self, rounding: int = 1):
        super().__init__()
        self.rounding = rounding
        self.now = self.peak = 0
        self.live: dict[int, int] = {}  # storage -> bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # questions such as the device: more than half of all calls on fake tensors
        if func.namespace == "prim":
            return func(*args, **kwargs)

        given = set(_storages((*args, *kwargs.values())))
        out = func(*args, **kwargs)
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                key = x.untyped_storage()._cdata
                if key not in self.live and key not in given:
                    self.created(func, x)
        return out

    def created(self, func, x: Tensor) -> None:
        """Count a storage that an operator returned and that is neither its argument's nor known."""
        self.now += self.follow(x)
        self.peak = max(self.peak, self.now)

    def follow(self, x: Tensor) -> int:
        """Enter a new storage among the live ones, until it is freed. Return its bytes."""
        storage = x.untyped_storage()
        num_bytes = -(-storage.nbytes() // self.rounding) * self.rounding
        self.live[storage._cdata] = num_bytes
        weakref.finalize(storage, self.freed, storage._cdata)
        return num_bytes

    def freed(self, key: int) -> None:
        self.now -= self.live.pop(key)


def _storages(arguments: Iterable) -> Iterator[int]:
    """Yield the storages of an operator's tensors, alone or in lists; pytree is slower than they are."""
    for x in arguments:
        if isinstance(x, Tensor):
            yield x.untyped_storage()._cdata
        elif isinstance(x, (list, tuple)):
            yield from _storages(x)


ROUNDING = 512  # bytes: the CUDA allocator's smallest unit
HOST = "CPU memory"
WEIGHTS, OPTIMIZER, GRADIENTS, REFERENCE = "weights", "optimizer", "gradients", "reference"
INPUTS, LAYER, HEAD = "layer inputs", "one layer", "head gradient"
LOGITS, REST = "logits chunk", "rows of the loss"


class Ledger(LiveBytes):
    """A with-block that also knows who owns the bytes.

    peak, owners and when describe the worst moment on the card; host_peak is the most in CPU memory.
    """

    def __init__(self, model: nn.Module):
        super().__init__(ROUNDING)
        self.V, self.H = model.get_output_embeddings().weight.shape
        self.owner_of: dict[int, str] = {}  # storage -> owner
        self.totals: Counter[str] = Counter()  # owner -> bytes now
        self.owners: dict[str, int] = {}  # owner -> bytes at the peak
        self.when = ""
        self.host_peak = 0
        self.phase, self.owner = "before", REST
        for tensor in (*model.parameters(), *model.buffers()):
            self.enter(tensor, WEIGHTS)
        self.hooks = list(self._watch(model))

    def close(self) -> None:
        """Remove the hooks from the model."""
        for hook in self.hooks:
            hook.remove()

    def enter(self, tensor: Tensor, owner: str) -> None:
        """Count a tensor that was created before the block, or give a counted one another owner."""
        key = tensor.untyped_storage()._cdata
        if key in self.live:
            self.totals[self.owner_of[key]] -= self.live[key]
        else:
            self.follow(tensor)
        self.owner_of[key] = owner
        self.totals[owner] += self.live[key]
        self.host_peak = max(self.host_peak, self.totals[HOST])
        self.now = self.totals.total() - self.totals[HOST]
        if self.now > self.peak:
            self.peak, self.when, self.owners = self.now, self.phase, dict(self.totals)

    def freed(self, key: int) -> None:
        self.totals[self.owner_of.pop(key)] -= self.live.pop(key)
        self.now = self.totals.total() - self.totals[HOST]

    def created(self, func, x: Tensor) -> None:
        """Count a new storage under its owner.

        Two shapes tell the owner, as only the head has them: a matrix of V columns is a chunk of logits, and
        one of H columns and at least V / 2 rows is the head's gradient. Otherwise the moment decides.
        """
        owner = self.owner
        if func._schema.name == "kit::host_empty":
            owner = HOST
        elif x.dim() == 2 and x.shape[1] == self.V:
            owner = LOGITS
        elif x.dim() == 2 and x.shape[1] == self.H and x.shape[0] >= self.V // 2:
            owner = HEAD
        self.enter(x, owner)

    def _watch(self, model: nn.Module):
        """Yield hooks that follow where the step is."""
        backbone, family = model.model, family_of(model.config)
        norm = backbone.norm if family is OTHER else norm_of(backbone.norm, family)
        for first in (backbone.embed_tokens, backbone.rotary_emb):  # a blocked head looks rows up by itself
            yield first.register_forward_pre_hook(lambda *_: self._at("forward", INPUTS))
        yield norm.register_forward_hook(lambda *_: self._at("loss", REST))

        # norms and feed-forward belong to the attention before them
        for i, layer in enumerate(backbone.layers, start=1):
            ours = layer if family is OTHER else layer_of(layer)
            attention = layer.self_attn if family is OTHER else ours.attention
            yield attention.register_forward_pre_hook(lambda *_, i=i: self._in_layer(i))
            for called in {layer, ours}:  # with recompute, and without
                yield called.register_forward_hook(lambda module, args, out: self._layer_done(out))

        for parameter in model.parameters():
            if parameter.requires_grad:
                yield parameter.register_post_accumulate_grad_hook(self._gradient_arrived)

    def _at(self, phase: str, owner: str) -> None:
        self.phase, self.owner = phase, owner

    def _in_layer(self, i: int) -> None:
        # in the backward pass too: it recomputes the layer
        direction = "forward" if self.phase.startswith("forward") else "backward"
        self._at(f"{direction}, layer {i}", LAYER)

    def _layer_done(self, out: Tensor) -> None:
        self.enter(out, INPUTS)
        self._at("forward", INPUTS)

    def _gradient_arrived(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None and parameter.grad.untyped_storage()._cdata in self.live:
            self.enter(parameter.grad, GRADIENTS)
