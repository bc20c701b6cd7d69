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
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

from kit.command_line import shell_word, started_as
from kit.run import recipe_name, stored_settings

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Flag:
    """A setting as a flag of the command line."""

    name: str  # of the field
    group: str  # the comment above a block of fields
    text: str  # the comment behind the field
    default: object

    @property
    def word(self) -> str:
        """The flag as it is typed: `as_` is --as, since `as` is a keyword of Python."""
        return "--" + self.name.rstrip("_")


def flags_of(config_class: type) -> list[Flag]:
    """Return a Config's flags: the class's own first, then those of the classes that it extends.

    A field may take several lines, as when the formatter has put its value in parentheses.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    found: dict[str, Flag] = {}
    for base in filter(dataclasses.is_dataclass, config_class.__mro__):
        lines = textwrap.dedent(inspect.getsource(base)).splitlines()
        for node in ast.parse("\n".join(lines)).body[0].body:
            if isinstance(node, ast.AnnAssign) and node.target.id in defaults:
                above = (line.strip() for line in reversed(lines[: node.lineno - 1]))
                group = next((line[2:] for line in above if line.startswith("# ")), "")
                own = [line for line in lines[node.lineno - 1 : node.end_lineno] if "  # " in line]
                text = own[0].split("  # ", 1)[1] if own else ""
                found.setdefault(node.target.id, Flag(node.target.id, group, text, defaults[node.target.id]))
    return list(found.values())


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
    that name. presets: what --preset NAME sets, before those two; needs a text field `preset`.

    With --resume, the settings are those of the run in --out, or of the newest one, before the other flags
    are applied. Exits with status 2 and one line for an unknown flag (naming the nearest), a missing value or
    a value of the wrong type. --help shows the usual flags, and --help all shows every one. Raises ValueError
    if there is no run to resume.
    """
    argv, presets = list(sys.argv[1:] if argv is None else argv), presets or {}
    flags, types = flags_of(config_class), typing.get_type_hints(config_class)
    everything = any(pair in (("--help", "all"), ("-h", "all")) for pair in pairwise(argv))
    parser = _parser(config_class, flags, types, presets, everything=everything)
    if everything:
        argv.remove("all")

    known = [option for action in parser._actions for option in action.option_strings]
    for word in argv:
        typed = word.split("=")[0]
        if typed.startswith("--") and typed not in known:
            near = difflib.get_close_matches(typed.replace("-", "_").replace("__", "--", 1), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help all lists the flags"
            parser.exit(2, f"error: there is no {typed}; {hint}\n")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}

    preset = given.get("preset")
    if preset is not None and preset not in presets:
        names = ", ".join(presets) or "none"
        parser.exit(2, f"error: there is no preset {preset!r}; the presets are {names}\n")
    base = presets[preset] if preset else {}
    for name, settings in (("quick", quick), ("smoke", smoke)):
        if settings and given.get(name):
            base = base | settings
    if given.get("resume"):
        folder, stored = stored_settings(recipe_name(config_class), given.get("out", ""))
        base = base | {flag.name: stored[flag.name] for flag in flags if flag.name in stored}
        given["out"] = str(folder)
    return config_class(**{**base, **given})


# Flags that most people need: --help shows the first MOST_SHOWN that a recipe has
USUAL = (
    "preset", "model", "models", "traces", "num_traces", "arms", "sizes", "prompts", "only", "gpu_gb", "plan",
    "quick", "smoke", "resume", "benchmarks", "compare", "out",
)  # fmt: skip
MOST_SHOWN = 8


def _parser(
    config_class: type, flags: Sequence[Flag], types: dict, presets: Iterable[str], *, everything: bool
) -> argparse.ArgumentParser:
    """Return a parser of all flags. everything: its help lists all of them, in groups."""
    by_name = {flag.name: flag for flag in flags}
    usual = [by_name[name] for name in USUAL if name in by_name][:MOST_SHOWN]
    shown = flags if everything or len(flags) <= MOST_SHOWN else usual
    more = f"; --help all lists {len(flags)}" if len(shown) < len(flags) else ""
    about, script = sys.modules[config_class.__module__].__doc__ or "", recipe_name(config_class)
    parser = argparse.ArgumentParser(
        prog=started_as(),
        usage=f"%(prog)s [flags]{more}; --traceback shows where an error comes from",
        description=about.replace(f"python recipes/{script}.py", started_as()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in [*shown, *(flag for flag in flags if flag not in shown)]:
        kind = types[flag.name]
        default = f" (default {flag.default!r})" if flag.default not in ("", False) else ""
        text = f"{flag.text}{default}".strip().replace("%", "%%")
        if flag.name == "preset":
            text += f"; one of {', '.join(presets)}"
        title = (flag.group or "settings") if everything else "usual flags"
        group = groups.setdefault(title, parser.add_argument_group(title))
        options = {"dest": flag.name, "default": None, "help": text if flag in shown else argparse.SUPPRESS}
        if kind is bool:
            group.add_argument(flag.word, action="store_true", **options)
            options["help"] = argparse.SUPPRESS
            group.add_argument(f"--no_{flag.name}", action="store_false", **options)
        elif kind in (int, float, str):
            group.add_argument(flag.word, type=kind, metavar=kind.__name__, **options)
        else:
            raise TypeError(
                f"{config_class.__name__}.{flag.name} is a {kind}; a flag is a bool, int, float or str"
            )
    return parser


def as_flags(settings: dict) -> str:
    """Write settings as they are typed on the command line."""
    return " ".join(
        f"--{'' if value else 'no_'}{name}" if isinstance(value, bool) else f"--{name} {value}"
        for name, value in settings.items()
    )


def full_command(config, program: str, *, smoke: dict | None = None, presets: dict | None = None) -> str:
    """Write the command that gives this config, for a shell. smoke, presets: as for `parse`."""
    base = (presets or {}).get(getattr(config, "preset", ""), {})
    base = base | smoke if smoke and config.smoke else base
    words, without = [program], type(config)(**base)
    for flag in flags_of(type(config)):
        value = getattr(config, flag.name)
        if value != getattr(without, flag.name):
            text = str(value)
            joined = "=" if text.startswith("-") or not text else " "  # or another word would be read
            typed = flag.word + joined + (shell_word(text) if text else "")
            words.append(as_flags({flag.name: value}) if isinstance(value, bool) else typed)
    return " ".join(words)


def show(config) -> str:
    """List the settings that differ from the defaults of their class, one per line."""
    values = {flag.name: (getattr(config, flag.name), flag.default) for flag in flags_of(type(config))}
    changed = {name: value for name, (value, default) in values.items() if value != default}
    if not changed:
        return "all settings are the defaults"
    width = max(map(len, changed))
    lines = [f"  {name:<{width}}  {value!r}" for name, value in changed.items()]
    return "\n".join(["settings that differ from the defaults", *lines])
