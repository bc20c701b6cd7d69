"""Make traces of your own: sample a model's answers to problems, and keep those that are right.

    python recipes/make_traces.py --problems p.jsonl --model Qwen/Qwen3-1.7B    eight answers per problem
    python recipes/make_traces.py --problems p.jsonl --first shortest           the short side of a mixture
    python recipes/make_traces.py --problems p.jsonl --model Qwen/QwQ-32B --server http://localhost:8000
    python recipes/make_traces.py --resume                                      go on with the newest run
    python recipes/make_traces.py --smoke                                       a tiny model, any CPU
    torchrun --nproc_per_node 2 recipes/make_traces.py                          on two cards

Rows of p.jsonl hold a problem and its answer: {"problem": "What is 2+3?", "answer": 5}. The traces are
written to traces.jsonl in the run's folder, in the schema of OpenR1-Math-220k, for --traces and
--short_traces of the training recipes. Each row says which model wrote it and how. An answer is kept if
kit.grade finds it right and it ended by itself. The flag `correctness_math_verify` is left out, because
Math-Verify was not asked: the kit grades the answers again when it reads the file.

Every answer is logged as soon as it ends, in samples/. After a kill, --resume continues, and the traces are
those of an uninterrupted run. `recipes/evaluate.py --plan --benchmarks math500`, with the same --model and
--max_new_tokens, says whether it fits. With --server, vLLM, SGLang or llama.cpp's server samples any model
that they serve, and only the tokenizer and the config of --model are loaded here: see recipes/evaluate.py.

Time: not timed on a GPU; --smoke takes seconds. Left out on purpose: problems without answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kit import evaluate, generate
from kit.command import clean_up_if_refused, open_run, start, suggest
from kit.command_line import command_of
from kit.config import RunSettings, some_of
from kit.data.problems import Question, draw, read_prompts
from kit.data.rows import BadRows
from kit.data.toy import PROBLEMS
from kit.evaluate.benchmarks import Benchmark, ids_hash
from kit.evaluate.settings import SampledModelSettings
from kit.journal import write_rows
from kit.machine import on_cpu, require_gpu
from kit.ranks import here
from kit.run import SAMPLES

TRACES = "traces.jsonl"
ORDERS = {
    "sampled": lambda row: 0,
    "shortest": lambda row: row["tokens"],
    "longest": lambda row: -row["tokens"],
}
DECODING = ("temperature", "top_p", "top_k", "max_new_tokens", "seed", "dtype", "torch", "transformers")


@dataclass(frozen=True)
class Config(SampledModelSettings, RunSettings):
    # model
    model: str = "google/gemma-3-1b-it"  # hub id, folder (of a model or adapters), .gguf file, or "tiny"
    # problems
    problems: str = "open-r1/OpenR1-Math-220k:all"  # hub id[:part][@split], .jsonl, .json or .parquet file
    num_problems: int = 1_000  # problems, in a random order keyed by seed; 0 = all [>= 0]
    max_bad_rows: int = 20  # rows without problem or answer that are left out; more stop the run [>= 0]
    # answers
    num_samples: int = 8  # answers per problem [1..10000]
    first: str = "sampled"  # the right answer that stands first, to train on [sampled | shortest | longest]
    temperature: float = 0.6  # 0 = greedy: then --num_samples 1 will do [0 | 0.001..1000]
    top_p: float = 0.95  # 1 = off [> 0, <= 1]
    top_k: int = 0  # 0 = off [>= 0]
    max_new_tokens: int = 16_384  # tokens per answer; a longer one is not kept [>= 1]
    num_slots: int = 0  # answers sampled at once; changes the speed only; 0 = what memory holds [>= 0]
    # run
    seed: int = 0  # of the problems and the answers [>= 0]
    smoke: bool = False  # tiny model, toy problems, CPU, seconds


SMOKE = {
    "model": "tiny", "device": "cpu", "instruction": "", "problems": str(PROBLEMS), "num_problems": 20,
    "num_samples": 2, "temperature": 1.0, "max_new_tokens": 256, "num_slots": 40,
}  # fmt: skip


@clean_up_if_refused
def main(config: Config) -> Path:
    small = "--num_problems 20 --num_samples 1 --max_new_tokens 512"
    if not config.server:
        require_gpu(config.device, f"sampling {config.model} on --device cuda", on_cpu(small))
        config = config.with_attention(config.model)
    questions = read_questions(config)
    run = open_run(config)

    model, chat = config.load_model()
    print(f"answers     {len(questions):,} problems x {config.num_samples}")
    found = evaluate.evaluate(
        model,
        chat,
        Benchmark(
            "answers", config.problems, "", config.num_samples, len(questions), ids_hash(questions),
            questions=tuple(questions),
        ),
        generate.SamplingParams(config.temperature, config.top_p, config.top_k, config.max_new_tokens),
        run.path / SAMPLES,
        **some_of(config, "num_samples", "num_slots", "cuda_graphs", "seed"),
    )  # fmt: skip

    rows = list(traces_of(found, config))
    print(summary(found.rows, len(questions), len(rows)))
    if not rows:
        raise ValueError(
            f"no answer of {config.model} is right and whole, so there are no traces; the answers are in "
            f"{run.path / SAMPLES}: pass an easier --problems, more --max_new_tokens or another --model"
        )
    path = run.path / TRACES
    if not here().is_first:
        return path
    write_rows(path, rows)
    print(f"traces      {path}")
    flag = "--long_share 0.5 --short_traces" if config.first == "shortest" else "--traces"
    suggest("train on them", f"{command_of('finetune')} {flag}", str(path), *["--smoke"] * config.smoke)
    return path


def read_questions(config: Config) -> list[Question]:
    """Draw the problems, each once. Raises ValueError for more than max_bad_rows rows that are none."""
    bad = BadRows(config.max_bad_rows)
    questions = list({question.id: question for question in read_prompts(config.problems, bad)}.values())
    for line in bad.found:
        print(f"left out    {line}")
    count = min(config.num_problems or len(questions), len(questions))
    if count < config.num_problems:
        print(f"problems    {config.num_problems:,} were asked for, {config.problems} has {count:,}")
    return draw(questions, 0, count, seed=config.seed)


def traces_of(found: evaluate.Result, config: Config) -> Iterator[dict]:
    """Yield a row in OpenR1's schema for every problem with a right and whole answer, in the problems' order.

    Its first generation, which training reads, is that of `config.first`.
    """
    answers: dict[str, list[dict]] = {}
    for row in sorted(found.rows, key=lambda row: row["sample"]):
        answers.setdefault(row["question"], []).append(row)
    header = found.header
    made_by = {"model": config.model, "weights": header["model"]}
    if config.server:
        made_by = {name: header[name] for name in ("model", "weights", "engine")}
        made_by["tokenizer"] = config.model
    made_by |= {name: header[name] for name in ("prompt", *DECODING) if name in header}

    for name in sorted(answers):  # journals are in the order in which answers ended
        kept = [row for row in answers[name] if row["verdict"] == "correct" and row["finished"]]
        kept.sort(key=ORDERS[config.first])
        if kept:
            yield {
                "problem": kept[0]["problem"],
                "answer": kept[0]["answer"],
                "uuid": name,
                "source": config.problems,
                "generations": [row["text"] for row in kept],
                "finish_reasons": ["stop"] * len(kept),
                "is_reasoning_complete": [True] * len(kept),
                "num_tokens": [row["tokens"] for row in kept],
                "num_sampled": len(answers[name]),
                "made_by": made_by | {"samples": [row["sample"] for row in kept], "verified_by": "kit.grade"},
            }


def summary(rows: Iterable[dict], num_problems: int, num_kept: int) -> str:
    """Return what was kept, and why the rest was not."""
    names = {"correct": "right", "wrong": "wrong", "unknown": "undecided"}
    rows = list(rows)
    fates = Counter(names[row["verdict"]] if row["finished"] else "cut off" for row in rows)
    listed = ", ".join(f"{count:,} {fate}" for fate, count in fates.most_common())
    return (
        f"kept        {fates['right']:,} of {len(rows):,} answers ({fates['right'] / len(rows):.1%}), for "
        f"{num_kept:,} of {num_problems:,} problems ({num_kept / num_problems:.1%}): {listed}"
    )


if __name__ == "__main__":
    start(main, Config, smoke=SMOKE)
