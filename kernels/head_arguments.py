"""
What the functions of a linear head are given: checked, in one shape, and which rows count. Every error says what to pass instead.
"""

import torch
from torch import Tensor

IGNORE_INDEX = -100  # torch's default, and what every collator writes


def checked(hidden, weight, targets, softcap, temperature, max_rows=0) -> tuple[Tensor, Tensor, torch.dtype, list[float]]:
    """(hidden (N, H), targets (N,), compute dtype, [1 / temperature, softcap or 0]). Raises ValueError."""
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"weight is a {type(weight).__name__}, not a tensor: a module may add something to its weight (a LoRA adapter does), "
            "and this function would leave that out; keep adapters off the output head (peft: leave lm_head out of "
            "target_modules) or merge them, then pass module.weight"
        )
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; needed are (..., H) and (V, H): "
            "pass the head's weight as nn.Linear keeps it, not transposed"
        )
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden has positions {tuple(hidden.shape[:-1])} but targets has {tuple(targets.shape)}; "
            "shift both before the call: hidden[:, :-1] and targets[:, 1:], or targets padded with ignore_index at the end"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets is {targets.dtype} but class indices are needed; pass targets.long()")
    if not hidden.device == weight.device == targets.device:
        raise ValueError(
            f"hidden is on {hidden.device}, weight on {weight.device}, targets on {targets.device}; move them to one device"
        )
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; both must be floating point: a quantised head (4 or 8 bit) "
            "must be dequantised first, or better left out of quantisation"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap} but must be positive; pass None for no cap")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature} but must be positive; pass 1.0 for the model's own distribution")
    if max_rows < 0:
        raise ValueError(f"max_rows is {max_rows} but must be >= 0; pass 0 for as many rows of logits as half a GiB holds")
    dtype, device = hidden.dtype, hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif weight.dtype != dtype:
        raise ValueError(f"hidden is {dtype} but weight is {weight.dtype}; cast one, or call under torch.autocast({device!r})")
    return hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long(), dtype, [1 / temperature, softcap or 0.0]


@torch.library.custom_op("kit::kept_rows", mutates_args=())
def kept_rows(targets: Tensor, V: int, ignore_index: int) -> Tensor:
    """Indices of the targets that count. On a GPU this waits for the device: the number of matmul rows depends on it. Reading
    the range right after that wait costs microseconds, and an index past the end would make the kernels read foreign memory."""
    kept = (targets != ignore_index).nonzero()[:, 0]
    if len(kept):
        low, high = torch.stack(targets[kept].aminmax()).tolist()
        if low < 0 or high >= V:
            raise ValueError(
                f"targets reach from {low} to {high} but weight has {V} rows, ids 0 to {V - 1}, and ignore_index is "
                f"{ignore_index}; check that tokenizer and model belong together, or pass the targets' own ignore_index"
            )
    return kept


@kept_rows.register_fake
def _(targets, V, ignore_index):
    return torch.empty_like(targets)  # fake targets have no values: all are kept, so a memory plan is an upper bound
