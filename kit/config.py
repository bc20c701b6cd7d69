"""A frozen dataclass of settings becomes a command line: every field is a flag, and the comment behind it is
its help, with the values that are allowed in brackets (kit/ranges.py):

    lr: float = 5e-5  # peak learning rate [> 0, <= 1]

    python recipe.py --row_tokens 4096 --model tiny        values
    python recipe.py --smoke --epochs 2                    --smoke first, then your own flags
    python recipe.py --no_recompute                        switches off what is on

A recipe's Config extends the dataclasses that it passes on, so that a setting, its default and its help stand
in one place: `class Config(Settings, Savings)`, and later part_of(config, Savings).

A Config extends Checked, or a class that does: one with a value that is not allowed cannot be made, neither
from the command line nor with --resume nor in Python. Settings are text, numbers and switches. Anything
richer belongs in a script that calls the recipe's main(Config(...)).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import math
import re
import sys
import textwrap
import typing
from collections.abc import Sequence
from functools import cache, cached_property, partial
from itertools import pairwise
from numbers import Integral, Real
from typing import TypeVar

from kit.command_line import shell_word, started_as
from kit.ranges import BRACKETS, Range
from kit.run import recipe_name, stored_settings

Config = TypeVar("Config")
# of a setting -> what Python may pass for it, and what that is called
KINDS = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
}


@dataclasses.dataclass(frozen=True)
class Flag:
    """A setting as a flag of the command line."""

    name: str  # of the field
    group: str  # the comment above a block of fields
    text: str  # the comment behind the field
    default: object
    kind: type

    @cached_property
    def range(self) -> Range | None:
        """What the brackets at the end of the comment allow; None if there are none."""
        brackets = BRACKETS.search(self.text)
        return Range(brackets[1]) if brackets else None

    @property
    def word(self) -> str:
        """The flag as it is typed: `as_` is --as, since `as` is a keyword of Python."""
        return "--" + self.name.rstrip("_")

    def check(self, value: object) -> None:
        """Raise ValueError for a value that the setting may not have. An empty default is always allowed."""
        accepted, called = KINDS.get(self.kind, (object, ""))
        if not isinstance(value, accepted) or (isinstance(value, bool) and self.kind is not bool):
            problem = f"must be {called}"
        elif self.range and not value == self.default == "":
            problem = self.range.problem(value)
        else:
            problem = "must be finite" if self.kind is float and not math.isfinite(value) else ""
        if problem:
            about = BRACKETS.sub("", self.text)
            about = f" ({about})" if about and not problem.endswith("?") else ""
            raise ValueError(f"{self.name} is {value!r} but {problem}{about}")


class Checked:
    """Settings that are checked when they are made; a frozen dataclass extends it."""

    def __post_init__(self):
        for flag in flags_of(type(self)):
            flag.check(getattr(self, flag.name))


@dataclasses.dataclass(frozen=True)
class RunSettings(Checked):
    """Where a run's folder is and whether the run goes on, which parse and RunFolder.open read."""

    # run
    resume: bool = False  # continue the run in --out, or the newest one
    out: str = ""  # run folder; "" = the next free one under runs/


@cache
def flags_of(config_class: type) -> tuple[Flag, ...]:
    """Return a Config's flags: the class's own first, then those of the classes that it extends.

    A field may take several lines, as when the formatter has put its value in parentheses. A class that was
    typed into an interpreter has no source: its fields keep the comments of the classes that it extends.
    `typed` is not a flag: parse stores there which flags were given.
    """
    fields = [field for field in dataclasses.fields(config_class) if field.name != "typed"]
    kinds = typing.get_type_hints(config_class)
    defaults = {field.name: field.default for field in fields}
    found: dict[str, Flag] = {}
    for base in filter(dataclasses.is_dataclass, config_class.__mro__):
        try:
            lines = textwrap.dedent(inspect.getsource(base)).splitlines()
        except (OSError, TypeError):  # both mean that there is no source
            continue
        for node in ast.parse("\n".join(lines)).body[0].body:
            if isinstance(node, ast.AnnAssign) and node.target.id in defaults:
                above = (line.strip() for line in reversed(lines[: node.lineno - 1]))
                group = next((line[2:] for line in above if line.startswith("# ")), "")
                own = [line for line in lines[node.lineno - 1 : node.end_lineno] if "  # " in line]
                text = own[0].split("  # ", 1)[1] if own else ""
                name = node.target.id
                found.setdefault(name, Flag(name, group, text, defaults[name], kinds[name]))
    for field in fields:
        found.setdefault(field.name, Flag(field.name, "", "", field.default, kinds[field.name]))
    return tuple(found.values())


def part_of(config, kind: type[Config]) -> Config:
    """Return the part of a config that is a `kind`, one of the classes that it extends."""
    return kind(**some_of(config, *(field.name for field in dataclasses.fields(kind))))


def some_of(config, *names: str) -> dict:
    """Return these settings of a config by name, to be passed on as they are."""
    return {name: getattr(config, name) for name in names}


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
    that name. presets: what --preset NAME sets, before those two; needs a text field `preset`, whose brackets
    name them.

    With --resume, the settings are those of the run in --out, or of the newest one, before the other flags
    are applied. Exits with status 2 and one line for an unknown flag (naming the nearest) or a missing value.
    --help shows the usual flags, and --help all shows every one. Raises ValueError for a value that is not
    allowed, on the command line or in the run, and if there is no run to resume.

    A field `typed` of the Config gets the names of the settings that were given on the command line.
    """
    argv, presets = list(sys.argv[1:] if argv is None else argv), presets or {}
    flags = flags_of(config_class)
    everything = any(pair in (("--help", "all"), ("-h", "all")) for pair in pairwise(argv))
    parser = _parser(config_class, flags, everything=everything)
    if everything:
        argv.remove("all")

    known = [option for action in parser._actions for option in action.option_strings]
    for word in argv:
        typed = word.split("=")[0]
        if typed.startswith("--") and typed not in known:
            near = difflib.get_close_matches(typed.replace("-", "_").replace("__", "--", 1), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help all lists the flags"
            parser.exit(2, f"error: there is no {typed}; {hint}\n")
    words = getattr(config_class, WORDS, "")
    for word, before in zip(argv, ["", *argv], strict=False):
        if words and re.match(r"-[\d.]", word) and not before.startswith("-"):
            parser.exit(2, f"error: {word!r} looks like a flag; pass --{words}={word}\n")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    if words := given.pop(WORDS, None):
        name, words = config_class.WORDS, " ".join(words)
        if name in given:
            parser.exit(2, f"error: {name} is {given[name]!r} and also {words!r}; pass one of them\n")
        given[name] = words

    for flag in flags:  # the presets are looked up by one of them
        if flag.name in given:
            flag.check(given[flag.name])
    base = presets[given["preset"]] if "preset" in given else {}
    for name, settings in (("quick", quick), ("smoke", smoke)):
        if settings and given.get(name):
            base = base | settings
    if given.get("resume"):
        folder, stored = stored_settings(recipe_name(config_class), given.get("out", ""))
        base = base | {flag.name: stored[flag.name] for flag in flags if flag.name in stored}
        try:
            config_class(**base)
        except ValueError as error:
            raise ValueError(f"{folder} cannot be resumed, since in its settings {error}") from None
        given["out"] = str(folder)
    typed = {"typed": tuple(given)} if hasattr(config_class, "typed") else {}
    return config_class(**{**base, **given, **typed})


# Flags that most people need: --help shows the first MOST_SHOWN that a recipe has
USUAL = (
    "preset", "model", "models", "traces", "num_traces", "arms", "sizes", "prompts", "problems", "gguf",
    "only", "gpu_gb", "plan", "quick", "smoke", "resume", "benchmarks", "compare", "out", "question",
    "beside", "gold", "history", "temperature", "max_new_tokens",
)  # fmt: skip
MOST_SHOWN = 8
WORDS = "WORDS"  # attribute of a Config: the name of the setting that is typed without a flag


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    hint = "--help lists the flags"

    def error(self, message: str):
        self.exit(2, f"error: {message}; {self.hint}\n")


def _read(kind: type, text: str):
    """Return text as a value of a kind, or as it is, for Flag.check to refuse with what the setting means."""
    try:
        return kind(text)
    except ValueError:
        return text


def _parser(config_class: type, flags: Sequence[Flag], *, everything: bool) -> argparse.ArgumentParser:
    """Return a parser of all flags. everything: its help lists all of them, in groups."""
    by_name = {flag.name: flag for flag in flags}
    usual = [by_name[name] for name in USUAL if name in by_name][:MOST_SHOWN]
    shown = flags if everything or len(flags) <= MOST_SHOWN else usual
    more = f"; --help all lists {len(flags)}" if len(shown) < len(flags) else ""
    about, script = sys.modules[config_class.__module__].__doc__ or "", recipe_name(config_class)
    parser = Parser(
        prog=started_as(),
        usage=f"%(prog)s [flags]{more}; --traceback shows where an error comes from",
        description=about.replace(f"python recipes/{script}.py", started_as()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if words := getattr(config_class, WORDS, ""):
        parser.add_argument(WORDS, nargs="*", metavar=words, help=f"the {words}, without a flag")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in [*shown, *(flag for flag in flags if flag not in shown)]:
        kind = flag.kind
        default = f" (default {flag.default!r})" if flag.default != "" and flag.default is not False else ""
        text = f"{flag.text}{default}".strip().replace("%", "%%")
        title = (flag.group or "settings") if everything else "usual flags"
        group = groups.setdefault(title, parser.add_argument_group(title))
        options = {"dest": flag.name, "default": None, "help": text if flag in shown else argparse.SUPPRESS}
        if kind is bool:
            group.add_argument(flag.word, action="store_true", **options)
            options["help"] = argparse.SUPPRESS
            group.add_argument(f"--no_{flag.name}", action="store_false", **options)
        elif kind in (int, float, str):
            group.add_argument(flag.word, type=partial(_read, kind), metavar=kind.__name__, **options)
        else:
            raise TypeError(
                f"{config_class.__name__}.{flag.name} is a {kind}; a flag is a bool, int, float or str"
            )
    return parser


def as_flag(name: str, value: object, joined: str = " ") -> str:
    """Write a setting as it is typed on the command line. joined: with "=", as one word."""
    return f"--{'' if value else 'no_'}{name}" if isinstance(value, bool) else f"--{name}{joined}{value}"


def as_flags(settings: dict) -> str:
    """Write settings as they are typed on the command line."""
    return " ".join(as_flag(name, value) for name, value in settings.items())


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
            words.append(as_flag(flag.name, value) if isinstance(value, bool) else typed)
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
