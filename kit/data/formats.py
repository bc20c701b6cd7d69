"""The layouts in which people keep training data, recognised by a row's columns and read as turns.

    OpenR1               generations, with flags; also problem (or question), trace (or solution) and answer
    LIMO                 question, solution, answer
    s1K                  question, thinking_trajectories, attempt; in s1K-1.1 deepseek_thinking_trajectory and
                         deepseek_attempt
    OpenThoughts         problem, deepseek_reasoning, deepseek_solution; its conversations are ShareGPT's
    messages             a list of turns {"role", "content"}
    ShareGPT             conversations, a list of turns {"from", "value"}
    Alpaca               instruction, input (may be empty), output
    prompt, completion   two texts, or two lists of messages

The first that fits decides. A column `system` beside any but the first two is the system's turn. `--columns
problem=question,trace=response` names the columns of any other layout.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from kit.data.rows import PROBLEM, field_of, text_of
from kit.turns import THOUGHT, THOUGHT_END, never_closes

RESPONSE = ("trace", "solution")  # the fields in which a row with a single response keeps it
NAMED = ("problem", "trace", "messages", "answer", "solution", "system")  # what --columns may name
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = {
    "system": SYSTEM, "user": USER, "human": USER,
    "assistant": ASSISTANT, "gpt": ASSISTANT, "model": ASSISTANT,
}  # fmt: skip

NO_COMPLETE = "have no complete trace"
NO_TURNS = "have no turns"
NOT_TEXT = "have a turn that is not text"
EMPTY = "have an empty turn"
ORDER = "have roles in a wrong order, or others than system, user and assistant"
GIVEN = "have an assistant's turn in the prompt, which would be trained on"

Turn = tuple[str, str]  # role, text


class Dropped(ValueError):
    """A row that is no conversation to train on. Its text is the reason, for the drop statistics."""


Unchecked = list[tuple[object, object]]  # (role, text) of the turns that a row seems to hold


class Format(NamedTuple):
    name: str
    columns: tuple[str, ...] = ()  # by which a row is recognised
    read: Callable[..., Unchecked] | None = None  # values of all its columns -> turns; None: pick_response's
    optional: tuple[str, ...] = ()  # further columns that are read


def _asked_and_answered(asked: object, answer: object) -> Unchecked:
    return [(USER, asked), (ASSISTANT, answer)]


def _thinking(asked: object, thought: object, answer: object) -> Unchecked:
    """Read a row that keeps the chain of thought and the answer in columns of their own."""
    if isinstance(thought, list):  # s1K lists one
        thought = thought[0] if thought else ""
    response = None
    if isinstance(thought, str) and isinstance(answer, str):
        thought, answer = thought.strip(), answer.strip()
        response = f"{THOUGHT}\n{thought}\n{THOUGHT_END}\n\n{answer}" if thought and answer else ""
    return _asked_and_answered(asked, response)


def _alpaca(asked: object, answer: object, given: object) -> Unchecked:
    if isinstance(asked, str) and isinstance(given, str) and given.strip():
        asked = f"{asked}\n\n{given}"
    return _asked_and_answered(asked, answer)


def _prompt_and_completion(prompt: object, completion: object) -> Unchecked:
    if not isinstance(prompt, list):
        return _asked_and_answered(prompt, completion)
    asked = _messages(prompt)
    if ASSISTANT in dict(asked):
        raise Dropped(GIVEN)
    return asked + _messages(completion)


def _messages(turns: object) -> Unchecked:
    """Return (role, text) of a list of turns, whichever of the two pairs of names they use."""
    if not isinstance(turns, list) or not turns:
        raise Dropped(NO_TURNS)
    if not all(isinstance(turn, dict) for turn in turns):
        raise Dropped(NOT_TEXT)
    roles = [str(turn.get("role", turn.get("from"))).strip().lower() for turn in turns]
    texts = [turn.get("content", turn.get("value")) for turn in turns]
    return [(ROLES.get(role), text) for role, text in zip(roles, texts, strict=True)]


THINKING = (
    Format("s1K", ("question", "thinking_trajectories", "attempt"), _thinking),
    Format("s1K-1.1", ("question", "deepseek_thinking_trajectory", "deepseek_attempt"), _thinking),
    Format("OpenThoughts", ("problem", "deepseek_reasoning", "deepseek_solution"), _thinking),
)
CONVERSATIONS = (
    Format("messages", ("messages",), _messages),
    Format("ShareGPT", ("conversations",), _messages),
    Format("Alpaca", ("instruction", "output"), _alpaca, optional=("input",)),
    Format("prompt, completion", ("prompt", "completion"), _prompt_and_completion),
)


def format_of(row: dict) -> Format | None:
    """Return the format of a row, None if no format has its columns."""
    has = {name for name, value in row.items() if value is not None}
    if "generations" in has:
        return Format("OpenR1")
    for found in THINKING:
        if has.issuperset(found.columns):
            return found
    problem = next((name for name in PROBLEM if field_of(row, name) is not None), None)
    response = next((name for name in RESPONSE if name in has), None)
    if problem and response:
        is_limo = (problem, response) == ("question", "solution") and "answer" in has
        return Format("LIMO" if is_limo else f"{problem}, {response}")
    return next((found for found in CONVERSATIONS if has.issuperset(found.columns)), None)


def turns_of(row: dict, found: Format) -> list[Turn]:
    """Return the turns of a row: perhaps the system's, then user and assistant in turn.

    Raises Dropped, with the reason, if they are not that, and ValueError for text that nothing can read.
    """
    turns = found.read(*(row.get(name) for name in found.columns + found.optional))
    if turns[0][0] != SYSTEM and isinstance(row.get("system"), str):
        turns = [(SYSTEM, row["system"]), *turns]
    if not all(isinstance(text, str) for _, text in turns):
        raise Dropped(NOT_TEXT)
    has_system = turns[0][0] == SYSTEM
    if has_system and not turns[0][1].strip():
        turns, has_system = turns[1:], False
    roles = [role for role, _ in turns[has_system:]]
    if not roles or roles != [USER, ASSISTANT] * (len(roles) // 2):
        raise Dropped(ORDER)
    if not all(text.strip() for _, text in turns):
        raise Dropped(EMPTY)
    if any(role == ASSISTANT and never_closes(text) for role, text in turns):
        raise Dropped(NO_COMPLETE)
    return [(role, text_of({role: text}, [role])) for role, text in turns]


def parse_columns(text: str) -> dict[str, str]:
    """Return our name -> the data's column of a setting such as problem=question,trace=response; "" -> {}.

    Raises ValueError for another name than NAMED, and if there is no problem with a response and no messages.
    """
    pairs = [[part.strip() for part in word.partition("=")[::2]] for word in text.split(",") if text]
    columns = dict(pairs)
    is_whole = "messages" in columns or {"problem", "trace"} <= columns.keys()
    if text and (
        len(columns) < len(pairs) or not all(columns.values()) or not is_whole or {*columns} - {*NAMED}
    ):
        raise ValueError(
            f"columns is {text!r} but must be name=COLUMN with the names problem and trace, or messages, and "
            "if there are such columns answer, solution and system; pass for example "
            "--columns problem=question,trace=response"
        )
    return columns


def recognise(row: dict, columns: Mapping[str, str]) -> tuple[dict, Format | None]:
    """Return (the row under the names that we use, its format). columns: see parse_columns.

    If columns are named, the row has these alone.
    """
    if not columns:
        return row, format_of(row)
    row = {name: field_of(row, column) for name, column in columns.items()}
    name = ", ".join(f"{name}={column}" for name, column in columns.items())
    if "messages" in columns:
        return row, Format(name, ("messages",), _messages)
    return row, Format(name, ("problem", "trace"), _asked_and_answered)


def check_columns(source: str, row: dict, columns: Mapping[str, str]) -> None:
    """Raise ValueError if rows like the first cannot be read, with its columns and with what to pass."""
    absent = [column for column in columns.values() if column.split(".")[0] not in row]
    if absent:
        raise ValueError(
            f"--columns names {', '.join(absent)} but the first row of {source} has the columns "
            f"{', '.join(row)}; name some of these"
        )
    named = {name: "" if value is None else value for name, value in row.items()}  # a null is a bad row's
    if len(row) > 1 and not columns and format_of(named) is None:  # one column has no other to be named
        others = (found.name for found in (*THINKING, *CONVERSATIONS))
        names = "; ".join(["OpenR1", "problem, trace, answer", "LIMO", *others])
        raise ValueError(
            f"{source} has the columns {', '.join(row)}, which are those of no known format "
            f"({names}); name them, with --traces as --columns {_guess(list(row))}, or rename them"
        )


ALIKE = {  # what others call a problem and a response
    "problem": (*PROBLEM[:2], "instruction", "query", "prompt", "input", "user"),
    "trace": (*RESPONSE, "response", "completion", "output", "reasoning", "cot", "assistant", "answer"),
}


def _guess(columns: list[str]) -> str:
    """Return the --columns that would probably help."""
    pairs = []
    for name, alike in ALIKE.items():
        near = (difflib.get_close_matches(word, columns, n=1, cutoff=0.7) for word in alike)
        pairs.append(f"{name}={next((found[0] for found in near if found), 'COLUMN')}")
    return ",".join(pairs)
