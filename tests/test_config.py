from dataclasses import asdict, dataclass

import pytest

from kit.config import as_flags, field_comments, parse, show


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


SMOKE = {"row_tokens": 64, "model": "tiny"}


def test_flags_set_fields_by_type():
    assert parse(Config, ["--row_tokens", "4096", "--lr=1e-3", "--no_clip"]) == Config(4096, 1e-3, clip=False)
    assert parse(Config, []) == Config()


def test_smoke_comes_first_and_flags_override_it_in_any_order():
    assert parse(Config, ["--model", "mine", "--smoke"], smoke=SMOKE) == Config(64, model="mine", smoke=True)
    assert parse(Config, [], smoke=SMOKE) == Config()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--row_token", "1"], "did you mean --row_tokens"),
        (["--row-tokens", "1"], "did you mean --row_tokens"),
        (["--row_tokens", "many"], "invalid int value: 'many'"),
        (["--row_tokens"], "expected one argument"),
        (["--zzzz"], "--help lists the flags"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_a_mistyped_flag_is_refused_with_the_next_step(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(Config, argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_each_lines_comment_and_default(capsys):
    with pytest.raises(SystemExit):
        parse(Child, ["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "tokens a pack (default 16384)" in printed
    assert "another model (default 'other/y')" in printed
    assert "peak, 100 % of it" in printed


def test_comments_of_a_base_class_are_kept_and_overridden():
    assert field_comments(Child)["model"] == "another model"
    assert field_comments(Child)["row_tokens"] == "tokens a pack"


def test_show_has_a_line_a_setting():
    assert len(show(Config()).splitlines()) == 5


def test_settings_written_as_flags_are_read_back_as_they_were():
    config = Config(row_tokens=7, lr=1e-3, model="mine", clip=False)
    assert parse(Config, as_flags(asdict(config)).split()) == config
    assert as_flags({"row_tokens": 7, "clip": False, "smoke": True}) == "--row_tokens 7 --no_clip --smoke"
