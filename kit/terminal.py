"""Texts that grow side by side in a terminal: columns, colours, and nothing of a text that steers it.

Rows that can no longer change scroll away as ordinary text; only those below them are drawn again. A text's
marks may therefore change no earlier than its last UNSETTLED characters.
"""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import NamedTuple, TextIO

UNSETTLED = 120  # characters at the end of a growing text, whose marks may still change
NARROWEST = 30  # characters of a column; with fewer, texts stand one below the other
GAP = " │ "
RIGHT, WRONG = "✓", "✗"
SIGNS = GAP + RIGHT + WRONG + "…"
STYLES = {"right": "32", "wrong": "9;31", "reflection": "1;33", "box": "1;7", "title": "1;36", "note": "2"}
HIDE_CURSOR, SHOW_CURSOR, CLEAR_BELOW = "\x1b[?25l", "\x1b[?25h", "\x1b[J"


class Mark(NamedTuple):
    """A part of a text that is shown in a style of STYLES, and what is written behind it."""

    start: int
    end: int
    style: str
    behind: str = ""


class Cell(NamedTuple):
    """What stands for one character of a text, on the screen."""

    shown: str
    width: int  # columns of the terminal
    style: str
    end: int  # of the character in the text


def is_live(out: TextIO | None) -> bool:
    """Return whether a stream is a terminal that draws again what it has drawn, and knows SIGNS."""
    if out is None or not out.isatty() or os.environ.get("TERM") == "dumb":
        return False
    try:
        SIGNS.encode(out.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return sys.platform != "win32" or "WT_SESSION" in os.environ  # the old console prints the codes


def has_colours(out: TextIO | None) -> bool:
    """Return whether to colour what is printed there; NO_COLOR (no-color.org) switches it off."""
    return is_live(out) and not os.environ.get("NO_COLOR")


def visible(text: str) -> str:
    r"""Return a text with every character that steers a terminal, or hides, written as its code: \x1b.

    Line breaks stay.
    """
    return "".join(_visible(character) for character in text)


@lru_cache(maxsize=4096)
def _visible(character: str) -> str:
    if character == "\t":
        return "    "
    hides = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return ascii(character)[1:-1] if hides and character != "\n" else character


@lru_cache(maxsize=4096)
def width_of(text: str) -> int:
    """Return how many columns of a terminal a text without line breaks takes."""
    return sum(
        2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.category(c) in ("Mn", "Me") else 1
        for c in text
    )


def shorten(text: str, width: int) -> str:
    """Return a text that takes at most so many columns; its middle is left out, since its end tells more."""
    text = visible(text).replace("\n", " ")
    if width_of(text) <= width:
        return text
    end = ""
    while width_of(text[len(text) - len(end) - 1 :]) <= width - 1:
        end = text[len(text) - len(end) - 1 :]
    return "…" + end


def cells_of(text: str, marks: Sequence[Mark], start: int = 0) -> list[Cell]:
    """Return the cells of text[start:]. What lies inside an earlier mark belongs to it."""
    styles, behind, position = {}, {}, 0
    for mark in sorted(marks, key=lambda mark: (mark.start, -mark.end)):
        if mark.start >= position:
            styles |= dict.fromkeys(range(mark.start, mark.end), mark.style)
            if mark.behind:
                behind[mark.end - 1] = mark
            position = mark.end
    found = []
    for place in range(start, len(text)):
        shown = _visible(text[place])
        found.append(Cell(shown, width_of(shown), styles.get(place, ""), place + 1))
        if mark := behind.get(place):
            found.append(Cell(mark.behind, width_of(mark.behind), mark.style, place + 1))
    return found


def wrap(cells: Sequence[Cell], width: int) -> list[list[Cell]]:
    """Return rows of at most `width` columns: broken at line breaks, else at a space, else anywhere.

    The space or line break at which a row ends is its last cell.
    """
    rows, row, used = [], [], 0
    for cell in cells:
        if cell.shown == "\n":
            rows.append([*row, cell])
            row, used = [], 0
            continue
        while row and used + cell.width > width and cell.shown != " ":
            space = next((i for i in reversed(range(len(row))) if row[i].shown == " "), len(row) - 1)
            rows.append(row[: space + 1])
            row = row[space + 1 :]
            used = sum(cell.width for cell in row)
        row.append(cell)
        used += cell.width
    return [*rows, row] if row else rows


def painted(row: Sequence[Cell], width: int, *, colours: bool) -> str:
    """Return a row as a string that takes exactly `width` columns."""
    parts, used, style = [], 0, ""
    for cell in row:
        if cell.shown == "\n" or used + cell.width > width:
            break
        if colours and cell.style != style:
            parts.append(f"\x1b[0m\x1b[{STYLES[cell.style]}m" if cell.style else "\x1b[0m")
            style = cell.style
        parts.append(cell.shown)
        used += cell.width
    return "".join(parts) + ("\x1b[0m" if style else "") + " " * (width - used)


def num_columns(texts: int) -> int:
    """Return how many of so many texts stand side by side; if not all fit, they are shared out evenly."""
    fitting = (shutil.get_terminal_size().columns - 1 + len(GAP)) // (NARROWEST + len(GAP))
    groups = -(-texts // max(1, fitting))
    return -(-texts // max(1, groups))


def _in_style(text: str, style: str) -> list[Cell]:
    return cells_of(text, [Mark(0, len(text), style)])


class Columns:
    """Texts that grow side by side, under their titles, as long as this is used as a context.

    Every text that is passed to `draw` begins with the one before, but for its last UNSETTLED characters.
    """

    def __init__(self, titles: Sequence[str], out: TextIO, *, colours: bool):
        self.titles, self.out, self.colours = titles, out, colours
        self.starts = [0] * len(titles)  # of each text: the first character that has not scrolled away
        self.rows_below = self.total = 0

    def __enter__(self) -> Columns:
        self.out.write(HIDE_CURSOR)
        self._fit()
        titles = [shorten(title, self.width) for title in self.titles]
        self.out.write(self._line([_in_style(title, "title") for title in titles]))
        return self

    def __exit__(self, *_) -> None:
        self.out.write(SHOW_CURSOR)
        self.out.flush()

    def draw(
        self,
        texts: Sequence[str],
        marks: Sequence[Sequence[Mark]],
        ended: Sequence[bool],
        statuses: Sequence[str],
    ) -> None:
        """Draw the texts as they are now. ended: of each text, whether it grows no more.

        statuses: what stands below the texts for as long as one of them grows.
        """
        height = shutil.get_terminal_size().lines
        if self.total != shutil.get_terminal_size().columns:  # the terminal broke the lines as it liked
            self._fit()
            self.rows_below = 0
        columns = [
            wrap(cells_of(text, found, start), self.width)
            for text, found, start in zip(texts, marks, self.starts, strict=True)
        ]
        growing = [
            sum(row[-1].end <= len(text) - UNSETTLED for row in rows)
            for rows, text, over in zip(columns, texts, ended, strict=True)
            if not over
        ]
        lines = self._lines(columns)
        settled = min(growing, default=len(lines))
        above = f"\r\x1b[{self.rows_below}A" if self.rows_below else "\r"  # a typed ^C may stand there
        shown = lines[settled:][-max(height - 3, 1) :]
        if growing:
            shown.append(self._line([_in_style(status, "note")[: self.width] for status in statuses]))
        self.out.write(above + CLEAR_BELOW + "".join(lines[:settled] + shown))
        self.out.flush()
        self.rows_below = len(shown)
        for i, rows in enumerate(columns):
            if gone := rows[:settled]:
                self.starts[i] = gone[-1][-1].end

    def notes(self, notes: Sequence[str]) -> None:
        """Write a note below each text."""
        rows = [wrap(_in_style(note, "note"), self.width) for note in notes]
        self.out.write("".join(self._lines(rows)) + "\n")

    def _fit(self) -> None:
        self.total = shutil.get_terminal_size().columns
        gaps = len(GAP) * (len(self.titles) - 1)
        self.width = max(1, (self.total - 1 - gaps) // len(self.titles))

    def _lines(self, columns: Sequence[Sequence[Sequence[Cell]]]) -> list[str]:
        return [self._line(rows) for rows in zip_longest(*columns, fillvalue=())]

    def _line(self, rows: Sequence[Sequence[Cell]]) -> str:
        parts = [painted(row, self.width, colours=self.colours) for row in rows]
        return GAP.join(parts).rstrip(" ") + "\n"
