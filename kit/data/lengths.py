"""Traces far too long for a row are cut to a beginning that shows it, and no chunk of traces is large.

Tokenising ten megabytes takes a minute and gigabytes of memory, to find out that no row holds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kit.data.chat import ChatFormat
from kit.data.traces import Trace

CHUNK = 256  # traces tokenised at once: enough for all cores, few enough to stop soon after the last needed
CHUNK_CHARACTERS = 2_000_000  # of those traces; each takes 100 to 400 bytes while it is tokenised
WIDE = 8  # characters per token that ordinary text does not reach; longer texts are looked at first
MARGIN = 64  # tokens: where a beginning is cut off, it may have a few that the whole text does not have


def bounded(trace: Trace, chat: ChatFormat, row_tokens: int) -> Trace:
    """Return the trace, with the beginning alone of a text that no row of row_tokens tokens holds.

    The beginning is too long for a row itself.
    """
    texts = trace.problem.strip(), trace.response.strip()
    problem, response = (text[: _hopeless_size(text, chat, row_tokens)] for text in texts)
    return trace if (problem, response) == texts else replace(trace, problem=problem, response=response)


def _hopeless_size(text: str, chat: ChatFormat, row_tokens: int) -> int | None:
    """Return the size of a beginning with more than row_tokens tokens; None if the whole text could fit.

    No bound on the length of a token is needed, which spaces in a row or unknown characters would break: the
    beginnings get longer until one is too long or the whole text is reached.
    """
    size = WIDE * (row_tokens + MARGIN)
    while size < len(text):
        if len(chat.encode([text[:size]])[0]) > row_tokens + MARGIN:
            return size
        size *= 2
    return None


def chunks(traces: list[Trace], chat: ChatFormat, row_tokens: int) -> Iterator[list[Trace]]:
    """Yield all traces in order, bounded, as lists to tokenise at once."""
    chunk: list[Trace] = []
    characters = 0
    for trace in traces:
        chunk.append(bounded(trace, chat, row_tokens))
        characters += len(chunk[-1].problem) + len(chunk[-1].response)
        if len(chunk) == CHUNK or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    yield chunk
