import importlib
import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest

from kit.config import as_flags, flags_of, full_command, parse, part_of, show, some_of
from kit.rl.settings import Settings
from kit.train.savings import Savings

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Config:
    """A recipe's settings."""

    # data
    row_tokens: int = 16_384  # tokens a pack
    lr: float = 5e-5  # peak, 100 % of it
    model: str = "google/x"  # hub id
    clip: bool = True  # off: --no_clip
    smoke: bool = False  # tiny


@dataclass(frozen=True)
class Child(Config):
    model: str = "other/y"  # another model


@dataclass(frozen=True)
class Inheriting(Settings, Savings):
    """Extends classes of other files."""

    preset: str = "large"  # settings that other flags change [large | small]
    model: str = "x"  # hub id
    lr: float = (
        1e-3  # a comment that ruff has put in parentheses
    )  # fmt: skip
    name: str = "-".join(
        ["a", "b"],
    )  # a comment behind a value of several lines
    seed: int = 3  # of everything


SMOKE = {"row_tokens": 64, "model": "tiny"}


def test_flags_set_fields_by_type():
    assert parse(Config, ["--row_tokens", "4096", "--lr=1e-3", "--no_clip"]) == Config(4096, 1e-3, clip=False)
    assert parse(Config, []) == Config()


@dataclass(frozen=True)
class Learning(Config):
    typed: tuple[str, ...] = field(default=(), compare=False, repr=False)


def test_a_config_may_learn_which_settings_were_typed_even_as_their_default_and_not_by_smoke():
    found = parse(Learning, ["--smoke", "--clip", "--lr=1e-3"], smoke=SMOKE)
    assert set(replace(found, clip=False).typed) == {"smoke", "clip", "lr"}
    assert [flag.name for flag in flags_of(Learning)] == [flag.name for flag in flags_of(Config)]


def test_smoke_comes_first_and_flags_override_it_in_any_order():
    assert parse(Config, ["--model", "mine", "--smoke"], smoke=SMOKE) == Config(64, model="mine", smoke=True)
    assert parse(Config, [], smoke=SMOKE) == Config()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--row_token", "1"], "did you mean --row_tokens"),
        (["--row-tokens", "1"], "did you mean --row_tokens"),
        (["--row_tokens"], "error: argument --row_tokens: expected one argument; --help lists the flags\n"),
        (["--zzzz"], "--help all lists the flags"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_a_mistyped_flag_is_refused_with_the_next_step(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(Config, argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_word_for_a_number_is_refused_in_one_line_that_says_what_the_setting_is():
    with pytest.raises(
        ValueError, match=r"^row_tokens is 'many' but must be a whole number \(tokens a pack\)$"
    ):
        parse(Config, ["--row_tokens", "many"])
    with pytest.raises(ValueError, match=r"^lr is 'low' but must be a number "):
        parse(Config, ["--lr", "low"])


def test_help_shows_a_default_of_zero_and_none_that_is_off_or_empty(capsys):
    @dataclass(frozen=True)
    class Zero(Config):
        row_tokens: int = 0
        steps: int = 0  # at most
        noise: float = 0.0  # its scale
        quiet: bool = False  # print less
        place: str = ""  # of a file

    with pytest.raises(SystemExit):
        parse(Zero, ["--help", "all"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "at most (default 0)" in printed and "its scale (default 0.0)" in printed
    assert "print less (default" not in printed and "of a file (default" not in printed


def test_help_shows_each_lines_comment_and_default(capsys):
    with pytest.raises(SystemExit):
        parse(Child, ["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "tokens a pack (default 16384)" in printed
    assert "another model (default 'other/y')" in printed
    assert "peak, 100 % of it" in printed


def help_of(config: type) -> dict[str, str]:
    return {flag.name: flag.text for flag in flags_of(config)}


def test_comments_of_a_base_class_are_kept_and_overridden():
    assert help_of(Child)["model"] == "another model"
    assert help_of(Child)["row_tokens"] == "tokens a pack"


def test_help_shows_the_usual_flags_and_help_all_every_one_below_the_comment_above_its_block(capsys):
    with pytest.raises(SystemExit) as shown:
        parse(Inheriting, ["--help"])
    short = capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse(Inheriting, ["--help", "all"])
    long = capsys.readouterr().out
    assert shown.value.code == 0
    assert "--model" in short and "--group_size" not in short and "--help all" in short
    assert (
        long.index("\nalgorithm:")
        < long.index("--group_size")
        < long.index("\nmemory:")
        < long.index("--rec")
    )
    assert "--no_recompute" not in long  # every switch has one; a line for each would double the list


def test_help_names_the_presets(capsys):
    with pytest.raises(SystemExit):
        parse(Inheriting, ["--help"], presets={"large": {}, "small": {}})
    assert "that other flags change [large | small] (default 'large')" in " ".join(
        capsys.readouterr().out.split()
    )


def test_settings_of_base_classes_are_flags_with_the_help_that_stands_in_their_own_files(capsys):
    config = parse(Inheriting, ["--group_size", "4", "--no_recompute", "--ratio", "sequence"])
    assert (config.group_size, config.recompute, config.ratio, config.seed) == (4, False, "sequence", 3)
    comments = help_of(Inheriting)
    assert comments["group_size"].startswith("completions per prompt; ")
    assert comments["offload_optimizer"] == "optimizer states in CPU memory"
    assert comments["lr"] == "a comment that ruff has put in parentheses"
    assert comments["name"] == "a comment behind a value of several lines"
    assert comments["seed"] == "of everything"
    with pytest.raises(SystemExit):
        parse(Inheriting, ["--help", "all"])
    assert "with the others [2..10000] (default 8)" in " ".join(capsys.readouterr().out.split())


def test_a_part_of_the_settings_is_an_object_of_the_class_that_is_passed_on():
    config = Inheriting(group_size=4, recompute=False, seed=5)
    assert part_of(config, Savings) == Savings(recompute=False)
    assert part_of(config, Settings) == Settings(group_size=4, seed=5)
    assert some_of(config, "seed", "group_size") == {"seed": 5, "group_size": 4}


def test_a_class_lists_its_own_settings_first_then_those_it_inherits_class_by_class():
    names = [flag.name for flag in flags_of(Inheriting)]
    assert names[:5] == ["preset", "model", "lr", "name", "seed"]
    assert names.index("group_size") < names.index("kl_coef") < names.index("recompute")
    assert len(names) == len(set(names))
    shown = show(Inheriting(kl_coef=9.0, seed=9)).splitlines()[1:]
    assert [line.split()[0] for line in shown] == ["seed", "kl_coef"]


def test_every_flag_of_the_recipes_has_a_help_text(monkeypatch):
    """The comment behind its field, in whatever file that stands and however ruff has wrapped the line."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    for path in sorted((ROOT / "recipes").glob("*.py")):
        config = getattr(importlib.import_module(path.stem), "Config", None)
        if config is not None:
            assert [flag.name for flag in flags_of(config) if not flag.text] == [], path.name


def test_only_settings_that_differ_from_the_defaults_are_shown_one_per_line():
    assert show(Config()) == show(Child()) == "all settings are the defaults"
    config = parse(
        Config, ["--smoke", "--no_clip", "--lr", "5e-5"], smoke=SMOKE
    )  # lr is given, and the default
    assert show(config).splitlines() == [
        "settings that differ from the defaults",
        "  row_tokens  64",
        "  model       'tiny'",
        "  clip        False",
        "  smoke       True",
    ]
    assert show(Child(model="google/x")).endswith("\n  model  'google/x'")  # the default of its base class
    preset = parse(Preset, ["--preset", "night"], presets={"night": {"lr": 1e-3}})
    assert show(preset).splitlines()[1:] == ["  preset  'night'", "  lr      0.001"]


@dataclass(frozen=True)
class Preset(Config):
    preset: str = ""  # night


def test_settings_written_as_flags_are_read_back_as_they_were():
    config = Config(row_tokens=7, lr=1e-3, model="mine", clip=False)
    assert parse(Config, as_flags(asdict(config)).split()) == config
    assert as_flags({"row_tokens": 7, "clip": False, "smoke": True}) == "--row_tokens 7 --no_clip --smoke"


@pytest.mark.parametrize("model", ["", "it's $HOME", "--preset x", "-1", "a=b", "tiny"])
@pytest.mark.parametrize("flags", [[], ["--smoke", "--row_tokens", "16384"], ["--no_clip", "--lr", "1e-07"]])
def test_the_full_command_of_a_config_gives_it_back(model, flags):
    config = parse(Config, [f"--model={model}", *flags], smoke=SMOKE)
    program, *words = shlex.split(full_command(config, "recipe", smoke=SMOKE))
    assert program == "recipe" and parse(Config, words, smoke=SMOKE) == config
    presets = {"small": {"seed": 4, "name": "s", "mask_truncated": True}}
    config = parse(Inheriting, ["--preset", "small", "--seed", "3", "--no_mask_truncated"], presets=presets)
    with_switches = full_command(config, "recipe", presets=presets)
    assert with_switches == "recipe --preset small --seed 3 --no_mask_truncated"


@dataclass(frozen=True)
class Asking(Child):
    WORDS = "model"


def test_one_setting_may_be_typed_without_its_flag_among_the_others():
    for words in (["a b", "--lr", "0.5"], ["--lr", "0.5", "a", "b"], ["--lr=0.5", "--model", "a b"]):
        assert parse(Asking, words) == Asking(model="a b", lr=0.5)
    assert parse(Asking, []) == Asking()
    with pytest.raises(SystemExit):
        parse(Child, ["a"])


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["a", "--model", "b"], "error: model is 'b' and also 'a'; pass one of them\n"),
        (["-3+4?"], "error: '-3+4?' looks like a flag; pass --model=-3+4?\n"),
    ],
)
def test_words_that_cannot_be_meant_so_are_refused_with_what_to_type(typed, said, capsys):
    with pytest.raises(SystemExit):
        parse(Asking, typed)
    assert capsys.readouterr().err == said
