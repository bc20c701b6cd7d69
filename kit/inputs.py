"""What a run reads, by content: a resumed run must read what it began with, not only the same path."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kit.ranks import here
from kit.run import INPUTS, RunFolder, digest, read_json_if_any, write_json

if TYPE_CHECKING:
    from kit.packing import Document


def digest_of_documents(documents: Sequence[Document]) -> str:
    """Name documents by their token ids and where they carry no loss, in their order."""
    state = hashlib.blake2b(digest_size=16)
    for document in documents:
        spans = "".join(f"{start}-{end} " for start, end in document.no_loss)
        state.update(f"{len(document)} {document.prompt_len} {spans}".encode())
        state.update(document.ids.int().contiguous().numpy())
    return state.hexdigest()


def digest_of_questions(questions: Sequence) -> str:
    """Name questions by their ids, problems and answers, in their order."""
    return digest(*(part for q in questions for part in (q.id, q.problem, q.answer)))


def check_code(run: RunFolder, files: Sequence[Path]) -> None:
    """Do what check_inputs does for files of Python."""
    sources = [file.read_text(encoding="utf-8", errors="backslashreplace") for file in files]
    count = sum(len(source.splitlines()) for source in sources)
    names = ", ".join(map(str, files))
    check_inputs(run, "lines of code", names, count=count, found=digest(*sources))


def check_inputs(run: RunFolder, what: str, source: str, *, count: int, found: str) -> None:
    """Write down what a new run reads; in a run that is resumed, compare.

    what: such as "traces". found: their digest. Raises ValueError, naming both, if they are not those that
    the run began with, or if another rank reads others.
    """
    here().check_same({f"the digest of the {what}": found})
    here().from_first(lambda: _compare(run, what, source, count, found))


def _compare(run: RunFolder, what: str, source: str, count: int, found: str) -> None:
    path = run.path / INPUTS
    known = read_json_if_any(path)
    now = {"source": source, "count": count, "digest": found}
    before = now if run.is_new else known.get(what, now)
    if before["digest"] != found:
        raise ValueError(
            f"{run.path} began with {before['count']:,} {what} of {before['source']} (digest "
            f"{before['digest'][:12]}), but {source} holds others now: {count:,} (digest {found[:12]}); "
            "restore that data, or begin a new run in another --out"
        )
    write_json(path, {**known, what: now})
