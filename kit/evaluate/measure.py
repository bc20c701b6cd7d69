"""Evaluate: a benchmark's questions, k samples each, graded and logged one by one. What the logs add up to:
kit/evaluate/results.py.

Every sample goes to a journal as it ends, under a header that names model, prompt, decoding and versions. An evaluation that is
killed goes on where it was, and since every sample has a random stream of its own, the result is that of an unbroken run.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import asdict
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from statistics import fmean

import torch

from kit.data.chat import ChatFormat
from kit.data.problems import Question
from kit.evaluate.benchmarks import Benchmark
from kit.evaluate.results import Result, read_result
from kit.generate.kv_cache import cache_bytes
from kit.generate.sampler import Completion, generate
from kit.generate.sampling import SamplingParams
from kit.generate.vllm_backend import VllmModel
from kit.grade.deciding import start_worker
from kit.grade.verdict import verdict_fields
from kit.machine import GIB
from kit.run import Journal, digest

FIRST_CUT = 16  # tokens; a row says where its text stands after 16, 32, 64, ... of them, for accuracy at smaller limits


def fingerprint(model) -> str:
    """Name a model's weights by their content: a hash of every tensor's name, shape and sums. Two checkpoints of a run differ."""
    if isinstance(model, VllmModel):
        return model.fingerprint
    state = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        wide = tensor.detach().double()
        state.update(
            f"{name} {tuple(tensor.shape)} {wide.sum().item()!r} {wide.square().sum().item()!r}".encode()
        )
    return state.hexdigest()


def evaluate(
    model, chat: ChatFormat, benchmark: Benchmark, params: SamplingParams, folder: Path, *,
    num_samples: int = 0, num_slots: int = 16, seed: int = 0,
) -> Result:  # fmt: skip
    """Sample and grade `benchmark` (which has been read), writing folder/<name>.jsonl; samples found there are kept.

    num_samples: k, samples per question; 0 = the benchmark's own. Raises ValueError if the file there
    belongs to another model, prompt, decoding or version: results under two headers are not one result; and
    where memory runs out."""
    num_samples = num_samples or benchmark.num_samples
    # importing sympy takes seconds: not out of the first hard answer's deadline
    threading.Thread(target=start_worker, daemon=True, name="start-grader").start()
    journal = Journal(folder / f"{benchmark.name}.jsonl")
    header = header_of(model, chat, benchmark, params, num_samples=num_samples, seed=seed)
    rows = _stored_rows(journal, header)
    done = {(row["question"], row["sample"]) for row in rows}
    wanted = [(q, i) for q in benchmark.questions for i in range(num_samples) if (q.id, i) not in done]
    rendered = {question.id: chat.prompt(question.problem) for question in benchmark.questions}
    prompts = dict(zip(rendered, chat.encode(list(rendered.values())), strict=True))

    def log(index: int, completion: Completion) -> None:
        question, i = wanted[index]
        row = {
            "question": question.id,
            "sample": i,
            "prompt": digest(rendered[question.id]),
            **_row(question, completion),
        }
        journal.append(row | {"cuts": _cuts(completion, chat)})

    try:
        generate(
            model, [prompts[q.id] for q, _ in wanted], params, num_slots=num_slots, seed=seed, eos_token_id=chat.eos_token_ids,
            keys=[[q.id, i] for q, i in wanted], decode=chat.decode, on_finish=log, description=benchmark.name,
        )  # fmt: skip
    except torch.OutOfMemoryError as error:
        if isinstance(model, VllmModel):
            raise
        at_once, longest = (
            min(num_slots, len(wanted)),
            max(map(len, prompts.values())) + params.max_new_tokens,
        )
        raise ValueError(
            f"{benchmark.name}: memory ran out with {at_once} answers at once, whose cache alone takes "
            f"{cache_bytes(model, at_once, longest) / GIB:.2f} GiB; pass a smaller --num_slots (or --gpu_gb, where that chose "
            f"it), for a single answer fewer tokens, and --resume: the answers that are finished are in {journal.path}"
        ) from error
    return read_result(journal.path)


def header_of(
    model,
    chat: ChatFormat,
    benchmark: Benchmark,
    params: SamplingParams,
    *,
    num_samples: int = 0,
    seed: int = 0,
) -> dict:
    """Return what the samples of an evaluation depend on: model, prompt, questions, decoding, versions.
    num_samples: as `evaluate`'s."""
    return {
        "model": fingerprint(model),
        "prompt": chat.key,
        "questions": digest(*(question.id + question.answer for question in benchmark.questions)),
        "num_samples": num_samples or benchmark.num_samples,
        "seed": seed,
        **asdict(params),
        "dtype": str(model.dtype),
        "engine": f"vllm {model.version}" if isinstance(model, VllmModel) else "kit",
        **{name: version(name) for name in ("torch", "transformers")},
    }


def _stored_rows(journal: Journal, header: dict) -> list[dict]:
    rows = journal.read()
    if not rows:
        journal.append({"header": header})
        return []
    stored = rows[0].get("header", {})
    changed = [f"{k} was {stored.get(k)!r}, is {header[k]!r}" for k in header if stored.get(k) != header[k]]
    if changed:
        raise ValueError(
            f"{journal.path} holds samples made otherwise: {'; '.join(changed)}; use another folder or delete the file"
        )
    return rows[1:]


def _row(question: Question, completion: Completion) -> dict:
    return {
        "problem": question.problem,
        "answer": question.answer,
        "tokens": len(completion.ids),
        "finished": completion.finished,
        **verdict_fields(question.answer, completion.text),
        "seconds": round(completion.seconds, 3),
        "mean_logprob": fmean(completion.logprobs),
        "text": completion.text,
    }


def _cuts(completion: Completion, chat: ChatFormat) -> dict[str, int]:
    """Count the characters in the first 16, 32, 64, ... tokens of the text, for every such number below the response's length."""
    cuts, cap = {}, FIRST_CUT
    while cap < len(completion.ids):
        pairs = zip(chat.decode(completion.ids[:cap]), completion.text, strict=False)
        cuts[str(cap)] = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)
        )  # a cut may fall inside a character
        cap *= 2
    return cuts
