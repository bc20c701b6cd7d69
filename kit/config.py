"""A frozen dataclass of settings becomes a command line: every field is a flag, the comment on its line is its help.

    python recipe.py --row_tokens 4096 --model tiny        values
    python recipe.py --smoke --epochs 2                    --smoke first, then what you say
    python recipe.py --no_recompute                        switching off what is on

Settings are text, numbers and switches; anything richer belongs in a script that calls the recipe's main(Config(...)).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
import typing
from collections.abc import Sequence
from typing import TypeVar

Config = TypeVar("Config")


def field_comments(config_class: type) -> dict[str, str]:
    """The comment on each field's line, of the class and the classes it extends."""
    comments: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= dict(
                re.findall(r"^ +(\w+) *:[^#\n]*# *(.+)$", inspect.getsource(base), flags=re.MULTILINE)
            )
    return comments


def parse(
    config_class: type[Config], argv: Sequence[str] | None = None, *, smoke: dict | None = None,
    quick: dict | None = None, presets: dict[str, dict] | None = None,
) -> Config:  # fmt: skip
    """Settings from the command line (argv, without the program's name; None = sys.argv).

    smoke, quick: what `--smoke` and `--quick` set before the other flags are applied; each needs a bool field of its name.
    presets: what `--preset NAME` sets, before those two; needs a text field `preset`. Exits with status 2 and one line
    for an unknown flag (naming the nearest), a missing value or one of the wrong type; `--help` lists all flags.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    types = typing.get_type_hints(config_class)
    comments = field_comments(config_class)
    parser = argparse.ArgumentParser(
        description=sys.modules[config_class.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(config_class):
        flag = "--" + field.name.rstrip("_")  # `as_` is the flag --as, a keyword of Python
        default = f"(default {field.default!r})"
        text = f"{comments.get(field.name, '')} {default}".strip().replace("%", "%%")
        if types[field.name] is bool:
            parser.add_argument(flag, dest=field.name, action="store_true", default=None, help=text)
            parser.add_argument(
                f"--no_{field.name}",
                dest=field.name,
                action="store_false",
                default=None,
                help=argparse.SUPPRESS,
            )
        elif types[field.name] in (int, float, str):
            kind = types[field.name]
            parser.add_argument(flag, dest=field.name, type=kind, metavar=kind.__name__, help=text)
        else:
            raise TypeError(
                f"{config_class.__name__}.{field.name} is a {types[field.name]}; a flag is a bool, int, float or str"
            )
    known = [option for action in parser._actions for option in action.option_strings]
    for word in argv:
        flag = word.split("=")[0]
        if flag.startswith("--") and flag not in known:
            near = difflib.get_close_matches(flag.replace("-", "_").replace("__", "--", 1), known, n=1)
            parser.exit(
                2,
                f"error: there is no {flag}"
                + (f"; did you mean {near[0]}?" if near else "; --help lists the flags")
                + "\n",
            )
    said = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    preset = said.get("preset")
    if preset is not None and preset not in (presets or {}):
        parser.exit(
            2, f"error: there is no preset {preset!r}; the presets are {', '.join(presets or {}) or 'none'}\n"
        )
    base = presets[preset] if preset else {}
    for name, settings in (("quick", quick), ("smoke", smoke)):
        base = base | ((settings or {}) if said.get(name) else {})
    return config_class(**{**base, **said})


def as_flags(settings: dict) -> str:
    """Settings as they are typed on the command line."""
    return " ".join(
        f"--{'' if value else 'no_'}{name}" if isinstance(value, bool) else f"--{name} {value}"
        for name, value in settings.items()
    )


def show(config) -> str:
    """The settings, one a line, as a person would type them."""
    width = max(len(field.name) for field in dataclasses.fields(config))
    return "\n".join(
        f"  {field.name:<{width}}  {getattr(config, field.name)!r}" for field in dataclasses.fields(config)
    )
