"""An emulator of a terminal, of the few codes that kit/terminal.py writes."""

import io
import os
import re
import shutil

from kit.terminal import width_of

CODES = re.compile(r"\x1b\[(\?25[lh]|\d*A|J|[\d;]*m)")


class Screen(io.StringIO):
    """A terminal: the lines that it shows, and those that have scrolled away."""

    encoding = "utf-8"

    def __init__(self, columns: int, lines: int):
        super().__init__()
        self.columns, self.lines = columns, lines
        self.rows, self.row = [""], 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        super().write(text)
        place = 0
        while place < len(text):
            if match := CODES.match(text, place):
                self._obey(match[1])
                place = match.end()
                continue
            character = text[place]
            assert character >= " " or character in "\r\n", repr(character)
            if character == "\n":
                self.row += 1
                self.rows += [""] * (self.row == len(self.rows))
            elif character != "\r":
                self.rows[self.row] += character
                assert width_of(self.rows[self.row]) < self.columns, "the terminal would break this line"
            place += 1
        return len(text)

    def _obey(self, code: str) -> None:
        if code.endswith("A"):
            assert int(code[:-1]) < self.lines, "the cursor would stop at the top of the screen"
            self.row -= int(code[:-1])
        elif code == "J":
            self.rows[self.row :] = [""]


def make_screen(monkeypatch, columns: int, lines: int) -> Screen:
    """Return a terminal of this size, which is also the one that shutil knows."""
    screen = Screen(columns, lines)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(
        shutil, "get_terminal_size", lambda *_: os.terminal_size((screen.columns, screen.lines))
    )
    return screen
