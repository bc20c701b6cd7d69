"""The cache of tokenised traces: one file per set of documents, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kit.data.mixtures import TooLong
from kit.packing import Document


def read_cache(path: Path) -> tuple[list[Document], TooLong] | None:
    """Return the documents in a cache file; None, with a message, if the file cannot be read."""
    try:
        flat = load_file(path)
    except SafetensorError as error:
        print(f"the token cache {path} cannot be read ({error}) and is replaced")
        return None

    ids = flat["ids"].split(flat["lengths"].tolist())
    documents = [Document(i, p) for i, p in zip(ids, flat["prompt_lens"].tolist(), strict=True)]
    return documents, TooLong(*flat["too_long"].tolist())


def write_cache(path: Path, documents: list[Document], too_long: TooLong) -> None:
    """Write the documents to a cache file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    flat = {
        "ids": torch.cat([torch.zeros(0, dtype=torch.int32), *(document.ids for document in documents)]),
        "lengths": torch.tensor([len(document) for document in documents], dtype=torch.int64),
        "prompt_lens": torch.tensor([document.prompt_len for document in documents], dtype=torch.int64),
        "too_long": torch.tensor(too_long),
    }
    save_file(flat, scratch)
    scratch.replace(path)  # so that a kill leaves a whole file or none
