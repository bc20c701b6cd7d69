"""The generations of a row in OpenR1-Math-220k's schema, with the flags that stand in lists parallel to them.

A list may be absent or shorter than `generations`: what it does not say is not known. A flag may be written
as text or as a number. A generation that holds no usable text costs itself only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kit.data.rows import text_of
from kit.turns import never_closes

PARALLEL = ("correctness_math_verify", "correctness_llama", "is_reasoning_complete", "finish_reasons")
VERIFY = {"llama": "llama", "math": "math", "none": "none", True: "llama", False: "none"}
PADDED = "have fewer flags than generations (the others count as not known)"
UNUSABLE = "have a generation without usable text (the others count)"
WORDS = {True: ("true", "1", "1.0"), False: ("false", "0", "0.0"), None: ("none", "null", "")}
FLAGS = {word: flag for flag, words in WORDS.items() for word in words}


def check_verify(verify: str | bool) -> str:
    """Return who decides which generations are correct: "llama", "math" or "none". Raises ValueError."""
    if verify not in VERIFY:
        raise ValueError(
            f"verify is {verify!r} but must be math (Math-Verify decides), llama (a trace that Llama alone "
            "accepted counts, too) or none (wrong traces count, too)"
        )
    return VERIFY[verify]


class Generation(NamedTuple):
    """One of a row's responses. The verdicts are None if they are not known."""

    text: str
    complete: bool  # False if a flag, its finish reason or a thought that never closes says that it is not
    math: bool | None  # the verdict of Math-Verify
    llama: bool | None  # the verdict of Llama-3.3-70B


def generations_of(row: dict) -> list[Generation]:
    """Read a row's generations, without those that hold no usable text.

    Raises ValueError that names the malformed field, which is the first generation if none is usable.
    """
    generations = row["generations"]
    if not isinstance(generations, list) or not generations:
        found = "an empty list" if generations == [] else f"a {type(generations).__name__}"
        raise ValueError(f"field generations is {found}")

    math, llama, complete = (_flags(row, name, len(generations)) for name in PARALLEL[:3])
    finish = _parallel(row, PARALLEL[3], len(generations))
    texts = list(_texts(generations))
    usable = [i for i, text in enumerate(texts) if isinstance(text, str)]
    if not usable:
        raise texts[0]
    cut_off = [str(reason).strip().lower() == "length" for reason in finish]
    return [
        Generation(
            texts[i],
            complete[i] is not False and not cut_off[i] and not never_closes(texts[i]),
            math[i],
            llama[i],
        )
        for i in usable
    ]


def notes_on(row: dict) -> list[str]:
    """Return what else is to be known of a row that was read: PADDED, UNUSABLE."""
    generations = row.get("generations") or []
    lists = [row[name] for name in PARALLEL if isinstance(row.get(name), list)]
    is_padded = any(len(values) < len(generations) for values in lists)
    is_unusable = any(isinstance(text, ValueError) for text in _texts(generations))
    return [PADDED] * is_padded + [UNUSABLE] * is_unusable


def _texts(generations: list) -> Iterator[str | ValueError]:
    """Yield each generation's text, or the error that says why it has none."""
    for i, value in enumerate(generations):
        name = f"generations[{i}]"
        try:
            yield text_of({name: value}, [name])
        except ValueError as error:
            yield error


def _flags(row: dict, name: str, count: int) -> list[bool | None]:
    """Return a list of flags as what they say."""
    values = _parallel(row, name, count)
    words = [str(value).strip().lower() for value in values]
    for place, word in enumerate(words):
        if word not in FLAGS:
            raise ValueError(f"field {name}[{place}] is {values[place]!r}, which says neither true nor false")
    return [FLAGS[word] for word in words]


def _parallel(row: dict, name: str, count: int) -> list:
    """Return a list parallel to `generations`, of which there are `count`; None for what it does not have."""
    value = [] if row.get(name) is None else row[name]
    if not isinstance(value, list) or len(value) > count:
        found = f"{len(value)} entries" if isinstance(value, list) else f"a {type(value).__name__}"
        raise ValueError(f"field {name} has {found} but generations has {count} entries")
    return value + [None] * (count - len(value))
