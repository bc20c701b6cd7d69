"""Texts side by side in a terminal: what is on the screen in the end, and what never gets there."""

import io
import random
import re

import pytest
from screens import make_screen

from kit import terminal
from kit.terminal import (
    Columns,
    Mark,
    cells_of,
    has_colours,
    is_live,
    num_columns,
    shorten,
    visible,
    width_of,
    wrap,
)

STEERING = "\x1b]0;title\x07\x1b[2J\x9b31m\r\x00\x7f\u202ereversed\u2028\ud800"


def test_nothing_that_steers_a_terminal_is_left_of_a_text():
    shown = visible(f"a{STEERING}\tb\nc")
    assert shown.startswith(r"a\x1b]0;title\x07\x1b[2J\x9b31m\r\x00\x7f\u202ereversed\u2028\ud800    b")
    assert shown.endswith("b\nc") and all(c >= " " or c == "\n" for c in shown)


def test_rows_hold_the_whole_text_and_none_is_too_wide():
    text = "one two  three\n\n四五六七八九 e\u0301te\u0301 " + "x" * 25 + " end "
    for width in (1, 2, 3, 7, 11, 80):
        rows = wrap(cells_of(text, []), width)
        assert "".join(cell.shown for row in rows for cell in row) == text
        for row in rows:
            seen = "".join(cell.shown for cell in row).rstrip()
            assert width_of(seen) <= max(width, 2)  # a Chinese character alone is wider than one column
    assert wrap([], 5) == []


def test_a_row_breaks_at_a_space_if_there_is_one():
    rows = wrap(cells_of("aaa bbb cccccccc", []), 7)
    assert ["".join(cell.shown for cell in row) for row in rows] == ["aaa bbb ", "ccccccc", "c"]


def test_the_sign_of_a_mark_stands_behind_it_and_a_mark_within_a_mark_is_not_shown():
    cells = cells_of("7+5=12 ok", [Mark(0, 6, "right", "✓"), Mark(2, 3, "wrong", "✗")])
    assert "".join(cell.shown for cell in cells) == "7+5=12✓ ok"
    assert [cell.style for cell in cells] == ["right"] * 7 + [""] * 3


def numbers_of(text: str) -> list[Mark]:
    return [Mark(*match.span(), "right", "✓") for match in re.finditer(r"\b[0-9]+\b(?=[\s\S])", text)]


@pytest.mark.parametrize(("columns", "lines", "colours"), [(100, 7, 1), (70, 30, 0), (61, 5, 0), (80, 3, 1)])
def test_at_the_end_every_text_is_there_once_and_whole_whatever_the_order_of_growth(
    columns, lines, colours, monkeypatch
):
    draw = random.Random(f"{columns} {colours}")
    words = ["a", "seventeen", "17", "3", "\n", "漢字", "x" * 40, STEERING, ","]
    texts = [" ".join(draw.choices(words, k=number)) + " end" for number in (60, 31, 1)]
    out = make_screen(monkeypatch, columns, lines)
    grown = [0, 0, 0]
    with Columns(["one", "two", "three" * 20], out, colours=colours) as view:
        while True:
            now = [text[:length] for text, length in zip(texts, grown, strict=True)]
            ended = [length >= len(text) for text, length in zip(texts, grown, strict=True)]
            view.draw(now, [numbers_of(text) for text in now], ended, [f"{n} tokens" for n in grown])
            if all(ended):
                break
            grown = [length + draw.choice((0, 1, 5, 30)) for length in grown]
        view.notes(["first note", "", "a third " * 9])

    rows = [f"{row} ".split(terminal.GAP) for row in out.rows]
    for i, text in enumerate(texts):
        seen = "".join(row[i] for row in rows[1:] if len(row) > i)
        note = ("first note", "", "a third " * 9)[i]
        wanted = "".join(cell.shown for cell in cells_of(text, numbers_of(text))) + note
        assert re.sub(r"\s", "", seen) == re.sub(r"\s", "", wanted)
    assert rows[0][0].strip() == "one" and rows[0][2].startswith("…")
    written = out.getvalue()
    assert written.endswith(terminal.SHOW_CURSOR) and (";31m" in written or "32m" in written) == colours


def test_a_terminal_that_changes_its_width_loses_nothing(monkeypatch):
    text, out = " ".join(map(str, range(400, 600))), make_screen(monkeypatch, 90, 9)
    with Columns(["a", "b"], out, colours=False) as view:
        for end in range(0, len(text) + 40, 13):
            out.columns = 50 if end > 400 else 90
            now = text[:end]
            view.draw([now, now], [[], []], [end >= len(text)] * 2, ["", ""])
    first = " ".join(f"{row} ".split(terminal.GAP)[0] for row in out.rows)
    assert set(text.split()) <= set(first.split())


def test_texts_that_do_not_all_fit_are_shared_out_evenly(monkeypatch):
    make_screen(monkeypatch, 110, 24)  # has room for three
    assert [num_columns(texts) for texts in (0, 1, 2, 3, 4, 5, 7)] == [0, 1, 2, 3, 2, 3, 3]
    make_screen(monkeypatch, 20, 24)
    assert [num_columns(texts) for texts in (1, 3)] == [1, 1]


def test_a_long_title_keeps_its_end():
    assert shorten("runs/gemma/001/model", 9) == "…01/model"
    assert shorten("short", 9) == "short"
    assert shorten("\x1b[2J", 9) == r"\x1b[2J"


def test_colours_need_a_terminal_and_no_color_switches_them_off(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = make_screen(monkeypatch, 80, 24)
    assert is_live(out) and has_colours(out)
    monkeypatch.setenv("NO_COLOR", "1")
    assert is_live(out) and not has_colours(out)
    monkeypatch.setenv("TERM", "dumb")
    assert not is_live(out)
    assert not is_live(io.StringIO()) and not is_live(None)
