"""Let several models answer at the same time: they take turns, a token each.

Each model's answer is a thread, of which one runs at a time: it hands over where the sampler passes a token
on. On a card the next token may be queued by then; all models share one stream, which keeps their order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

Work = Callable[[Callable[..., None]], object]  # is passed what it calls after every token


class _Stopped(BaseException):
    """Ends the work of a thread at its next token."""


class _Turns(threading.Thread):
    """One piece of work, which runs from token to token."""

    def __init__(self, work: Work):
        super().__init__(daemon=True, name="answer")
        self.work = work
        self.may_run, self.has_paused = threading.Semaphore(0), threading.Semaphore(0)
        self.has_ended = self.must_stop = False
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._wait()
            self.work(self._pause)
        except _Stopped:
            pass  # as it was asked to
        except BaseException as error:  # raised again where the turns are given
            self.error = error
        self.has_ended = True
        self.has_paused.release()

    def _pause(self, *_) -> None:
        self.has_paused.release()
        self._wait()

    def _wait(self) -> None:
        self.may_run.acquire()
        if self.must_stop:
            raise _Stopped

    def advance(self) -> None:
        """Run up to the next token."""
        self.may_run.release()
        self.has_paused.acquire()
        if self.error:
            raise self.error

    def stop(self) -> None:
        self.must_stop = True
        self.may_run.release()
        self.join()


def take_turns(works: Sequence[Work], after_turn: Callable[[], object]) -> None:
    """Run all works to their end, by turns.

    works: each is called with a function that it calls after every token, with any arguments.
    after_turn: called when each has had its turn.
    An error of a work is raised here. Whatever is raised, also Ctrl-C, ends the others at their next token.
    """
    turns = [_Turns(work) for work in works]
    for turn in turns:
        turn.start()
    try:
        while not all(turn.has_ended for turn in turns):
            for turn in turns:
                if not turn.has_ended:
                    turn.advance()
            after_turn()
    finally:
        for turn in turns:
            turn.stop()
