"""A frozen dataclass of settings becomes a command line: every field is a flag, and the comment behind it is
its help.

    python recipe.py --row_tokens 4096 --model tiny        values
    python recipe.py --smoke --epochs 2                    --smoke first, then your own flags
    python recipe.py --no_recompute                        switches off what is on

A recipe's Config extends the dataclasses that it passes on, so that a setting, its default and its help stand
in one place: `class Config(Settings, Savings)`, and later part_of(config, Savings).

Settings are text, numbers and switches. Anything richer belongs in a script that calls the recipe's
main(Config(...)).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import sys
import textwrap
import typing
from collections.abc import Sequence
from typing import TypeVar

Config = TypeVar("Config")


def field_comments(config_class: type) -> dict[str, str]:
    """Return the comment behind each field, of the class and of the classes that it extends.

    A field may take several lines, as when the formatter has put its value in parentheses.
    """
    comments: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(base):
            source = textwrap.dedent(inspect.getsource(base))
            for node in ast.parse(source).body[0].body:
                if isinstance(node, ast.AnnAssign):
                    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
                    behind = [line.split("  # ", 1)[1] for line in lines if "  # " in line]
                    comments |= {node.target.id: behind[0]} if behind else {}
    return comments


def ordered_fields(config_class: type) -> list[dataclasses.Field]:
    """Return the fields: the class's own first, then those of the classes that it extends, in their order."""
    declared = [inspect.get_annotations(base) for base in config_class.__mro__]
    return sorted(
        dataclasses.fields(config_class),
        key=lambda field: next(i for i, names in enumerate(declared) if field.name in names),
    )


def part_of(config, kind: type[Config]) -> Config:
    """Return the part of a config that is a `kind`, one of the classes that it extends."""
    return kind(**{field.name: getattr(config, field.name) for field in dataclasses.fields(kind)})


def parse(
    config_class: type[Config],
    argv: Sequence[str] | None = None,
    *,
    smoke: dict | None = None,
    quick: dict | None = None,
    presets: dict[str, dict] | None = None,
) -> Config:
    """Read settings from the command line (argv without the program's name; None = sys.argv).

    smoke, quick: what --smoke and --quick set before the other flags are applied; each needs a bool field of
    that name. presets: what --preset NAME sets, before those two; needs a text field `preset`. Exits with
    status 2 and one line for an unknown flag (naming the nearest), a missing value or a value of the wrong
    type. --help lists all flags.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    types = typing.get_type_hints(config_class)
    comments = field_comments(config_class)
    parser = argparse.ArgumentParser(
        description=sys.modules[config_class.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for field in ordered_fields(config_class):
        name, kind = field.name, types[field.name]
        flag = "--" + name.rstrip("_")  # `as_` is the flag --as, since `as` is a keyword of Python
        text = f"{comments.get(name, '')} (default {field.default!r})".strip().replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, dest=name, action="store_true", default=None, help=text)
            off = {"action": "store_false", "default": None, "help": argparse.SUPPRESS}
            parser.add_argument(f"--no_{name}", dest=name, **off)
        elif kind in (int, float, str):
            parser.add_argument(flag, dest=name, type=kind, metavar=kind.__name__, help=text)
        else:
            raise TypeError(
                f"{config_class.__name__}.{name} is a {kind}; a flag is a bool, int, float or str"
            )

    known = [option for action in parser._actions for option in action.option_strings]
    for word in argv:
        flag = word.split("=")[0]
        if flag.startswith("--") and flag not in known:
            near = difflib.get_close_matches(flag.replace("-", "_").replace("__", "--", 1), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
            parser.exit(2, f"error: there is no {flag}; {hint}\n")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}

    presets = presets or {}
    preset = given.get("preset")
    if preset is not None and preset not in presets:
        names = ", ".join(presets) or "none"
        parser.exit(2, f"error: there is no preset {preset!r}; the presets are {names}\n")
    base = presets[preset] if preset else {}
    for name, settings in (("quick", quick), ("smoke", smoke)):
        if settings and given.get(name):
            base = base | settings
    return config_class(**{**base, **given})


def as_flags(settings: dict) -> str:
    """Write settings as they are typed on the command line."""
    return " ".join(
        f"--{'' if value else 'no_'}{name}" if isinstance(value, bool) else f"--{name} {value}"
        for name, value in settings.items()
    )


def show(config) -> str:
    """List the settings that differ from the defaults of their class, one per line."""
    pairs = ((field, getattr(config, field.name)) for field in ordered_fields(type(config)))
    changed = {field.name: value for field, value in pairs if value != field.default}
    if not changed:
        return "all settings are the defaults"
    width = max(map(len, changed))
    lines = [f"  {name:<{width}}  {value!r}" for name, value in changed.items()]
    return "\n".join(["settings that differ from the defaults", *lines])
