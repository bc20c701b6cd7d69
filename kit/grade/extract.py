r"""Find the answer in a response. Places are tried in a fixed order; the verdict records which one it was.

1.  `boxed`: the last complete \boxed{...}, by brace matching; \fbox, \boxed {x} and \boxed 5 count too.
    `boxes of one sentence`: that box and those before it, as one list, if only separators of a list stand
    between them. Boxes with words between them are never joined: the later one corrects the earlier.
    `final answer after the box`: a sentence "final answer is ..." or "final answer: ..." after that box, if
    it names a value.
    `answer after the box`: "Answer: ..." as the last line after that box, if it names a value; or, if an
    option is asked for and the box does not hold one, the option that is named after it.
2.  `####`: what follows the last ####, as in GSM8K.
3.  `answer statement`: what follows the last "answer is", "answer:" and their like.
4.  `whole text`: the whole response, if it is an answer without prose around it.
5.  `last mathematics` or `last number`: the last $...$, \(...\) or \[...\], unless a number follows it.
6.  `short text`: the whole response, if it has at most six words.

What follows a token that ends a turn, such as <|im_end|>, is an invented next turn and not searched. The
search begins after the last </think>. Only if it finds nothing there is the thought searched, and the
recorded name says so. In a thought that never ends only steps 1 to 3 count: the last number before a cut is
no answer.
"""

from __future__ import annotations

import re

from kit.grade.choices import bare_choice, choice_in_prose, leading_choice, stated_choice
from kit.grade.plain_text import normal
from kit.grade.prose import NUMBER, SENTENCE_END, is_bare, last_value
from kit.grade.reading import DIGITS, parse
from kit.grade.rules import Rule
from kit.turns import THOUGHT_END, first_turn, never_closes

MAX_STATEMENT = 4_000  # characters after "the answer is": what comes later is another sentence


def _openings(word: str, tail: str) -> list[str]:
    """Return patterns of a whole word in any case, each beginning with one fixed letter.

    `re` then skips quickly to the next such letter.
    """
    return [rf"{letter}(?<!\w{letter})(?i:{word[1:]}){tail}" for letter in (word[0].lower(), word[0].upper())]


_BRACES = re.compile(r"\\{1,4}(?:boxed|fbox)(?![A-Za-z])|\\[\\{}]|[{}]")
_PLAIN_BOX = re.compile(r"\\boxed\{([^{}\\]*)\}")  # most boxes: no braces inside and no commands
# a letter alone: "the \boxed notation" is not a box
_BOX_TOKEN = re.compile(r"\s*(\\[A-Za-z]+|-?[0-9]+(?:\.[0-9]+)?|[A-Za-z](?!\s?\w))")
MAX_GAP = 60  # characters between two boxes of one list
_GAP_NOISE = r"[\s$*{}]|\\[()\[\],;: ]|\\q?quad(?![A-Za-z])|\\(?:text|mbox|textbf|mathrm)(?![A-Za-z])"
_GAP_SEPARATOR = r"[,;，；、]|\b(?:and|or|et|ou|und|oder)\b|[和或]"
_GAP = re.compile(rf"(?:{_GAP_NOISE})*(?:{_GAP_SEPARATOR})(?:{_GAP_NOISE}|{_GAP_SEPARATOR})*\\{{0,3}}\Z")

_STATES = (
    r"(?i:[\s*:_=\"]{0,6}(?:\b(?:is|are|est|es|ist|lautet|é|è|هو|هي)\b|是|为|為|は|은|는|:|：|=)"
    r"[\s*:：_\"]{0,6})"
)
_HEADS = rf"(?:{_STATES}|\s?\*{{0,2}}\s{{0,3}}\n\s{{0,6}})"
_LAST = "最[终終后後]"
_ADJECTIVE = r"(?:\s(?i:corr\w{2,5}|exact\w{0,2}|finale?))?"
_STATEMENT = re.compile(
    "|".join(
        _openings(r"final\s{1,3}answer", _HEADS)
        + [p for word in ("answer", "option", "choice", "antwort") for p in _openings(word, _STATES)]
        + [
            p
            for word in ("réponse", "respuesta", "resposta", "risposta", "ответ")
            for p in _openings(word, _ADJECTIVE + _STATES)
        ]
        + [
            word + _STATES
            for word in (f"{_LAST}答案", "答案", "答", "答え", "正解", "정답", "답", "الجواب", "الإجابة")
        ]
    )
)
_FINAL = re.compile(rf"(?i:final)|{_LAST}")
# before the "Answer:" of a line, or between it and a box on the same line
_LINE_MARKUP = " \t*#>_【.。,，}$)]\\"
_NEXT_QUESTION = re.compile(r"[?？]|\b(?:Question|Problem)\b")  # a model that goes on to another question
# a backslash only if it escapes a sign: not that of \frac or \(
_OPENING = re.compile(r'\A(?:[\s*",;:]|\\(?=["\s,;:!]))+')
_DISPLAY = re.compile(r"\s*(?:\\\[(.*?)\\\]|\$\$(.*?)\$\$)", re.DOTALL)
_CONTRAST = re.compile(  # what follows explains the answer, or says what it is not
    r"[\s,;，；]{1,4}(?:because|since|which|not|rather than|instead of|no|non|nicht"
    r"|pas|et non|y no|und nicht|而不是|不是|因为|因為"
    r"|dont|其中|car|porque|weil|denn|即)(?![A-Za-z])"
)
_LEADING_SPAN = re.compile(r"\$([^$]*)\$|\\\((.*?)\\\)", re.DOTALL)  # $18$ of "$18$ is what 9 + 9 gives"
_LEADING_WORD = re.compile(r"\W{0,4}(yes|no|true|false)[,.;:!]", re.IGNORECASE)
_PREDICATE = re.compile(r"\b(?:is|are|was)\s(?:an?\s|the\s)?(\w+)\W*\Z")  # the day is Friday
_SPECIAL = re.compile(r"<\|[a-z_]{1,30}\|>(?:user|assistant)?")


def extract_answer(text: str, *, choice: bool = False) -> tuple[str | None, str]:
    """Return (the answer's text, where it was found), or (None, why not).

    choice: the letter of a multiple choice counts as an answer.
    """
    text = first_turn(text)
    thought, tag, reply = text.rpartition(THOUGHT_END)
    answer, rule = _extract(reply, choice, explicit=never_closes(text))
    if answer is None and tag:
        answer, rule = _extract(thought, choice, explicit=never_closes(text))
        return answer, f"{rule}, before </think>" if answer is not None else rule
    return answer, rule


def _extract(text: str, choice: bool, explicit: bool) -> tuple[str | None, str]:
    if not text.isascii():
        text = text.translate(DIGITS)
    if "<" in text:
        text = _SPECIAL.sub(" ", text)
    box = last_box(text) if "box" in text else None
    if box:
        start, end, content = box
        if choice or len(text) > end + 3:  # more than the punctuation after the box
            later, place = _after_the_box(text[end:], content, choice)
            if later is not None:
                return later, place
        listed = _boxes_of_sentence(text, start, end) if text.find("box", 0, start) >= 0 else None
        return (content, "boxed") if listed is None else (listed, "boxes of one sentence")
    if "####" in text:
        line = text.rpartition("####")[2].strip().partition("\n")[0].strip()
        if line:
            return line, "####"
    stated = statement(text, choice, final=False)
    if stated is not None:
        return stated, "answer statement"
    if explicit:
        return None, Rule.NO_END.value
    stripped = text.strip()
    if stripped.startswith("**") and stripped.endswith("**") and "**" not in stripped[2:-2]:
        stripped = stripped[2:-2].strip()
    if not stripped:
        return None, Rule.NOTHING.value
    if choice:
        letter = leading_choice(stripped)
        if letter:
            return letter, "leading choice"
        letter = choice_in_prose(stripped[-MAX_STATEMENT:])
        if letter:
            return letter, "choice in prose"
    if is_bare(stripped):
        return stripped, "whole text"
    found, place = last_value(text)
    if found is not None:
        return found, place
    word = _LEADING_WORD.match(stripped)
    if word:
        return word[1], "leading word"
    if len(stripped) <= 80 and len(stripped.split()) <= 6:
        word = _PREDICATE.search(stripped)
        return (word[1], "predicate") if word else (stripped, "short text")
    return None, Rule.NO_VALUE.value


def _after_the_box(tail: str, box: str, choice: bool) -> tuple[str | None, str]:
    """Return (answer, place) if what follows a box states an answer that replaces it, else (None, "")."""
    if not (choice or "nswer" in tail or "NSWER" in tail or ":" in tail or "：" in tail):
        return None, ""
    stated = statement(tail, choice, final=True)
    if stated is not None:
        return stated, "final answer after the box"
    if _NEXT_QUESTION.search(tail):
        return None, ""

    if choice and not bare_choice(normal(box))[0]:
        said = f"{normal(box)}\n{tail}"  # \boxed{\text{The answer is D}}
        stated = statement(said, choice, final=False) or choice_in_prose(said)
        if stated and bare_choice(normal(stated))[0]:
            return stated, "answer after the box"
    line = tail.strip().rpartition("\n")[2].lstrip(_LINE_MARKUP)
    marker = _STATEMENT.match(line)
    stated = line[marker.end() :].strip(" *.。") if marker else ""
    if is_bare(stated) and any(map(str.isdigit, stated)) and _is_readable(stated):
        return stated, "answer after the box"
    return None, ""


def _is_readable(text: str) -> bool:
    """Whether a text is mathematics from its first sign to its last: not a box that stays open."""
    try:
        parse(text)
    except ValueError:  # an unknown notation, or beyond a cap
        return False
    return True


def _boxes_of_sentence(text: str, start: int, end: int) -> str | None:
    """Return the last box, which spans [start, end), and those that are listed with it; None if none is."""
    if not _GAP.search(text, max(0, start - MAX_GAP), start):
        return None
    boxes = _boxes(text[:end])
    last = first = len(boxes) - 1
    while first and _GAP.fullmatch(text, boxes[first - 1][1], boxes[first][0]):
        first -= 1
    return ", ".join(box[2] for box in boxes[first:]) if first < last else None


def last_box(text: str) -> tuple[int, int, str] | None:
    """Return (start, end, content) of the last complete, non-empty box, or None."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    plain = _PLAIN_BOX.match(text, start)
    content = plain[1].strip() if plain else ""
    boxes = [(start, plain.end(), content)] if content else _boxes(text, start)
    if not boxes or "}" in text[boxes[-1][1] :]:  # a brace after it may close an earlier box
        boxes = _boxes(text)
    return boxes[-1] if boxes else None


def _boxes(text: str, position: int = 0) -> list[tuple[int, int, str]]:
    """Return (start, end, content) of every complete, non-empty box that begins at `position` or later.

    Boxes inside another are left out. One pass over the braces, however many boxes stay open.
    """
    boxes: list[tuple[int, int, str]] = []
    stack: list[tuple[int, int]] = []  # the start of a box and of its content, or of any other brace
    waiting: tuple[int, int] | None = None  # (start, end) of a \boxed whose brace may follow
    for match in _BRACES.finditer(text, position):
        sign = match[0]
        if sign == "{":
            opens = waiting and not text[waiting[1] : match.start()].strip()
            stack.append((waiting[0] if opens else -1, match.end()))
            waiting = None
        elif sign == "}":
            start, inside = stack.pop() if stack else (-1, 0)
            content = text[inside : match.start()].strip() if start >= 0 else ""
            if content:
                while boxes and boxes[-1][0] > start:
                    boxes.pop()
                boxes.append((start, match.end(), content))
        elif sign.endswith(("boxed", "fbox")):
            start = text.rfind("\\", 0, match.end())
            token = _BOX_TOKEN.match(text, match.end())
            if token:
                boxes.append((start, token.end(), token[1]))
            waiting = None if token else (start, match.end())
    return boxes


def statement(text: str, choice: bool, final: bool) -> str | None:
    """Return what the last "(final) answer is ..." names, or None.

    final: only "final answer" counts, and it must name a value: words alone do not count.
    """
    last = None
    for match in _STATEMENT.finditer(text):
        opening = match[0][:6].lower()
        if (not final or _FINAL.search(match[0])) and (choice or opening not in ("option", "choice")):
            last = match
    if last is None:
        return None
    rest = text[last.end() : last.end() + MAX_STATEMENT]
    letter = stated_choice(rest) if choice else None
    if letter:
        return letter
    display = _DISPLAY.match(rest)
    if display:
        sentence = display[1] or display[2] or ""
    else:
        end = SENTENCE_END.search(rest)
        sentence = rest[: end.start()] if end else rest
    sentence = _OPENING.sub("", sentence).rstrip(' \n\t*"\\,;:')
    if not sentence:
        return None
    head = _CONTRAST.split(sentence, maxsplit=1)[0].rstrip(" ,;*")
    if head != sentence and head:
        number = NUMBER.match(head)
        if is_bare(head) or (
            number and number[0] and not any(sign.isdigit() for sign in head[number.end() :])
        ):
            sentence = head
    if is_bare(sentence) and (not final or any(sign.isdigit() or sign in "$\\" for sign in sentence)):
        return sentence
    span = _LEADING_SPAN.match(sentence)
    is_answer = span and is_bare(span[1] or span[2] or "")
    found = span[0] if is_answer else last_value(sentence)[0]
    if found is not None:
        return found
    return sentence if not final and len(sentence) <= 60 else None
