r"""Find and normalise an answer as the paper's grader does."""

from __future__ import annotations

import re

from kit.grade.vocabulary import names

CHOICES = frozenset("ABCDE")
LETTER = re.compile(r"\b[A-E]\b")
_NUMBERS = re.compile(r"-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")
_CURLY = re.compile(r"[{}]")


def extract(response: str) -> str:
    """Return the answer's text in a response, or ""."""
    _, formal, ending = response.partition("final answer is $")
    if formal and "$. I hope" in ending:
        answer = ending.partition("$. I hope")[0].strip()
    elif "boxed" in response:
        answer = _box(response.rpartition("boxed")[2])
    elif "he answer is" in response:
        answer = response.rpartition("he answer is")[2].strip()
    elif "final answer is" in response:
        answer = response.rpartition("final answer is")[2].strip()
    elif "答案是" in response:
        answer = response.split("答案是", 2)[1].strip().partition("\n\n")[0].strip()
    else:
        answer = max(_NUMBERS.findall(response.replace(",", ""))[-1:], default="")
    answer = re.sub(r"\n\s*", "", answer).removeprefix(":")
    return answer.removesuffix(".").removesuffix("/")


def _box(rest: str) -> str:
    """Return the content of the box that `rest` opens, up to the end if it does not close."""
    if not rest.startswith("{"):
        return rest.partition("$")[0].strip()
    depth = 0
    for brace in _CURLY.finditer(rest):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return rest[1 : brace.start()]
    return rest[1:]


def choice_in(response: str) -> str:
    """Return the letter of a multiple choice.

    It is the first after "answer is" or "choice is", else the last in the response.
    """
    repeated = any(response.count(phrase) > 1 for phrase in ("answer is", "choice is"))
    parts = re.split(
        r"choice is|answer is", response.strip("\n").partition("\n\n")[0] if repeated else response
    )
    letters = LETTER.findall(parts[-1].upper())
    if letters:
        return letters[0 if len(parts) > 1 else -1]
    return parts[-1].strip(" \n:").rstrip("./")


# words that are dropped if they stand alone, with or without an s; the single letters are intended
_UNITS = names(
    "degree deg mph kmph kmh ft feet inch inche mile yard rd km m cm mm dm metre meter mt mtr kg g gm lb "
    "gal gallon l liter litre acre hectare cc hr h hour min minute sec second s day month year yr am pm sq "
    "square cubic cube unit percent ohm men man women woman apple coin toy tile mark monkey soldier pie "
    "rupee rs rounds ratio number per by more les increase decrease gain los profit exces ris rise east "
    "west way noon th st t a c d o ab bc mp lt are pure prime Surface"
)
_UNIT = re.compile(r"(^|\W)(?:" + "|".join(sorted(_UNITS, key=len, reverse=True)) + r")s?(?=$|\W)")
_SAME = (
    ("\\!", ""), ("bmatrix", "pmatrix"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\neq", "\\ne"),
    ("\\leq", "\\le"), ("\\geq", "\\ge"), ("\\left", ""), ("\\right", ""), ("\\{", "{"), ("\\}", "}"),
)  # fmt: skip
_DROPPED = ("^{\\circ}", "^\\circ", "\\$", "$", "\\(", "\\)")
_ASSIGNED = re.compile(r"[xyz](?:=|\\in|\\to)")
_LAST_TEXT = re.compile(r"\\text\{.*\}$")  # from the first one on
_ZEROS = re.compile(r"([0-9])\.0*(?![0-9])")  # 5.00 and 5. are 5


def normalise(text: str) -> str:
    """Return the text as the paper's code compares it."""
    text = re.sub(r"\\(begin|end)\{array\}(?:(?<=begin\{array\})\{[^}]*\})?", r"\\\1{pmatrix}", text.strip())
    text = text.replace("\n", "").rstrip(".")
    for old, new in _SAME:
        text = text.replace(old, new)
    text = _LAST_TEXT.sub("", text).strip() or text
    for _ in range(2):
        text = _UNIT.sub(r"\1", text) or text
    for sign in _DROPPED:
        text = text.replace(sign, "")
    text = _word_number(text)
    text = _ASSIGNED.sub("", re.sub(r"\\text\{(.*?)\}", r"\1", text))
    text = text.replace("\\emptyset", "{}").replace("(-\\infty,\\infty)", "\\mathbb{R}")
    text = text.replace("\\%", "").replace("%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = text.replace("infinity", "\\infty")
    text = text if "\\infty" in text else text.replace("inf", "\\infty")
    text = re.sub(r"\\mbox\{[^}]*\}", "", text.replace("and", "").replace("\\mathbf", ""))
    if "j" in text and "i" not in text:
        text = text.replace("j", "i")
    text = _ZEROS.sub(r"\1", text)
    text = "0" + text if text.startswith(".") else text
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left) <= 2:
        text = right
    text = re.sub(r"\\sqrt(\w+)", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{\\])(?=\{)", r"\\frac{\1}", text)
    text = re.sub(r"\\frac([^{\\])([^{])", r"\\frac{\1}{\2}", text)
    return re.sub(r"^(-?[0-9]+)/(-?[0-9]+)$", r"\\frac{\1}{\2}", text)


_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_COUNTS = {word: value for value, word in enumerate(_ONES.split())}
_COUNTS |= {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}


def _word_number(text: str) -> str:
    """Return the digits of a number in words (42 for "forty-two apples"), else the text itself."""
    total = part = 0
    found = False
    for word in text.lower().replace("-", " ").split() if len(text) < 400 else ():
        if word in _COUNTS:
            part += _COUNTS[word]
        elif word == "hundred":
            part = 100 * (part or 1)
        elif word in _SCALES:
            total, part = total + (part or 1) * _SCALES[word], 0
        else:
            continue
        found = True
    return str(total + part) if found else text
