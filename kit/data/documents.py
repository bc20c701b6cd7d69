"""Documents: traces as token ids, rendered with the model's chat template, tokenised once and cached."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kit.data.chat import ChatFormat
from kit.data.traces import DropCounts, Trace, read_traces
from kit.packing import Document
from kit.progress import Progress
from kit.run import digest

CHUNK = 256  # traces tokenised at once: enough for all cores, few enough to stop soon after the last needed


def make_documents(traces: list[Trace], chat: ChatFormat) -> list[Document]:
    """Tokenise traces: the prompt's ids, which carry no loss, then the response's and its end of turn."""
    prompts = chat.encode([chat.prompt(trace.problem) for trace in traces])
    responses = chat.encode([chat.response(trace.response) for trace in traces])
    return [
        Document(torch.tensor(prompt + response, dtype=torch.int32), len(prompt))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def tokenize(
    traces: list[Trace], chat: ChatFormat, *, row_tokens: int, num_traces: int = 0, cache_dir: str = ""
) -> tuple[list[Document], int]:
    """Return the first num_traces (0 = all) of `traces` that fit row_tokens, as documents.

    Return also the number of longer ones before the last of them.

    Reads and writes a cache in cache_dir ("" = none), keyed by the content of everything that it depends on.
    """
    if not cache_dir:
        return _tokenize(traces, chat, row_tokens, num_traces)

    key = digest(chat.key, str(row_tokens), str(num_traces), *(f"{t.problem}\0{t.response}" for t in traces))
    path = Path(cache_dir).expanduser() / f"{key}.safetensors"
    found = _read_cache(path) if path.is_file() else None
    if found is None:
        found = _tokenize(traces, chat, row_tokens, num_traces)
        _write_cache(path, *found)
    return found


def _tokenize(
    traces: list[Trace], chat: ChatFormat, row_tokens: int, num_traces: int
) -> tuple[list[Document], int]:
    wanted = min(num_traces or len(traces), len(traces))
    documents: list[Document] = []
    num_long = 0
    with Progress("tokenising", "traces", wanted) as progress:
        for start in range(0, len(traces), CHUNK):
            for document in make_documents(traces[start : start + CHUNK], chat):
                if len(documents) == wanted:
                    return documents, num_long
                if len(document) > row_tokens:
                    num_long += 1
                    continue
                documents.append(document)
                progress.update()
    return documents, num_long


def _read_cache(path: Path) -> tuple[list[Document], int] | None:
    """Return the documents in a cache file; None, with a message, if the file cannot be read."""
    try:
        flat = load_file(path)
    except SafetensorError as error:
        print(f"the token cache {path} cannot be read ({error}) and is replaced")
        return None

    ids = flat["ids"].split(flat["lengths"].tolist())
    documents = [Document(i, p) for i, p in zip(ids, flat["prompt_lens"].tolist(), strict=True)]
    return documents, int(flat["num_long"])


def _write_cache(path: Path, documents: list[Document], num_long: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    flat = {
        "ids": torch.cat([torch.zeros(0, dtype=torch.int32), *(document.ids for document in documents)]),
        "lengths": torch.tensor([len(document) for document in documents], dtype=torch.int64),
        "prompt_lens": torch.tensor([document.prompt_len for document in documents], dtype=torch.int64),
        "num_long": torch.tensor(num_long),
    }
    save_file(flat, scratch)
    scratch.replace(path)  # so that a kill leaves a whole file or none


def load_documents(
    source: str,
    chat: ChatFormat,
    *,
    row_tokens: int,
    num_traces: int = 0,
    seed: int = 0,
    max_bad_rows: int = 0,
    verify: str | bool = "llama",
    shuffle: bool = True,
    long_share: float = 1.0,
    cache_dir: str = "",
) -> tuple[list[Document], DropCounts]:
    """Load num_traces documents (0 = all) of at most row_tokens tokens from `source`; count what was dropped.

    If there are fewer than num_traces, all are returned, and the counts say so.

    source, seed, max_bad_rows, verify, shuffle, long_share: see read_traces. cache_dir: see tokenize.
    Raises ValueError if no trace survives.
    """
    # read some more than needed: with the paper's row length less than 1 % of the traces are too long
    limit = num_traces + num_traces // 8 + 64 if num_traces else 0
    while True:
        traces, counts = read_traces(
            source,
            seed=seed,
            limit=limit,
            max_bad_rows=max_bad_rows,
            verify=verify,
            shuffle=shuffle,
            long_share=long_share,
        )
        documents, num_long = tokenize(
            traces, chat, row_tokens=row_tokens, num_traces=num_traces, cache_dir=cache_dir
        )
        if len(documents) >= num_traces or len(traces) < limit:
            break
        limit *= 4  # many were too long: look further down the order

    if num_long:
        counts.dropped[f"are longer than {row_tokens:,} tokens"] = num_long
    if unused := len(traces) - len(documents) - num_long:
        counts.dropped["come later in the order"] += unused
    counts.kept, counts.wanted = len(documents), num_traces

    if not documents:
        raise ValueError(
            f"row_tokens is {row_tokens} and no trace of {source} survives ({counts}); "
            "raise --row_tokens or mend the data"
        )
    return documents, counts
