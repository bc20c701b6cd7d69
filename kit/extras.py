"""Packages that only some features need (the extra `train` of setup.py), and how to install them."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec


def require(what: str, *packages: str) -> None:
    """Raise ValueError with the command that installs what is missing of the packages that `what` needs.

    packages: as they are imported. A folder of that name in the working directory is not the package.
    """
    missing = [name for name in packages if not ((found := find_spec(name)) and found.origin)]
    if missing:
        names = " and ".join(missing)
        be = "is" if len(missing) == 1 else "are"
        command = " ".join([f"{sys.executable} -m pip install", *map(_requirement, missing)])
        raise ValueError(
            f"{what} needs {names}, which {be} not installed; run {command} or pip install -e '.[train]' in "
            "the kit's checkout, which brings all that training needs"
        )


def require_for_adapters(*, nf4: bool) -> None:
    """Raise ValueError as `require` does. nf4: for adapters on weights in NF4, which need bitsandbytes."""
    require(*(("qlora_rank", "bitsandbytes", "peft") if nf4 else ("lora_rank", "peft")))


def _requirement(package: str) -> str:
    """Return what pip installs, in quotes: the kit's own range of versions if the kit was installed."""
    name = "triton-windows" if (package, sys.platform) == ("triton", "win32") else package
    try:
        lines = requires("through-the-valley-kit") or []
    except PackageNotFoundError:  # a checkout on the path
        lines = []
    found = (line.split(";")[0].strip() for line in lines)
    return f'"{next((line for line in found if re.match(rf"{name}[<>=!~]", line)), name)}"'
