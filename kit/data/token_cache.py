"""The cache of tokenised traces: a file of documents, with a digest of what it holds.

It only saves time. If it cannot be read or written, or does not hold what was written, that is a warning.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kit.data.mixtures import TooLong
from kit.inputs import digest_of_documents
from kit.packing import Document
from kit.run import digest

KIND = "documents with no_loss"  # what a file holds, as part of its name: a change of it makes new files
NAMES = ("ids", "lengths", "prompt_lens", "no_loss", "num_no_loss", "too_long")
REMEDY = 'pass --cache_dir with a folder that can be, or --cache_dir "" for no cache'


def read_cache(path: Path) -> tuple[list[Document], TooLong] | None:
    """Return the documents in a cache file and how many traces were too long.

    Return None if there is no such file, and, with a warning, if it cannot be read or is damaged.
    """
    try:
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            flat, metadata = {name: file.get_tensor(name) for name in NAMES}, file.metadata() or {}
        ids, prompt_lens = flat["ids"].split(flat["lengths"].tolist()), flat["prompt_lens"].tolist()
        spans = [
            tuple(map(tuple, part.tolist())) for part in flat["no_loss"].split(flat["num_no_loss"].tolist())
        ]
        documents = [Document(*parts) for parts in zip(ids, prompt_lens, spans, strict=True)]
        too_long = TooLong(*flat["too_long"].tolist())
        if metadata.get("digest") == _digest(documents, too_long):
            return documents, too_long
        fault = "it does not hold what was written"
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        fault = error
    print(f"the token cache {path} cannot be used ({fault}): the traces are tokenised again")
    return None


def write_cache(path: Path, documents: list[Document], too_long: TooLong) -> None:
    """Write a cache file, whole or not at all; if that fails, warn and go on without."""
    flat = {
        "ids": torch.cat([torch.zeros(0, dtype=torch.int32), *(document.ids for document in documents)]),
        "lengths": torch.tensor([len(document) for document in documents], dtype=torch.int64),
        "prompt_lens": torch.tensor([document.prompt_len for document in documents], dtype=torch.int64),
        "no_loss": torch.tensor([span for document in documents for span in document.no_loss]).reshape(-1, 2),
        "num_no_loss": torch.tensor([len(document.no_loss) for document in documents], dtype=torch.int64),
        "too_long": torch.tensor(too_long),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            file = Path(scratch) / path.name
            save_file(flat, file, metadata={"digest": _digest(documents, too_long)})
            file.replace(path)  # so that a kill leaves a whole file or none
    except (OSError, SafetensorError) as error:
        print(f"the token cache {path} cannot be written ({error}): the next run tokenises again; {REMEDY}")


def _digest(documents: list[Document], too_long: TooLong) -> str:
    return digest(digest_of_documents(documents), *map(str, too_long))
