"""Documents: traces as token ids, rendered with the model's chat template, tokenised once and cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, islice
from pathlib import Path
from types import MappingProxyType

import torch

from kit.data.chat import ChatFormat
from kit.data.drop_counts import DropCounts
from kit.data.formats import ASSISTANT
from kit.data.lengths import bounded, chunks
from kit.data.mixtures import NO_SHORT, REWRITTEN, SHORTENED, TooLong
from kit.data.overlap import count_overlaps
from kit.data.responses import Trace
from kit.data.rows import SHOWN
from kit.data.token_cache import KIND, read_cache, write_cache
from kit.data.traces import read_traces
from kit.packing import Document
from kit.progress import Progress
from kit.run import digest


def make_documents(traces: list[Trace], chat: ChatFormat) -> list[Document]:
    """Tokenise traces: the prompt's ids, which carry no loss, then the response's and its end of turn.

    A conversation goes on with what the next turn gives, which carries no loss, and with its response.
    """
    texts = [chat.conversation(trace) for trace in traces]
    encoded = iter(chat.encode(list(chain.from_iterable(texts))))
    documents = []
    for parts in texts:
        ids = list(islice(encoded, len(parts)))
        ends = list(accumulate(map(len, ids)))
        flat = torch.tensor(list(chain.from_iterable(ids)), dtype=torch.int32)
        documents.append(Document(flat, ends[0], tuple(zip(ends[1:-1:2], ends[2::2], strict=True))))
    return documents


def tokenize(
    traces: list[Trace], chat: ChatFormat, *, row_tokens: int, num_traces: int = 0, cache_dir: str = ""
) -> tuple[list[Document], TooLong]:
    """Return the first num_traces (0 = all) of `traces` that fit row_tokens, as documents.

    Return also the number of longer ones before the last of them. In the place of one with a `short` trace is
    that one, if it fits.

    Reads and writes a cache in cache_dir ("" = none), keyed by the content of everything that it depends on.
    """
    if not cache_dir:
        return _tokenize(traces, chat, row_tokens, num_traces)

    texts = (t and (t.problem, t.response, *t.before) for trace in traces for t in (trace, trace.short))
    key = digest(KIND, chat.key, str(row_tokens), str(num_traces), *map(str, texts))
    path = Path(cache_dir).expanduser() / f"{key}.safetensors"
    found = read_cache(path)
    if found is None:
        found = _tokenize(traces, chat, row_tokens, num_traces)
        write_cache(path, *found)
    return found


def _tokenize(
    traces: list[Trace], chat: ChatFormat, row_tokens: int, num_traces: int
) -> tuple[list[Document], TooLong]:
    wanted = min(num_traces or len(traces), len(traces))
    documents: list[Document] = []
    dropped = shortened = rewritten = 0
    with Progress("tokenising", "traces", wanted) as progress:
        for chunk in chunks(traces, chat, row_tokens):
            for trace, document in zip(chunk, make_documents(chunk, chat), strict=True):
                if len(documents) == wanted:
                    return documents, TooLong(dropped, shortened, rewritten)
                fits = len(document) <= row_tokens
                if not fits and trace.short:
                    trace = trace.short
                    (document,) = make_documents([bounded(trace, chat, row_tokens)], chat)
                if len(document) > row_tokens:
                    dropped += 1
                    continue
                shortened += not fits
                answers = sum(role == ASSISTANT for role, _ in trace.turns)
                rewritten += 1 + len(document.no_loss) < answers
                documents.append(document)
                progress.update()
    return documents, TooLong(dropped, shortened, rewritten)


def load_documents(
    source: str,
    chat: ChatFormat,
    *,
    row_tokens: int,
    num_traces: int = 0,
    held_out: int = 0,
    benchmarks: Mapping[str, Sequence[str] | None] = MappingProxyType({}),
    cache_dir: str = "",
    **reading,
) -> tuple[list[Document], DropCounts]:
    """Load num_traces documents (0 = all) of at most row_tokens tokens from `source`; count what was dropped.

    If there are fewer than num_traces, all are returned, and the counts say so. held_out: so many more are
    returned behind these, if there are; `kept` of the counts does not count them.

    benchmarks: name -> its problems, None if they are not at hand; the counts say how many of the problems
    that were tokenised overlap them. cache_dir: see tokenize. source, reading: as for read_traces.
    Raises ValueError if no trace survives.
    """
    num_wanted = num_traces + held_out
    # read some more than needed: with the paper's row length less than 1 % of the traces are too long
    limit = num_wanted + num_wanted // 8 + 64 if num_wanted else 0
    while True:
        traces, counts = read_traces(source, limit=limit, **reading)
        documents, too_long = tokenize(
            traces, chat, row_tokens=row_tokens, num_traces=num_wanted, cache_dir=cache_dir
        )
        if len(documents) >= num_wanted or len(traces) + counts.dropped[NO_SHORT] < limit:
            break
        print(f"            {len(documents):,} of the first {limit:,} traces can be used; reading more")
        limit *= 4  # many were too long, or had no short trace: look further down the order

    counts.dropped[f"are longer than {row_tokens:,} tokens"] = too_long.dropped
    counts.dropped["come later in the order"] += len(traces) - len(documents) - too_long.dropped
    counts.noted[SHORTENED], counts.noted[REWRITTEN] = too_long.shortened, too_long.rewritten
    taken = [trace.asked for trace in traces[: len(documents) + too_long.dropped]]
    counts.overlaps = count_overlaps(taken, benchmarks)
    counts.kept, counts.wanted = min(len(documents), num_traces or len(documents)), num_traces

    if not documents:
        listed = f"; bad rows: {' | '.join(counts.bad_rows[:SHOWN])}" if counts.bad_rows else ""
        fault, remedy = f"no trace of {source} survives ({counts}){listed}", "mend the data"
        if too_long.dropped:
            fault, remedy = f"row_tokens is {row_tokens} and {fault}", f"raise --row_tokens or {remedy}"
        raise ValueError(f"{fault}; {remedy}")
    return documents, counts
