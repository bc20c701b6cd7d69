"""Evaluation: k samples for each question of a benchmark, graded and logged one by one.

kit/evaluate/results.py turns the log into figures. Every sample is appended to a journal as soon as it ends,
below a header that names model, prompt, decoding and versions. An evaluation that is killed continues where
it was. Each sample has its own random stream, so the result is that of an uninterrupted run, on any number of
ranks (kit/ranks.py): each takes its share of the samples that are missing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from statistics import fmean

import torch

from kit.command import Stopped, together
from kit.data.chat import ChatFormat
from kit.data.problems import Question
from kit.evaluate.benchmarks import Benchmark
from kit.evaluate.results import Result, read_result
from kit.evaluate.sample_log import SampleLog, kept_samples
from kit.generate.kv_cache import cache_bytes
from kit.generate.sampler import Completion, generate
from kit.generate.sampling import SamplingParams
from kit.generate.server import Server
from kit.grade.deciding import start_worker
from kit.grade.verdict import verdict_fields
from kit.machine import GIB
from kit.models.weights import fingerprint
from kit.ranks import here
from kit.run import digest

FIRST_CUT = 16  # a row stores where its text stands after 16, 32, 64, ... tokens, for smaller limits


def evaluate(
    model,
    chat: ChatFormat,
    benchmark: Benchmark,
    params: SamplingParams,
    folder: Path,
    *,
    num_samples: int = 0,
    num_slots: int = 0,
    cuda_graphs: bool = True,
    seed: int = 0,
) -> Result:
    """Sample and grade `benchmark`, whose questions have been read, and write folder/<name>.jsonl.

    Samples that the file already holds are kept.

    model: a transformers model, or a kit.generate.server.Server, which samples in its place.
    num_samples: k, samples per question; 0 = the benchmark's own. num_slots: responses sampled at once; 0 =
    as many as memory holds. cuda_graphs: as for kit.generate.generate; a server has its own.
    Raises ValueError if the file belongs to another model, prompt, decoding or version, since samples below
    two headers are not one result; for NaN in weights or logits; if another process works in the run; if
    ranks differ in any of these; and if memory runs out. Raises Stopped after Ctrl-C.
    """
    num_samples = num_samples or benchmark.num_samples
    # importing sympy takes seconds, which would count against the time limit of the first hard answer
    threading.Thread(target=start_worker, daemon=True, name="start-grader").start()

    journal = SampleLog(folder / f"{benchmark.name}.jsonl")
    journal.lock()  # before it is read: another process must not sample the same
    header = header_of(model, chat, benchmark, params, num_samples=num_samples, seed=seed)
    here().check_same(header)
    kept = here().from_first(lambda: kept_samples(journal, header, benchmark.source))
    done = set(map(tuple, kept))  # JSON makes lists of tuples
    missing = [(q, i) for q in benchmark.questions for i in range(num_samples) if (q.id, i) not in done]
    wanted = here().share(missing)
    journal.begin(header)

    if done:
        print(f"{benchmark.name}: {len(done):,} answers are kept, {len(missing):,} are to come")

    rendered = {question.id: chat.prompt(question.problem) for question in benchmark.questions}
    prompts = dict(zip(rendered, chat.encode(list(rendered.values())), strict=True))

    def log(index: int, completion: Completion) -> None:
        question, i = wanted[index]
        key = {"question": question.id, "sample": i, "prompt": digest(rendered[question.id])}
        journal.append({**key, **_row(question, completion), "cuts": _cuts(completion, chat)})

    generate_with = (
        model.generate if isinstance(model, Server) else partial(generate, model, cuda_graphs=cuda_graphs)
    )

    def sample() -> None:
        generate_with(
            [prompts[question.id] for question, _ in wanted],
            params,
            num_slots=num_slots,
            seed=seed,
            eos_token_id=chat.eos_token_ids,
            keys=[[question.id, i] for question, i in wanted],
            decode=chat.decode,
            on_finish=log,
            description=f"{benchmark.name} ({folder.name})",
        )

    try:
        together(sample)
    except KeyboardInterrupt:
        num_kept, asked = len(journal.read()) - 1, len(benchmark.questions) * num_samples
        raise Stopped(f"in {benchmark.name}, {num_kept:,} of {asked:,} answers kept") from None
    except torch.OutOfMemoryError as error:
        at_once = min(num_slots or 1, len(wanted))
        longest = max(map(len, prompts.values())) + params.max_new_tokens
        cache = cache_bytes(model, at_once, longest) / GIB
        many = f" with {at_once} answers at once, whose cache alone" if num_slots else "; an answer's cache"
        raise ValueError(
            f"{benchmark.name}: memory ran out{many} takes {cache:.2f} GiB; pass --resume with a smaller "
            "--num_slots, or, if one answer is too much, begin another run with fewer --max_new_tokens"
        ) from error
    here().from_first(journal.join)
    return read_result(journal.path)


def evaluate_all(
    model, chat: ChatFormat, benchmarks: Sequence[Benchmark], params: SamplingParams, folder: Path, **how
) -> dict[str, Result]:
    """Evaluate each benchmark, print its figures, and return them by name. how: as for `evaluate`."""
    results = {}
    for benchmark in benchmarks:
        results[benchmark.name] = evaluate(model, chat, benchmark, params, folder, **how)
        print(f"{folder.name:<12}{results[benchmark.name]}")
    return results


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

    num_samples: as for `evaluate`.
    """
    return {
        "prompt": chat.key,
        "questions": digest(*(question.problem + question.answer for question in benchmark.questions)),
        "num_samples": num_samples or benchmark.num_samples,
        "seed": seed,
        **asdict(params),
        **(model.identity if isinstance(model, Server) else _identity(model)),
    }


def _identity(model) -> dict[str, str]:
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"model": fingerprint(model), "dtype": str(model.dtype), "engine": "kit", **versions}


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
    """Return the characters in the first 16, 32, 64, ... tokens of a text, below the response's length."""
    cuts, cap = {}, FIRST_CUT
    while cap < len(completion.ids):
        # counted as far as both agree: a cut may fall inside a character
        pairs = zip(chat.decode(completion.ids[:cap]), completion.text, strict=False)
        cuts[str(cap)] = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        cap *= 2
    return cuts
