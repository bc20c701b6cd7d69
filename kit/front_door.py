"""A package's front door: it hands on names, and imports the file of each when somebody first asks for it.

So `import kit.models` takes no time, and a name that needs seconds of imports costs them where it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence


def hand_on(package: str, files: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], object], list[str]]:
    """Return a package's __getattr__ and __all__. files: file of the package, without .py -> the names to hand on."""
    homes = {name: file for file, names in files.items() for name in names}

    def __getattr__(name: str) -> object:
        if name not in homes:
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}; it hands on {', '.join(sorted(homes))}"
            )
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return __getattr__, sorted(homes)
