"""Whether a model's weights are as they should be: all there, of the right shape, finite, as before.

transformers fills a weight that its file lacks with random numbers, and torch computes with NaN as with any
number. Either way the model would still be trained or measured, and a figure would come out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

SHOWN = 3  # tensors that an error names
# bytes of a number -> type of its bits
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PIECE = 2**22  # numbers whose bits are multiplied at once, in 8 bytes each


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises ValueError, naming it, if it is damaged or cannot be read."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def check_loaded(found: Mapping[str, object], name: str) -> None:
    """Raise ValueError if transformers has not found all weights of a model in its files, or too many layers.

    found: the loading info of from_pretrained. What no layer uses, such as a value head, may be there.
    """
    faults = {
        "lacks": sorted(found["missing_keys"]),
        "has in another shape": sorted(key for key, *_ in found["mismatched_keys"]),
        "has besides": sorted(key for key in found["unexpected_keys"] if ".layers." in key),
    }
    if any(faults.values()):
        said = "; ".join(f"{what} {_few(keys)}" for what, keys in faults.items() if keys)
        raise ValueError(
            f"the weights of {name} are not those of the model that its config describes: its file {said}. "
            "Download the model again, or mend the file and config.json (names such as "
            "_orig_mod.model.layers.0 come from torch.compile: save the model that was compiled)"
        )


def check_same(
    stored: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    where: Path | str,
    *,
    remedy: str,
    dtypes: bool = True,
) -> None:
    """Raise ValueError unless stored tensors have the names and shapes of the wanted ones, and their dtypes.

    where: what they were read from. dtypes: False = the dtypes may differ.
    """
    lacks, besides = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if lacks or besides:
        raise ValueError(
            f"{where} is a checkpoint of another model: it lacks {_few(lacks)} and has {_few(besides)} "
            f"besides; {remedy}"
        )

    def kind(tensor: Tensor) -> str:
        return f"{tuple(tensor.shape)}" + (f" {tensor.dtype}" if dtypes else "")

    for name, tensor in wanted.items():
        if kind(stored[name]) != kind(tensor):
            raise ValueError(
                f"{where} is a checkpoint of another model: {name} is {kind(stored[name])} there and "
                f"{kind(tensor)} here; {remedy}"
            )


def check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """Raise ValueError naming the tensors with NaN or infinity. where: whose they are.

    On a card it waits once, not per tensor.
    """
    floating = {name: x for name, x in tensors.items() if x.is_floating_point() and x.numel()}
    if not floating:
        return
    bounds = torch.stack([torch.stack(x.detach().aminmax()).double() for x in floating.values()])
    finite = bounds.isfinite().all(1).tolist()
    if broken := [name for name, is_finite in zip(floating, finite, strict=True) if not is_finite]:
        raise ValueError(
            f"{where} holds NaN or infinity in {_few(broken)}: nothing that it computes has a meaning; "
            "download or train it again"
        )


def fingerprint(model: nn.Module) -> str:
    """Name a model's weights by their content: every tensor's name, shape and bits.

    So two checkpoints of one run have different names. The bits are added up as integers, each times an odd
    number for its place: unlike a sum of floats, the result is the same on any device.
    Raises ValueError as check_finite does.
    """
    tensors = model.state_dict()
    check_finite(tensors, "the model")
    state = hashlib.blake2b(digest_size=8)
    for name, tensor in tensors.items():
        bits = tensor.detach().reshape(-1).view(BITS[tensor.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=tensor.device)  # modulo 2^64
        for start in range(0, len(bits), PIECE):
            part = bits[start : start + PIECE]
            places = torch.arange(start, start + len(part), device=part.device)
            total += (part * (2 * places + 1)).sum()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {total.item()}".encode())
    return state.hexdigest()


def _few(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "nothing") + more
