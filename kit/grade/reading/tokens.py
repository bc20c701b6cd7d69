r"""Split LaTeX, plain text and Unicode signs into tokens, in time linear in the text."""

from __future__ import annotations

import math
import re
import time
from fractions import Fraction

from kit.grade.limits import MAX_CHARS, TooLarge, Undecided
from kit.grade.reading.numerals import in_base, repeating
from kit.grade.vocabulary import (
    CONSTANTS,
    CURRENCIES,
    FONT_COMMANDS,
    FRACTIONS,
    FUNCTIONS,
    GREEK,
    JOINTS,
    MULTIPLIERS,
    RELATIONS,
    SI_LETTERS,
    SKIPPED,
    TEXT_COMMANDS,
    UNITS,
    names,
)

_SIGNS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "÷": "/",
    "∕": "/", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "∞": r"\infty ", "π": r"\pi ", "√": r"\sqrt ", "°": r"^\circ ", "º": r"^\circ ", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "ℝ": r"\mathbb{R}",
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
    "。": ".", "、": ",", "،": ",", "‘": "'", "’": "'", "′": "'", "“": '"', "”": '"', "…": "...",
    "€": r"\euro ", "£": r"\pounds ", "¥": r"\yen ", "¢": r"\cent ", "∨": r"\lor ", "∧": r"\land ",
    "ℕ": r"\mathbb{N}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "∑": r"\sum ", "∫": r"\int ",
    "∏": r"\prod ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "∖": r"\setminus ", "≡": r"\equiv ",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta ", "λ": r"\lambda ",
    "μ": r"\mu ", "ρ": r"\rho ", "σ": r"\sigma ", "φ": r"\phi ", "ω": r"\omega ", "«": '"', "»": '"',
}  # fmt: skip
_TRANSLATION = {ord(sign): text for sign, text in _SIGNS.items()}
_TRANSLATION.update({code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)})  # full-width forms
DIGITS = {code: chr(code - 0x630) for code in range(0x660, 0x66A)}  # Arabic
_TRANSLATION.update(DIGITS)
_TRANSLATION.update(dict.fromkeys((0xA0, 0x2009, 0x202F, 0x3000, 0x200B, 0xFEFF), " "))
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_QUOTED = re.compile(r"\s*'([^']+)'([\s.]*)")
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z{}(),;!%$])")


def clean(text: str) -> str:
    r"""Return the text with plain notation.

    Unicode signs become LaTeX commands, control characters become spaces, and doubled backslashes (`\\frac`)
    become single.
    """
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
        text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
        text = text.translate(_TRANSLATION)
    if not text.isprintable():
        text = re.sub(r"[\x00-\x1f\x7f]", " ", text)
    if "'" in text:
        quoted = _QUOTED.fullmatch(text)  # '42' is 42, but f' and 6' stay
        text = quoted[1] + quoted[2] if quoted else text
    if "{," in text or "{ ," in text:
        text = re.sub(r"\s?\{ ?, ?\}\s?", "{,}", text)
    if "\\\\" in text:
        if "\\begin" not in text:
            text = _DOUBLED.sub(r"\\", text)
        elif "\\\\begin" in text:  # a doubled environment: its row breaks are four backslashes
            text = text.replace("\\\\", "\\")
    return text


_TOKEN = re.compile(
    r"""(?P<row>\\\\(?:\[[^\]]{0,20}\])?)
      | (?P<space>(?:[\s~"`]|\\[,;:!>\ $()\[\]]|\$)+)
      | (?P<rep>[0-9]*\.[0-9]*(?:\\(?:overline|bar)\{[0-9]{1,40}\}|\([0-9]{1,40}\)
            |\\dot\{?[0-9]\}?(?:[0-9]{0,40}\\dot\{?[0-9]\}?)?))
      | (?P<prefixed>0(?:[xX][0-9A-Fa-f]{1,60}|[bB][01]{1,200}|[oO][0-7]{1,80})(?![0-9A-Za-z]))
      | (?P<based>(?:(?=[0-9A-F]{2})[0-9]{0,60}[A-F][0-9A-F]{0,60}|\([0-9]{0,60}[A-F][0-9A-F]{0,60}\))
            _(?:\{1[1-6]\}|1[1-6](?![0-9])))
      | (?P<european>[0-9]{1,3}(?:(?:\.[0-9]{3})+,[0-9]+(?![0-9]|[.,][0-9])
            |(?:\.[0-9]{3}){2,}(?![0-9]|[.,][0-9])))
      | (?P<num>(?:[0-9]{1,3}(?:(?:(?:\\!)?,\\!\s*|\{,\}\s*|\\,|\\\ )[0-9]{3})+(?![0-9])
            |[0-9]{1,3}(?:[\ ~'][0-9]{3})+(?![0-9])
            |[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)
      | \\(?P<cmd>[A-Za-z]+)\*?
      | \\(?P<esc>.)
      | (?P<half>[aApP]\.\ ?[mM](?![A-Za-z])\.?)
      | (?P<word>[A-Za-z]+)
      | (?P<foreign>[^\W\d_]+)
      | (?P<op>\*\*|:=|!=|<=|>=|==|\.\.\.|.)""",
    re.VERBOSE | re.DOTALL,
)
_COMMA_GROUPS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])(?:\.[0-9]+)?")
_SCIENTIFIC = re.compile(r"[eE]([+-]?[0-9]{1,6})(?![0-9A-Za-z.])")
_PREFIXED = re.compile("0(?:[xX][0-9A-Fa-f]+|[bB][01]+|[oO][0-7]+)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_LEADING_PROSE = re.compile(r"(?:\b(?:is|are|equals)|[:=])[\s~]*\Z")  # \text{The answer is } 5
_WORDS = re.compile("[A-Za-z]+")
_SHORT_WORD = re.compile("[b-df-hj-np-tv-z][aeiou][b-df-hj-np-tvwy]")  # 5 men, 3 red; 5 abc is a product
_NO_AMOUNT = names("+ - pm mp ( ) [ ] \\\\{ : | & ^")
_NOT_DIGITS = re.compile(r"[^0-9.]")
_JOINING = ("and", "or")
_PERCENT = ("percent", "pct")
_MEASURES = UNITS.keys() | MULTIPLIERS.keys() | set(_JOINING)
_KNOWN = FUNCTIONS | CONSTANTS.keys() | set(_JOINING)  # words that mean the same inside \text{} and outside


def group_ends(text: str) -> dict[int, int]:
    """Return where each { of the text closes, by position. A brace that stays open is absent. One pass."""
    ends, stack = {}, []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            stack.append(match.start())
        elif match[0] == "}" and stack:
            ends[stack.pop()] = match.start()
    return ends


def tokenize(text: str, deadline_at: float = math.inf) -> list[tuple[str, object, bool]]:
    """Return tokens: (kind, value, whether a space precedes it).

    The kinds are num, exact, cmd, sym, text, op, sep, row and end. Raises TooLarge beyond MAX_CHARS,
    Undecided at the deadline, and ParseError for digits that their base does not have.
    """
    if len(text) > MAX_CHARS:
        raise TooLarge(f"an answer of {len(text)} characters is beyond {MAX_CHARS}")
    tokens: list[tuple[str, object, bool]] = []
    position, spaced, brackets = 0, False, 0
    ends = group_ends(text) if "{" in text else {}
    money: list[tuple[int, str]] = []
    dollar = "\\$" if "\\$" in text else "$"

    while position < len(text):
        if len(tokens) % 1024 == 0 and time.monotonic() > deadline_at:
            raise Undecided("deadline")
        match = _TOKEN.match(text, position)
        kind, value = match.lastgroup, match[match.lastgroup]
        position = match.end()
        if kind == "space":
            if dollar in value:
                money.append((len(tokens), "dollars"))
            spaced = True
            continue
        if kind == "european":  # 1.000,99
            tokens.append(("num", (value.replace(".", "").replace(",", "."), 0), spaced))
        elif kind == "num":
            groups = _COMMA_GROUPS.match(text, match.start()) if brackets == 0 else None
            if groups:
                value, position = groups[0], groups.end()
            exponent = 0
            scientific = _SCIENTIFIC.match(text, position)
            if scientific:
                exponent, position = int(scientific[1]), scientific.end()
            tokens.append(("num", (_NOT_DIGITS.sub("", value), exponent), spaced))
        elif kind == "rep":
            tokens.append(("exact", repeating(value), spaced))
        elif kind == "prefixed":
            tokens.append(("exact", Fraction(int(value, 0)), spaced))
        elif kind == "based":
            digits, _, base = re.sub("[(){}]", "", value).partition("_")
            tokens.append(("exact", in_base((digits, 0), base)[1], spaced))
        elif kind == "row":
            tokens.append(("row", "\\\\", spaced))
        elif kind == "esc":
            if value in "{}%|&#_":
                brackets += (value == "{") - (value == "}")
                tokens.append(("op", "\\" + value if value in "{}|" else value, spaced))
        elif kind == "cmd":
            if value in TEXT_COMMANDS or value in FONT_COMMANDS:
                position = _text_command(text, position, ends, value, tokens, spaced)
            elif value in ("left", "right") and position < len(text) and text[position] == ".":
                position += 1
            elif value in ("hspace", "vspace", "phantom", "tag", "label", "color", "textcolor"):
                position = ends.get(position, position - 1) + 1
            elif value.startswith(("quad", "qquad")) and value not in SKIPPED:  # \quadx, a common slip
                _word(value[value.index("d") + 1 :], tokens, True)
            elif value in JOINTS:
                tokens.append(("sep", JOINTS[value], spaced))
            elif value in CURRENCIES:
                money.append((len(tokens), CURRENCIES[value]))
            elif value not in SKIPPED:
                tokens.append(("cmd", "frac" if value in FRACTIONS else value, spaced))
        elif kind in ("half", "foreign"):  # 3:45 p.m.; letters of another script
            tokens.append(("text", value, spaced))
        elif kind == "word":
            _word(value, tokens, spaced)
        else:
            brackets += (value in "([") - (value in ")]")
            tokens.append(("sep" if value in ",;" else "op", "^" if value == "**" else value, spaced))
        spaced = False

    tokens.append(("end", "", spaced))
    if len(money) == 1:  # two signs enclose mathematics, or are two prices
        _name_currency(tokens, *money[0])
    return tokens


def _name_currency(tokens: list, index: int, currency: str) -> None:
    """Insert a currency's sign as the unit after a single amount, -$20 or 20€. Elsewhere it means nothing."""
    if index and tokens[index - 1][0] in ("num", "exact") and tokens[index][0] != "num":
        tokens.insert(index, ("text", currency, True))
        return

    end = index
    while tokens[end][0] not in ("end", "sep"):
        if tokens[end][0] in ("op", "cmd") and tokens[end][1] in RELATIONS:
            break
        if tokens[end][1] in _NO_AMOUNT and (end > index or tokens[end][1] not in ("+", "-")):
            return
        end += 1
    if end > index:
        tokens.insert(end, ("text", currency, True))


def _text_command(
    text: str, position: int, ends: dict[int, int], command: str, tokens: list, spaced: bool
) -> int:
    r"""Read \text{...} and similar commands, and return the position after what was read.

    Words become a text token. Mathematics inside is read as if the command were absent.
    """
    start = position
    while start < len(text) and text[start] == " ":
        start += 1
    end = ends.get(start)
    if end is None:
        return position

    content = text[start + 1 : end].strip(" \\,.;:~$")
    behind_number = bool(tokens) and (tokens[-1][0] in ("num", "exact") or tokens[-1][1] == "}")
    words = [word.lower() for word in _WORDS.findall(content)]
    if behind_number and words and words[0] in MULTIPLIERS and content[0].isalpha():
        _multiply(words[0], tokens, spaced)
        content = content[len(words[0]) :].strip(" ,.~")
        if not content:
            return end + 1

    if len(content) == 1:
        is_unit = content in SI_LETTERS
    else:
        is_unit = not content.isalpha() and all(word in UNITS for word in words)
    # \mathrm{~m} / \mathrm{s}
    behind_unit = len(tokens) > 1 and tokens[-1][1] == "/" and tokens[-2][0] == "text"
    if (behind_number or behind_unit) and command == "mathrm" and words and is_unit:
        tokens.append(("text", content, spaced))  # 5\mathrm{m/s^2}
        return end + 1

    # three kinds of mathematics: the group that follows is parsed as usual
    if not re.search("[A-Za-z]", content):
        return position
    if command in FONT_COMMANDS and not re.fullmatch(r"[A-Za-z ]+", content):
        return position
    if content[0].isdigit() and _MEASURES.issuperset(words):
        return position  # \text{60 cm}
    if _PREFIXED.fullmatch(content):
        return position  # \texttt{0x1F}

    if not tokens and _LEADING_PROSE.search(text, start, end):
        return end + 1
    if command == "mathbb" and content == "R":
        tokens.append(("cmd", "reals", spaced))
    elif content == "to":  # the ratio 5 to 3
        tokens.append(("op", ":", spaced))
    elif content in _KNOWN or content.lower() in _PERCENT or (len(content) == 1 and command in FONT_COMMANDS):
        _word(content, tokens, spaced)
    else:
        tokens.append(("text", content, spaced))
    return end + 1


def _multiply(word: str, tokens: list, spaced: bool) -> None:
    """Append a multiplier as a factor: 5 million is 5 times a million."""
    tokens += [("cmd", "times", spaced), ("exact", Fraction(MULTIPLIERS[word]), False)]


def _word(word: str, tokens: list, spaced: bool) -> None:
    """Append the tokens of a run of letters outside any command.

    It is a connective, a function, a constant, a unit, another word, or a product of symbols.
    """
    lower = word.lower()
    after_number = bool(tokens) and tokens[-1][0] == "num"
    half_of_day = lower in ("am", "pm") and len(tokens) > 1 and tokens[-2][1] == ":"
    glued = re.match(r"(or|and)(?=[A-Z]|[a-z]$)", word) if after_number else None  # 1orW(x)=-1

    if word in _JOINING:
        tokens.append(("sep", word, spaced))
    elif lower in MULTIPLIERS and tokens and (tokens[-1][0] in ("num", "exact") or tokens[-1][1] == "}"):
        _multiply(lower, tokens, spaced)
    elif word == "mod" or (word == "choose" and tokens):
        tokens.append(("cmd", word, spaced))
    elif word == "to" and after_number:
        tokens.append(("op", ":", spaced))
    elif half_of_day or (word in ("min", "sec") and after_number):  # units, not functions: 40 min
        tokens.append(("text", word, spaced))
    elif word in FUNCTIONS or word in CONSTANTS or word in ("sqrt", "cbrt", "binom"):
        tokens.append(("cmd", word, spaced))
    elif lower in _PERCENT:
        tokens.append(("op", "%", spaced))
    elif lower == "infinity":
        tokens.append(("cmd", "infty", spaced))
    elif word in GREEK:
        tokens.append(("sym", word, spaced))
    elif word == "in" and tokens and tokens[-1][0] == "sym":
        tokens.append(("cmd", "in", spaced))
    elif lower == "per" or (len(word) > 1 and lower in UNITS):
        tokens.append(("text", word, spaced))
    elif glued:
        tokens.append(("sep", glued[1], spaced))
        _word(word[glued.end() :], tokens, True)
    elif len(word) > 2 and (word[:-1] in FUNCTIONS or word[:-1] in CONSTANTS):  # sinx, pir
        tokens.append(("cmd", word[:-1], spaced))
        tokens.append(("sym", word[-1], False))
    elif (len(word) >= 4 and not word.isupper()) or (spaced and after_number and _SHORT_WORD.fullmatch(word)):
        tokens.append(("text", word, spaced))
    else:
        for index, letter in enumerate(word):
            tokens.append(("sym", letter, spaced and index == 0))
