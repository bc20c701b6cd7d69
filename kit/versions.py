"""Which versions of its packages the kit was tested with, and a line for whoever has newer ones."""

from __future__ import annotations

import hashlib
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import kit

TESTED = {  # package -> the newest version that the tests have passed on; .ci/constraints.txt installs them
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "triton": "3.9.0",
    "safetensors": "0.8.0",
    "sympy": "1.14.0",
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "gguf": "0.19.0",
    "matplotlib": "3.11.2",
    "tqdm": "4.70.1",
}


def newer_than_tested() -> str:
    """Return a line that names the installed packages that are newer than tested; "" if none is.

    Only the first two numbers of a version count: the third is for repairs.
    """
    newer = []
    for package, tested in TESTED.items():
        try:
            installed = version(package)
        except PackageNotFoundError:  # of an extra
            continue
        if _first_two(installed) > _first_two(tested):
            newer.append(f"{package} {installed} ({tested})")
    return f"versions    newer than tested: {', '.join(newer)}" if newer else ""


def running() -> dict[str, str]:
    """Return what every rank of a run must have alike: versions, and a digest of the kit's own files."""
    files = sorted(file for folder in kit.__path__ for file in Path(folder, "kernels").glob("*.py"))
    files += sorted(Path(kit.__file__).parent.rglob("*.py"))
    content = hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=6).hexdigest()
    return {name: version(name) for name in ("torch", "transformers")} | {"the code of the kit": content}


def _first_two(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
