"""Evaluate any model on any benchmark: accuracy and its uncertainty, lengths, truncation and reflection.

    python recipes/evaluate.py --model Qwen/Qwen2.5-0.5B-Instruct             the paper's protocol, on a GPU
    python recipes/evaluate.py --model runs/gemma3_1b_8k/001/model --benchmarks math500
    python recipes/evaluate.py --model m.gguf --chat_template plain --benchmarks gsm8k=FILE --device cpu
    python recipes/evaluate.py --plan                                         does it fit, and how long?
    python recipes/evaluate.py --benchmarks arithmetic                        checks each step of an answer
    python recipes/evaluate.py --benchmarks mine=q.jsonl                      your own questions
    python recipes/evaluate.py --compare runs/evaluate/001,runs/evaluate/002  two finished runs, paired
    python recipes/evaluate.py --server http://localhost:8000 --model Qwen/Qwen3-8B    vLLM, SGLang, llama.cpp
    python recipes/evaluate.py --smoke                                        a tiny model, seconds on any CPU
    torchrun --nproc_per_node 2 recipes/evaluate.py                           on two cards

A folder of LoRA adapters, ours or peft's (adapter_config.json), is loaded with the base that it names. Your
own questions are a .jsonl, .json or .parquet file with rows such as {"problem": "What is 2+3?", "answer": 5};
the name before the = is yours to choose. Every sample is logged as soon as it ends. After a kill, --resume
continues, and the result is that of an uninterrupted run.

With --server, an inference server samples and only the tokenizer and the config of --model are loaded here
(kit/generate/server.py says which versions of which servers, and what they are asked). --num_slots is how
many requests are open at once; 0 = 32. An answer that fails is asked for again, for up to an hour; then the
run stops, and --resume asks for what is missing. The log names server and version, and its samples are never
mixed with others. Tried against a small server of the tests only.

Time: not timed on a GPU; SmolLM2-135M on 50 GSM8K questions, 2 samples each of up to 200 tokens, takes
minutes on one CPU core. Left out on purpose: tools, few-shot prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from kit import evaluate, generate, memory, models, paper, report
from kit.command import clean_up_if_refused, finish, open_run, start
from kit.command_line import command_of
from kit.config import RunSettings, some_of
from kit.evaluate.settings import EVENING, EvaluationSettings, SampledModelSettings
from kit.evaluate.uncertainty import in_percent
from kit.journal import CONFIG
from kit.machine import on_cpu, require_gpu
from kit.memory.settings import PlanSettings
from kit.ranks import here
from kit.run import AFTER, BEFORE, SAMPLES, write_json


@dataclass(frozen=True)
class Config(SampledModelSettings, EvaluationSettings, PlanSettings, RunSettings):
    preset: str = "paper"  # settings that the other flags may change [paper | evening]
    # model
    model: str = "google/gemma-3-1b-it"  # hub id, folder (of a model or adapters), .gguf file, or "tiny"
    # evaluation: the paper's protocol
    top_k: int = 0  # 0 = off [>= 0]
    seed: int = 0  # of the samples [>= 0]
    # comparison
    compare: str = ""  # two run folders, comma-separated: print second minus first, then stop; "" = evaluate
    force: bool = False  # compare runs even if prompt, decoding or versions differ
    # run
    smoke: bool = False  # tiny model, toy benchmark, CPU, seconds


PRESETS = {"paper": {}, "evening": EVENING}
SMOKE = {
    "model": "tiny", "device": "cpu", "gpu_gb": "", "instruction": "", "benchmarks": "toy",
    "num_questions": 50, "num_samples": 2, "max_new_tokens": 256, "num_slots": 50,
}  # fmt: skip


@clean_up_if_refused
def main(config: Config) -> list[evaluate.Result]:
    if config.compare:
        return compare(config)
    params = replace(config.params, top_k=config.top_k)
    if config.server and (config.plan or config.gpu_gb):
        raise ValueError(
            f"server is {config.server}, whose card is not planned for; leave out --plan and pass --gpu_gb ''"
        )
    if config.gpu_gib or config.plan:
        config = plan_memory(config, params)
    if config.plan:
        return []
    small = "--benchmarks arithmetic --num_questions 20 --num_samples 1 --max_new_tokens 512"
    if not config.server:
        require_gpu(config.device, f"evaluating {config.model} on --device cuda", on_cpu(small))
        config = config.with_attention(config.model)
    benchmarks = config.read_benchmarks()
    run = open_run(config)

    model, chat = config.load_model()
    time, answers = "the server's", config.num_responses(benchmarks)
    if not config.server:
        time = memory.hours.sampling_time(config.model, answers, config.max_new_tokens, config.num_slots)
    print(config.describe(benchmarks))
    print(paper.describe(paper.deviations(config)))
    print(f"time        {time}")

    how = some_of(config, "num_samples", "num_slots", "cuda_graphs", "seed")
    found = evaluate.evaluate_all(model, chat, benchmarks, params, run.path / SAMPLES, **how)
    results = list(found.values())
    if not here().is_first:
        return results
    print(table(results))
    print_steps({SAMPLES: found})
    write_json(run.path / "results.json", [result.summary() for result in results])
    page = report.write_report(run.path)
    finish(
        page,
        "two models on the same questions",
        command_of("evaluate"),
        "--compare",
        f"{run.path},ANOTHER_RUN",
    )
    return results


def plan_memory(config: Config, params: generate.SamplingParams) -> Config:
    """Print the plan. Return the settings, with as many slots as fit if gpu_gb is set."""
    num_samples = config.count_samples()
    run = memory.phases.MeasuredRun(
        model=config.model,
        params=params,
        num_slots=config.num_slots,
        num_samples=num_samples,
        cuda_graphs=config.plans_graphs,
        **models.folder.adapter_ranks(config.model),
    )
    work = memory.hours.Work(num_samples, min(config.response_tokens, config.max_new_tokens), evaluations=1)
    config, _ = memory.run_plan.plan_recipe(config, run, work, smoke=SMOKE, presets=PRESETS)
    return config


def table(results: list[evaluate.Result]) -> str:
    """Return the figures that are asked for first, one line per benchmark."""
    head = (
        "benchmark", "accuracy", "pass@k", "tokens: mean", "median", "90 %", "right", "wrong",
        "cut off", "no answer", "loops", "reflection*", "undecided",
    )  # fmt: skip
    lines = [head]
    for result in results:
        k, tokens = result.num_samples, result.lengths()
        right, wrong = (result.lengths(verdict).mean for verdict in ("correct", "wrong"))
        shares = (result.truncated, result.without_answer, result.looping, result.reflection)
        cells = (
            result.benchmark,
            in_percent(result.accuracy, result.interval),
            f"{report.page.percent(result.pass_at(k))}, k = {k}",
            f"{tokens.mean:,.0f}",
            f"{tokens.median:,.0f}",
            f"{tokens.p90:,}",
            *("-" if mean is None else f"{mean:,.0f}" for mean in (right, wrong)),
            *map(report.page.percent, shares),
            str(result.unknown),
        )
        lines.append(cells)

    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [zip(line, widths, strict=True) for line in lines]
    text = "\n".join("  ".join(f"{cell:>{width}}" for cell, width in row) for row in rows)
    counted = evaluate.results.headline({result.benchmark: result for result in results})
    if len(counted) > 1:
        mean = report.page.percent(evaluate.results.mean_accuracy(counted))
        text += f"\nmean accuracy {mean}, {', '.join(counted)} with the same weight each"
    return text + "\n* keywords alone: an upper bound"


def print_steps(stages: report.figures.Stages) -> None:
    """Print what the operations of the answers to `arithmetic` show, if it was measured."""
    for line in report.arithmetic.sentences(report.arithmetic.check_answers(stages)):
        print(line)


def compare(config: Config) -> list[evaluate.Result]:
    """Print the second run minus the first, for every benchmark that both measured."""
    runs = [Path(name.strip()) for name in config.compare.split(",")]
    if tuned := [run for run in runs if (run / AFTER).is_dir()]:
        raise ValueError(
            f"{tuned[0]} is a fine-tuning run, which compares by itself: {command_of('report')} {tuned[0]}; "
            "pass two runs of evaluate.py"
        )
    folders = [run / SAMPLES for run in runs]
    if len(folders) != 2:
        raise ValueError(f"compare is {config.compare!r} but it takes two run folders, comma-separated")
    if empty := [run for run in runs if not (run / CONFIG).is_file()]:
        raise ValueError(f"{empty[0]} holds no run (no {CONFIG}); pass two run folders of evaluate.py")
    first, second = ({path.stem: path for path in evaluate.sample_log.logs_in(folder)} for folder in folders)
    shared = [name for name in first if name in second]
    if not shared:
        raise ValueError(
            f"{folders[0]} holds {sorted(first)} and {folders[1]} holds {sorted(second)}: no benchmark in "
            "common; pass two runs that measured the same one"
        )

    results = []
    for name in shared:
        before, after = evaluate.results.read_result(first[name]), evaluate.results.read_result(second[name])
        difference, half = evaluate.paired_difference(before, after, force=config.force)
        print(
            f"{before}\n{after}\n{name}: difference {100 * difference:+.1f} points ± {100 * half:.1f} "
            f"(95 %, paired over {before.num_questions} questions)"
        )
        print_steps({BEFORE: {name: before}, AFTER: {name: after}})
        results.append(after)
    return results


if __name__ == "__main__":
    start(main, Config, smoke=SMOKE, presets=PRESETS)
