"""Ask models a question as evaluation does, and show their answers while they are written."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TextIO

import torch

from kit.data import toy
from kit.data.arithmetic import PROMPT
from kit.data.expressions import evaluate
from kit.data.problems import Question
from kit.evaluate import marks
from kit.generate.sampler import stream
from kit.generate.sampling import SamplingParams
from kit.models.backbone import context_length
from kit.terminal import Columns, has_colours, is_live, num_columns, visible

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kit.data.chat import ChatFormat

REDRAW_EVERY = 0.05  # seconds, at least
REDRAW_SHARE = 0.2  # of the time may go into drawing, at most
# plain arithmetic: nothing but numbers and operators, and what asks for the value
ARITHMETIC = re.compile(r"\s*(?P<expression>[\d(-][\d\s.()+*/-]*[-+*/][\d\s.()+*/-]*)[=?\s]*")


def expression_of(question: str) -> str:
    """Return the expression that a question consists of, such as 3+2-4; "" if there is more to it."""
    plain = ARITHMETIC.fullmatch(question)
    if not plain or re.search(r"[\d.]\s+[\d.]", plain["expression"]):  # 3+2 4 is no sum of 3 and 24
        return ""
    return re.sub(r"\s", "", plain["expression"])


def computed_gold(question: str) -> str:
    """Return the value of plain arithmetic; "" for any other question."""
    try:
        return str(evaluate(expression_of(question)))
    except ValueError:
        return ""


@dataclass
class Side:
    """A model that is asked, and its answer to the last question."""

    title: str
    model: PreTrainedModel
    chat: ChatFormat
    cuda_graphs: bool = True  # as kit.generate.generate takes it
    history: list[tuple[str, str]] = field(default_factory=list)  # (problem, answer) of the turns before
    ids: list[int] = field(default_factory=list)
    has_ended: bool = False
    ending: str = ""  # how, if not by itself

    @property
    def is_toy(self) -> bool:
        return self.chat.template == toy.TEMPLATE

    @property
    def text(self) -> str:
        """The answer so far, without the beginning of a character that takes several tokens."""
        text = self.chat.decode(self.ids)
        return text if self.has_ended else text.rstrip("\ufffd")

    def problem(self, question: str) -> str:
        """Return plain arithmetic in the words of its benchmark, any other question unchanged."""
        expression = expression_of(question)
        if self.is_toy:
            return f"{expression}?" if expression else question
        return PROMPT + expression if expression else question

    def answer(self, question: str, params: SamplingParams, *, seed: int, sample: int) -> Generator[None]:
        """Draw the answer that evaluation logs as this sample of the question, and yield after every token.

        params.max_new_tokens is lowered to what the model's context leaves.
        Raises ValueError if it leaves nothing, and if memory runs out.
        """
        problem = self.problem(question)
        (prompt,) = self.chat.encode([self.chat.prompt(problem, self.history)])
        room = context_length(self.model) - len(prompt)
        if room < 1:
            raise ValueError(
                f"{self.title}: the conversation has {len(prompt):,} tokens and the model's context "
                f"{context_length(self.model):,}; forget it with /new, or ask without --history"
            )

        limit = min(params.max_new_tokens, room)
        steps = stream(
            self.model,
            [prompt],
            replace(params, max_new_tokens=limit),
            num_slots=1,
            seed=seed,
            eos_token_id=self.chat.eos_token_ids,
            cuda_graphs=self.cuda_graphs,
            keys=[[Question.of({"problem": problem, "answer": "?"}).id, sample]],
        )
        is_whole = False
        try:
            with closing(steps):
                for step in steps:
                    for _, token, completion in step:
                        self.ids.append(token)
                        is_whole = completion is not None and completion.finished
                    yield
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{self.title}: memory ran out after {len(self.ids):,} of up to {limit:,} tokens; pass a "
                "smaller --max_new_tokens, or ask fewer models at once"
            ) from error
        self.has_ended = True
        if not is_whole:
            is_asked = limit == params.max_new_tokens
            self.ending = "cut off by max_new_tokens" if is_asked else "cut off: its context is full"


def take_turns(works: Sequence[Generator], after_turn: Callable[[], object]) -> None:
    """Run all works to their end, by turns, and call after_turn when each has had its turn.

    Whatever is raised, also Ctrl-C, closes the others. On a card the next token may be queued by then; all
    models share one stream, which keeps their order.
    """
    ended = object()
    with ExitStack() as stack:
        running = [stack.enter_context(closing(work)) for work in works]
        while running:
            running = [work for work in running if next(work, ended) is not ended]
            after_turn()


class _View:
    """The answers of some models on a screen, or as plain text when they have ended."""

    def __init__(self, sides: Sequence[Side], out: TextIO):
        self.sides, self.out = sides, out
        titles = [side.title for side in sides]
        self.columns = Columns(titles, out, colours=has_colours(out)) if is_live(out) else None
        self.next_drawing = 0.0

    def update(self) -> None:
        start = time.perf_counter()
        if not self.columns or start < self.next_drawing:
            return
        self._draw()
        end = time.perf_counter()
        self.next_drawing = end + max(REDRAW_EVERY, (end - start) / REDRAW_SHARE)

    def _draw(self) -> None:
        texts = [side.text for side in self.sides]
        ended = [side.has_ended for side in self.sides]
        found = [marks.marks_of(text, is_whole=over) for text, over in zip(texts, ended, strict=True)]
        tokens = [f"{len(side.ids):,} tokens" for side in self.sides]
        self.columns.draw(texts, found, ended, tokens)

    def end(self, gold: str) -> None:
        """Show the whole answers, and below each what it shows."""
        notes = [marks.summary(side.text, len(side.ids), gold, side.ending) for side in self.sides]
        if self.columns:
            self._draw()
            self.columns.notes(notes)
            return
        for side, note in zip(self.sides, notes, strict=True):
            text = visible(f"== {side.title} ==\n{side.text.rstrip()}\n-- {note}\n")
            print(text, file=self.out, flush=True)


def ask(
    sides: Sequence[Side],
    question: str,
    params: SamplingParams,
    *,
    seed: int = 0,
    sample: int = 0,
    gold: str = "",
    history: bool = False,
    out: TextIO | None = None,
) -> bool:
    """Show the answers to a question, as many side by side as the terminal has room for.

    sample: how often the question has been asked before. gold: "" = computed for plain arithmetic.
    history: remember the turn, and show it to the models when they are asked again.
    Return False after Ctrl-C, which ends the answers. Raises ValueError as Side.answer does.
    """
    out = out or sys.stdout
    for side in sides:
        side.ids, side.has_ended, side.ending = [], False, ""
    at_once = num_columns(len(sides)) if is_live(out) else 1
    goes_on = True
    for first in range(0, len(sides), at_once):
        group = sides[first : first + at_once]

        view = _View(group, out)
        with view.columns or nullcontext():
            try:
                answers = [side.answer(question, params, seed=seed, sample=sample) for side in group]
                take_turns(answers, view.update)
            except KeyboardInterrupt:
                goes_on = False
            for side in group:
                side.ending = side.ending if side.has_ended else "stopped"
                side.has_ended = True
            view.end(gold or computed_gold(question))
        if history:
            for side in group:
                side.history.append((side.problem(question), side.text))
        if not goes_on:
            break
    return goes_on
