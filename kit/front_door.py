"""A package's front door: it offers the names of its files and imports a file when one of them is first used.

So `import kit.models` takes no time, and only a name that needs seconds of imports costs them. The files
themselves are reached the same way: `memory.hours` imports kit/memory/hours.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec


def hand_on(package: str, files: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], object], list[str]]:
    """Return a package's __getattr__ and __all__.

    files: file of the package, without .py -> its names. A name must not be that of a file: once the file is
    imported, the import system puts the module in the name's place.
    """
    homes = {name: file for file, names in files.items() for name in names}

    def __getattr__(name: str) -> object:
        if name in homes:
            return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        if not name.startswith("_") and find_spec(f"{package}.{name}"):
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(
            f"module {package!r} has no attribute {name!r}; it hands on {', '.join(sorted(homes))}"
        )

    return __getattr__, sorted(homes)
