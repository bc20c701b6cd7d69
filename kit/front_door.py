"""A package's front door: it offers the names of its files and imports a file when one of them is first used.

So `import kit.models` takes no time, and only a name that needs seconds of imports costs them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence


def hand_on(package: str, files: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], object], list[str]]:
    """Return a package's __getattr__ and __all__. files: file of the package, without .py -> its names."""
    homes = {name: file for file, names in files.items() for name in names}

    def __getattr__(name: str) -> object:
        if name not in homes:
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}; it hands on {', '.join(sorted(homes))}"
            )
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return __getattr__, sorted(homes)
