"""Traces far too long for a row are cut to a beginning that shows it, and no chunk of traces is large.

Tokenising ten megabytes takes a minute and gigabytes of memory, to find out that no row holds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kit.data.chat import ChatFormat
from kit.data.responses import Trace

CHUNK = 256  # traces tokenised at once: enough for all cores, few enough to stop soon after the last needed
CHUNK_CHARACTERS = 2_000_000  # of those traces; each takes 100 to 400 bytes while it is tokenised
WIDE = 8  # characters per token that ordinary text does not reach; longer texts are looked at first
MARGIN = 64  # tokens: where a beginning is cut off, it may have a few that the whole text does not have


def bounded(trace: Trace, chat: ChatFormat, row_tokens: int) -> Trace:
    """Return the trace, with the beginning alone of a text that no row of row_tokens tokens holds.

    The beginning is too long for a row itself.
    """

    def cut(text: str) -> str:
        size = _hopeless_size(text.strip(), chat, row_tokens)
        return text if size is None else text.strip()[:size]

    before = tuple((role, cut(text)) for role, text in trace.before)
    return replace(trace, problem=cut(trace.problem), response=cut(trace.response), before=before)


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
        characters += sum(len(text) for _, text in chunk[-1].turns)
        if len(chunk) == CHUNK or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    yield chunk
