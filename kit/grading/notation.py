r"""Mathematical notation as tokens: LaTeX, plain text and Unicode signs, with no evaluation, in time linear in the text."""

from __future__ import annotations

import math
import re
import time
from fractions import Fraction

MAX_CHARS = 60_000  # a list of 3,000 numbers has about 20,000 characters
MAX_DIGITS = 4_000  # Python itself refuses int() beyond 4,300 digits: that limit is quadratic time


class ParseError(ValueError):
    """The text is not an answer in a notation that the parser knows."""


class Undecided(ValueError):
    """Equality could not be decided within the caps or the deadline; the message is the rule that the verdict reports."""


class TooLarge(ValueError):
    """The answer is beyond a cap on length, depth, digits or size: it cannot be compared, which is not the same as wrong."""


def names(text: str) -> frozenset[str]:
    """The words of a text as a set."""
    return frozenset(text.split())


FUNCTIONS = names(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp gcd lcm max min floor ceil abs det Re Im arg"
)
OPAQUE = frozenset("fghFGH")  # f(2) is never a product
CONSTANTS = {"pi": ("const", "pi"), "infty": ("const", "inf"), "infinity": ("const", "inf"), "inf": ("const", "inf")}
GREEK = names(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi "
    "varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar"
)
RELATIONS = {
    "=": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "==": "=", "le": "<=", "leq": "<=", "leqslant": "<=",
    "ge": ">=", "geq": ">=", "geqslant": ">=", "lt": "<", "gt": ">", "ne": "!=", "neq": "!=", "approx": "~", "simeq": "~",
    "in": "in", "equiv": "equiv", "cong": "equiv",
}  # fmt: skip
FONT_COMMANDS = names("mathrm mathbf mathit mathsf mathbb mathcal boldsymbol bm operatorname rm bf")
TEXT_COMMANDS = names("text textbf textit textrm textsf texttt textnormal mbox hbox emph textup")
SKIPPED = names(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr middle displaystyle textstyle limits nolimits quad qquad "
    "boxed fbox overline underline vec hat bar overrightarrow mathstrut"
)
INFIX_COMMANDS = names(
    "cup cap setminus backslash colon choose cdot times ast div pm mp pmod bmod mid circ degree prime to hline end and"
)
CLOSERS = names("rfloor rceil rvert rVert rangle")
STRUCTURAL = INFIX_COMMANDS | CLOSERS | names("implies iff mapsto lim limsup liminf over atop substack overset underset")
MATRICES = names("matrix pmatrix bmatrix Bmatrix smallmatrix array vmatrix")
BASE_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12}
BASE_WORDS["sixteen"] = 16
# What follows a number in plain words. One-letter units only count inside \text{}: outside it, "5m" is a product.
UNIT_GROUPS = (
    "cm centimeter centimetre", "mm millimeter millimetre", "km kilometer kilometre", "m meter metre", "in inch", "ft foot feet",
    "yd yard", "mi mile", "kg kilogram", "g gram", "mg milligram", "lb lbs pound", "oz ounce", "s sec second", "min minute",
    "h hr hour", "day", "week", "month", "year", "l liter litre", "ml milliliter", "mph", "cent", "dollar usd", "euro eur",
    "yuan", "degree deg", "radian rad", "unit", "people", "apple", "percent pct", "gallon", "hz", "volt", "joule", "watt",
)  # fmt: skip
UNITS: dict[str, str] = {}
for _group in UNIT_GROUPS:
    for _name in _group.split():
        UNITS[_name] = UNITS[_name + "s"] = UNITS[_name + "es"] = _group.split()[0]

_SIGNS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "÷": "/", "∕": "/", "≤": r"\le ",
    "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∞": r"\infty ", "π": r"\pi ", "√": r"\sqrt ",
    "°": r"^\circ ", "º": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ",
    "ℝ": r"\mathbb{R}", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
    "。": ".", "、": ",", "،": ",", "‘": "'", "’": "'", "′": "'", "“": '"', "”": '"', "…": "...", "€": " ", "£": " ", "¥": " ",
    "¢": " ", "∑": r"\sum ", "∫": r"\int ", "∏": r"\prod ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "∖": r"\setminus ",
    "≡": r"\equiv ",    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ",
    "θ": r"\theta ", "λ": r"\lambda ", "μ": r"\mu ",
    "ρ": r"\rho ", "σ": r"\sigma ", "φ": r"\phi ", "ω": r"\omega ",
}  # fmt: skip
_TRANSLATION = {ord(sign): text for sign, text in _SIGNS.items()}
_TRANSLATION.update({code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)})  # full-width forms
_TRANSLATION.update(dict.fromkeys((0xA0, 0x2009, 0x202F, 0x3000, 0x200B, 0xFEFF), " "))
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z{}(),;!%$])")


def clean(text: str) -> str:
    r"""Unicode signs become LaTeX commands, control characters become spaces, doubled backslashes (`\\frac`) become single."""
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
        text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
        text = text.translate(_TRANSLATION)
    if not text.isprintable():
        text = re.sub(r"[\x00-\x1f\x7f]", " ", text)
    if "{," in text or "{ ," in text:
        text = re.sub(r"\s?\{ ?, ?\}\s?", "{,}", text)
    if "\\\\" in text:
        if "\\begin" not in text:
            text = _DOUBLED.sub(r"\\", text)
        elif "\\\\begin" in text:  # a whole environment escaped twice: its row breaks are four backslashes
            text = text.replace("\\\\", "\\")
    return text


_TOKEN = re.compile(
    r"""(?P<row>\\\\(?:\[[^\]]{0,20}\])?)
      | (?P<space>(?:[\s~"`]|\\[,;:!>\ $()\[\]]|\$)+)
      | (?P<rep>[0-9]*\.[0-9]*\\(?:overline|bar|dot)\{[0-9]{1,40}\})
      | (?P<based>(?=[A-F]*[0-9])[0-9]{0,60}[A-F][0-9A-F]{0,60}_(?:\{1[1-6]\}|1[1-6](?![0-9])))
      | (?P<european>[0-9]{1,3}(?:\.[0-9]{3})+,[0-9]+(?![0-9]|[.,][0-9]))
      | (?P<num>(?:[0-9]{1,3}(?:(?:(?:\\!)?,\\!\s*|\{,\}\s*|\\,|\\\ )[0-9]{3})+(?![0-9])|[0-9]{1,3}(?:\ [0-9]{3})+(?![0-9])
            |[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)
      | \\(?P<cmd>[A-Za-z]+)\*?
      | \\(?P<esc>.)
      | (?P<half>[aApP]\.\ ?[mM](?![A-Za-z])\.?)
      | (?P<word>[A-Za-z]+)
      | (?P<op>\*\*|!=|<=|>=|==|\.\.\.|.)""",
    re.VERBOSE | re.DOTALL,
)
_COMMA_GROUPS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])(?:\.[0-9]+)?")
_SCIENTIFIC = re.compile(r"[eE]([+-]?[0-9]{1,6})(?![0-9A-Za-z.])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_LEADING_PROSE = re.compile(r"(?:\b(?:is|are|equals)|[:=])[\s~]*\Z")  # \text{The answer is } 5
_WORDS = re.compile("[A-Za-z]+")
_NOT_DIGITS = re.compile(r"[^0-9.]")


def number_node(digits: str, exponent: int = 0) -> tuple:
    """The node of a plain unsigned number such as "033", "1.50" or ".5", times a power of ten."""
    if len(digits) > MAX_DIGITS or abs(exponent) > MAX_DIGITS:
        raise TooLarge(f"a number of {len(digits)} digits and exponent {exponent} is beyond {MAX_DIGITS} digits")
    whole, point, decimals = digits.partition(".")
    value = Fraction(int(whole + decimals or "0"))
    shift = exponent - len(decimals)
    value = value * 10**shift if shift >= 0 else value / 10**-shift
    if not point:
        return ("num", value)
    return ("dec", value, max(1, len((whole + decimals).lstrip("0"))), -shift)


def _repeating(text: str) -> Fraction:
    r"""The exact value of a repeating decimal such as 0.1\overline{6}."""
    digits, repeated, _ = re.split(r"\\[a-z]+\{|\}", text)
    whole, decimals = digits.split(".")
    if len(digits) > MAX_DIGITS:
        raise TooLarge(f"a number of {len(digits)} digits is beyond {MAX_DIGITS} digits")
    head = int(whole + decimals or "0")
    return Fraction(head * 10 ** len(repeated) + int(repeated) - head, 10 ** len(decimals) * (10 ** len(repeated) - 1))


def group_ends(text: str) -> dict[int, int]:
    """Where each { of the text closes; a brace that stays open is absent. One pass, whatever is left open."""
    ends, stack = {}, []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            stack.append(match.start())
        elif match[0] == "}" and stack:
            ends[stack.pop()] = match.start()
    return ends


def tokenize(text: str, deadline_at: float = math.inf) -> list[tuple[str, object, bool]]:
    """(kind, value, whether a space stands before it); kinds: num, exact, cmd, sym, text, op, sep, row, end."""
    if len(text) > MAX_CHARS:
        raise TooLarge(f"an answer of {len(text)} characters is beyond {MAX_CHARS}")
    tokens: list[tuple[str, object, bool]] = []
    position, spaced, brackets = 0, False, 0
    ends = group_ends(text) if "{" in text else {}
    while position < len(text):
        if len(tokens) % 1024 == 0 and time.monotonic() > deadline_at:
            raise Undecided("deadline")
        match = _TOKEN.match(text, position)
        kind, value = match.lastgroup, match[match.lastgroup]
        position = match.end()
        if kind == "space":
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
            tokens.append(("exact", _repeating(value), spaced))
        elif kind == "based":
            digits, _, base = value.rstrip("}").replace("{", "").partition("_")
            if any(int(digit, 16) >= int(base) for digit in digits):
                raise ParseError(f"{digits!r} has a digit that base {base} has not")
            tokens.append(("exact", Fraction(int(digits, int(base))), spaced))
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
            elif value.startswith(("quad", "qquad")) and value not in SKIPPED:  # \quadx, a common slip in collected answers
                _word(value[value.index("d") + 1 :], tokens, True)
            elif value not in SKIPPED:
                tokens.append(("cmd", {"dfrac": "frac", "tfrac": "frac", "cfrac": "frac"}.get(value, value), spaced))
        elif kind == "half":  # of the day: 3:45 p.m.
            tokens.append(("text", value, spaced))
        elif kind == "word":
            _word(value, tokens, spaced)
        else:
            brackets += (value in "([") - (value in ")]")
            tokens.append(("sep" if value in ",;" else "op", "^" if value == "**" else value, spaced))
        spaced = False
    tokens.append(("end", "", spaced))
    return tokens


def _text_command(text: str, position: int, ends: dict[int, int], command: str, tokens: list, spaced: bool) -> int:
    r"""\text{...} and its relatives: words become a text token, mathematics inside is read as if the command were not there."""
    start = position
    while start < len(text) and text[start] == " ":
        start += 1
    end = ends.get(start)
    if end is None:
        return position
    content = text[start + 1 : end].strip(" \\,.;:~$")
    if not re.search("[A-Za-z]", content) or (command in FONT_COMMANDS and not re.fullmatch(r"[A-Za-z ]+", content)):
        return position  # the group that follows is parsed as usual
    if content[0].isdigit() and all(word.lower() in UNITS or word in ("and", "or") for word in _WORDS.findall(content)):
        return position  # \text{60 cm}
    if not tokens and _LEADING_PROSE.search(text, start, end):
        return end + 1
    if command == "mathbb" and content == "R":
        tokens.append(("cmd", "reals", spaced))
    elif len(content) == 1 and command in FONT_COMMANDS:
        _word(content, tokens, spaced)
    elif content in ("and", "or"):
        tokens.append(("sep", content, spaced))
    elif content == "to":  # the ratio 5 to 3
        tokens.append(("op", ":", spaced))
    elif (content in FUNCTIONS and not _is_unit(content, tokens)) or content in CONSTANTS:
        tokens.append(("cmd", content, spaced))
    elif content.lower() in ("percent", "pct"):
        tokens.append(("op", "%", spaced))
    else:
        tokens.append(("text", content, spaced))
    return end + 1


def _is_unit(word: str, tokens: list) -> bool:
    """Whether a function's name is a unit here: the minutes of "40 min"."""
    return word in FUNCTIONS and word in UNITS and bool(tokens) and tokens[-1][0] == "num"


def _word(word: str, tokens: list, spaced: bool) -> None:
    """A run of letters outside any command: a function, a constant, a connective, a unit or word, or a product of symbols."""
    lower = word.lower()
    glued = re.match(r"(or|and)(?=[A-Z]|[a-z]$)", word) if tokens and tokens[-1][0] == "num" else None  # "1orW(x)=-1"
    if word in ("and", "or"):
        tokens.append(("sep", word, spaced))
    elif word == "to" and tokens and tokens[-1][0] == "num":
        tokens.append(("op", ":", spaced))
    elif _is_unit(word, tokens) or (lower in ("am", "pm") and [token[1] for token in tokens[-2:-1]] == [":"]):
        tokens.append(("text", word, spaced))
    elif word in FUNCTIONS or word in CONSTANTS or word in ("sqrt", "cbrt", "binom"):
        tokens.append(("cmd", word, spaced))
    elif lower in ("percent", "pct"):
        tokens.append(("op", "%", spaced))
    elif lower in ("infinity", "infty"):
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
    elif len(word) >= 4 and not word.isupper():
        tokens.append(("text", word, spaced))
    else:
        for index, letter in enumerate(word):
            tokens.append(("sym", letter, spaced and index == 0))
