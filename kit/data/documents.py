"""Documents: traces as token ids, rendered with the model's chat template, tokenised once and cached on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from kit.data.chat import ChatFormat
from kit.data.traces import DropCounts, Trace, read_traces
from kit.packing import Document
from kit.run import digest

CHUNK = 256  # traces tokenised at once: enough to keep every core busy, little enough to stop soon after n are found


def make_documents(traces: list[Trace], chat: ChatFormat) -> list[Document]:
    """Tokenise traces: prompt ids, which carry no loss, then the response and its end of turn."""
    prompts = chat.encode([chat.prompt(trace.problem) for trace in traces])
    responses = chat.encode([trace.response.strip() + chat.end_of_turn for trace in traces])
    return [
        Document(torch.tensor(p + r, dtype=torch.int32), len(p))
        for p, r in zip(prompts, responses, strict=True)
    ]


def tokenize(
    traces: list[Trace], chat: ChatFormat, *, row_tokens: int, num_traces: int = 0, cache_dir: str = ""
) -> tuple[list[Document], int]:
    """Return the first num_traces (0 = all) of `traces` that fit row_tokens, as documents, and how many
    before them were too long.

    Reads and writes a cache under cache_dir ("" = none), keyed by the content of everything it depends on.
    """
    if not cache_dir:
        return _tokenize(traces, chat, row_tokens, num_traces)
    key = digest(chat.key, str(row_tokens), str(num_traces), *(f"{t.problem}\0{t.response}" for t in traces))
    return _cached(
        Path(cache_dir).expanduser() / f"{key}.safetensors",
        lambda: _tokenize(traces, chat, row_tokens, num_traces),
    )


def _tokenize(
    traces: list[Trace], chat: ChatFormat, row_tokens: int, num_traces: int
) -> tuple[list[Document], int]:
    wanted = min(num_traces or len(traces), len(traces))
    documents: list[Document] = []
    num_long = 0
    with tqdm(total=wanted, desc="tokenising", unit=" traces", disable=None) as bar:
        for start in range(0, len(traces), CHUNK):
            for document in make_documents(traces[start : start + CHUNK], chat):
                if len(documents) == wanted:
                    return documents, num_long
                if len(document) > row_tokens:
                    num_long += 1
                    continue
                documents.append(document)
                bar.update()
    return documents, num_long


def _cached(path: Path, make: Callable[[], tuple[list[Document], int]]) -> tuple[list[Document], int]:
    """Return what is cached in this file, or call make() and cache its result. An unreadable file is named and replaced."""
    if path.is_file():
        try:
            flat = load_file(path)
        except SafetensorError as error:
            print(f"the token cache {path} cannot be read ({error}); making it anew")
        else:
            ids = flat["ids"].split(flat["lengths"].tolist())
            return [Document(i, p) for i, p in zip(ids, flat["prompt_lens"].tolist(), strict=True)], int(
                flat["num_long"]
            )
    documents, num_long = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    flat = {
        "ids": torch.cat([torch.zeros(0, dtype=torch.int32), *(document.ids for document in documents)]),
        "lengths": torch.tensor([len(document) for document in documents], dtype=torch.int64),
        "prompt_lens": torch.tensor([document.prompt_len for document in documents], dtype=torch.int64),
        "num_long": torch.tensor(num_long),
    }
    save_file(flat, scratch)
    scratch.replace(path)  # whole or not at all
    return documents, num_long


def load_documents(
    source: str, chat: ChatFormat, *, row_tokens: int, num_traces: int = 0, seed: int = 0,
    max_bad_rows: int = 0, verify: bool = True, shuffle: bool = True, long_share: float = 1.0, cache_dir: str = "",
) -> tuple[list[Document], DropCounts]:  # fmt: skip
    """Load num_traces documents (0 = all) of at most row_tokens tokens from `source`, and count what was dropped.

    shuffle, long_share: as read_traces. Raises ValueError if fewer than num_traces survive: a smaller set would be another experiment.
    """
    limit = (
        num_traces + num_traces // 8 + 64 if num_traces else 0
    )  # the paper's row length drops less than 1 %
    while True:
        traces, drop_counts = read_traces(
            source, seed=seed, limit=limit, max_bad_rows=max_bad_rows, verify=verify,
            shuffle=shuffle, long_share=long_share,
        )  # fmt: skip
        documents, num_long = tokenize(
            traces, chat, row_tokens=row_tokens, num_traces=num_traces, cache_dir=cache_dir
        )
        if len(documents) >= num_traces or len(traces) < limit:
            break
        limit *= 4  # many were too long: look further down the order
    if num_long:
        drop_counts.dropped[f"are longer than {row_tokens:,} tokens"] = num_long
    if unused := len(traces) - len(documents) - num_long:
        drop_counts.dropped["come later in the order"] += unused
    drop_counts.kept = len(documents)
    if not documents:
        raise ValueError(
            f"row_tokens is {row_tokens} and no trace of {source} survives ({drop_counts}); raise --row_tokens or mend the data"
        )
    if len(documents) < num_traces:
        raise ValueError(
            f"num_traces is {num_traces} but {len(documents)} traces of {source} survive ({drop_counts}); "
            f"pass --num_traces {len(documents)}, or 0 for all, or a larger --row_tokens than {row_tokens}"
        )
    return documents, drop_counts
