"""The paper's valley on a card: models x numbers of traces x (full fine-tuning | QLoRA) x seeds, one command, one report.

    python recipes/valley_sweep.py --plan                    what fits, how many hours, how much disk: estimates; no GPU
    python recipes/valley_sweep.py --plan --preset rtx24     the same for a setting that one card of 24 GB can finish
    python recipes/valley_sweep.py --preset rtx24            run it; what differs from the paper is printed
    python recipes/valley_sweep.py --gpus 0,1,2,3            the paper's setting, a process a GPU
    python recipes/valley_sweep.py --resume                  go on after a kill, and try again what failed
    python recipes/valley_sweep.py --smoke                   the same path in about a minute on any CPU: a tiny model

Every cell is a run of recipes/gemma3_1b_8k.py with epochs and batch from the paper's Table 2
(kit/valley/sweep.py); the base model is measured once per model and seed. A cell that fails is reported
with its reason and the others go on. `--fixed_batch 128` adds the control arm that the paper lacks, one batch
at every size; `--rl_sizes 0,8000,128000` adds reinforcement learning from there.

Time: not timed on a GPU; --plan estimates. Left out on purpose: one model on several GPUs, several machines.
"""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path

import evaluate
import gemma3_1b_8k
import grpo_qwen2_5_0_5b
import torch
from tqdm import tqdm

from kit.config import parse, show
from kit.data.chat import INSTRUCTION
from kit.data.toy import LONG_TRACES
from kit.report.sweep import write_report
from kit.run import RunFolder
from kit.valley.estimate import (
    Assumed,
    Chosen,
    Evaluation,
    choose_settings,
    describe,
    plan_cells,
    plan_memory,
    settings_of,
    with_settings,
    write_plan,
)
from kit.valley.finished import Sweep, measured_by, sentences
from kit.valley.jobs import FAILED, Job, Outcome, places, read_outcomes, run_jobs
from kit.valley.sweep import (
    BASELINES,
    CELLS,
    FULL,
    MODELS,
    QLORA,
    RL,
    Cell,
    Grid,
    parse_models,
    parse_numbers,
    rl_name,
    write_sweep,
)


@dataclass(frozen=True)
class Config:
    preset: str = "paper"  # paper or rtx24: settings that the other flags may change
    # cells
    models: str = ",".join(
        MODELS
    )  # as recipes/gemma3_1b_8k.py takes them, comma-separated; MODEL=qlora: its own methods
    methods: str = "full"  # full, qlora or full+qlora, of the models that do not say
    sizes: str = (
        "8000,16000,32000,64000,128000,220000"  # traces; epochs and batch follow from the paper's Table 2
    )
    seeds: int = 1  # of subset, packs and samples; the paper's number is not stated
    fixed_batch: int = 0  # traces per step in a control arm with one batch at every size; 0 = no such arm
    # of every model
    device: str = "cuda"  # cuda or cpu
    chat_template: str = ""  # a Jinja file, or "plain" for base models; "" = the model's own
    instruction: str = INSTRUCTION  # line added below every problem; "" = none
    attention: str = (
        "auto"  # kit, flash-attn, torch, or auto: flash-attn where it is installed and able, else kit
    )
    # data
    traces: str = (
        "open-r1/OpenR1-Math-220k:all"  # hub id[:config][@split], or a .jsonl, .json or .parquet file
    )
    row_tokens: int = 16_384  # tokens a pack; longer traces are dropped
    cache_dir: str = "~/.cache/through-the-valley"  # tokenised traces, which the methods share; "" = no cache
    # optimisation
    lr: float = 5e-5  # peak learning rate
    warmup_ratio: float = 0.05  # share of the steps; 0 = none
    max_steps: int = 0  # stop every schedule here; 0 = all epochs
    checkpoint_every: int = 200  # steps; 0 = only at the end
    qlora_rank: int = 16  # of the adapters
    gpu_gb: float = 0.0  # choose the memory settings for cards of this size; 0 = the recipe's defaults
    # evaluation
    benchmarks: str = "math500,aime24,amc23"  # name or name=FILE, comma-separated
    num_questions: int = 0  # questions per benchmark; 0 = all
    num_samples: int = 0  # samples per question; 0 = the paper's k (4, 8, 8)
    temperature: float = 0.6  # 0 = greedy, which the paper avoids
    top_p: float = 0.95  # 1 = off
    max_new_tokens: int = 16_384  # tokens per response
    num_slots: int = 16  # responses sampled at once
    # reinforcement learning
    rl_sizes: str = ""  # traces of the models it starts from, 0 = the base model; "" = none
    rl_flags: str = ""  # further flags of recipes/grpo_qwen2_5_0_5b.py, as typed: --rl_flags="--preset rtx24"
    # run
    gpus: str = ""  # numbers of the cards, a process each; "" = one process on the first
    workers: int = 1  # processes at once with --device cpu
    plan: bool = False  # what fits, estimated hours and disk, and stop: no GPU, no download
    trace_tokens: int = (
        4_500  # of the plan alone: a trace, on average; the mean of 291 R1 traces on AIME problems
    )
    response_tokens: int = 4_000  # of the plan alone: a response, on average; assumed
    json: str = ""  # with --plan: file for the plan; "" = none
    smoke: bool = False  # tiny model, shipped traces, two sizes, CPU
    resume: bool = (
        False  # go on with the sweep in --out, or with the newest one; failed cells are tried again
    )
    out: str = ""  # sweep folder; "" = the next free one under runs/


PRESETS = {
    "paper": {},
    "rtx24": {
        "models": "google/gemma-3-1b-it,Qwen/Qwen2.5-0.5B-Instruct,Qwen/Qwen2.5-1.5B-Instruct,Qwen/Qwen2.5-3B-Instruct=qlora",
        "sizes": "500,2000,8000", "gpu_gb": 24.0, "num_questions": 100, "num_samples": 2, "max_new_tokens": 8_192,
    },
}  # fmt: skip
SMOKE = {
    "models": "tiny", "sizes": "24,96", "device": "cpu", "instruction": "", "traces": str(LONG_TRACES), "row_tokens": 1_024,
    "lr": 3e-3, "cache_dir": "", "benchmarks": "toy", "num_questions": 25, "num_samples": 2, "max_new_tokens": 300,
    "num_slots": 50, "trace_tokens": 119, "response_tokens": 100,
}  # fmt: skip
STATED = {  # settings that the paper states -> its value in words, "" = the default above
    "row_tokens": "", "lr": "", "warmup_ratio": "", "max_steps": "all", "benchmarks": "", "num_questions": "all",
    "num_samples": "8 for AIME24 and AMC23, 4 for MATH-500", "temperature": "", "top_p": "", "max_new_tokens": "",
}  # fmt: skip
RL_SHARED = (
    "device",
    "chat_template",
    "instruction",
    "attention",
    "benchmarks",
    "num_questions",
    "num_samples",
)


def deviations(config: Config, grid: Grid) -> list[str]:
    """What differs from the paper's setting; what follows from the card's size is kit.valley.estimate's to say."""
    paper = Config()
    found = [f"{name} {getattr(config, name)} (paper: {said or getattr(paper, name)})" for name, said in STATED.items()
             if getattr(config, name) != getattr(paper, name)]  # fmt: skip
    if config.device == "cuda" and any(FULL in methods for _, methods in grid.models):
        found.append("AdamW with 8-bit states, bf16 weights rounded stochastically (paper: AdamW, bf16)")
    return found + grid.deviations(config.qlora_rank)


def shared(config: Config, other: type) -> dict:
    """The settings that the sweep and one of its recipes both have, but for those of a run itself."""
    own = {"plan", "json", "smoke", "resume", "out", "gpu_gb", "preset", "models", "qlora_rank"}
    return {field.name: getattr(config, field.name) for field in fields(other) if hasattr(config, field.name)
            and field.name not in own}  # fmt: skip


def jobs_of(
    config: Config, cells: list[Cell], chosen: Chosen, rl_sizes: tuple[int, ...], path: Path
) -> list[Job]:
    """Baselines, cells, then reinforcement learning; a run comes after what it needs."""
    found: dict[str, Job] = {}
    for cell in cells:
        before, after, baseline = (
            f"baseline {cell.baseline}",
            f"cell {cell.name}",
            path / BASELINES / cell.baseline,
        )
        common = {"model": cell.model, "seed": cell.seed}
        if before not in found:
            found[before] = Job(
                before, Path(evaluate.__file__), shared(config, evaluate.Config) | common, baseline
            )
        settings, problem = chosen[cell.model, cell.method]
        settings = shared(config, gemma3_1b_8k.Config) | common | settings | {
            "num_traces": cell.num_traces, "epochs": cell.epochs, "batch_traces": cell.batch_traces, "baseline": str(baseline),
            "qlora_rank": config.qlora_rank if cell.method == QLORA else 0,
        }  # fmt: skip
        found[after] = Job(
            after, Path(gemma3_1b_8k.__file__), settings, path / CELLS / cell.name, (before,), problem=problem
        )
    settings = {name: getattr(config, name) for name in RL_SHARED} | {"eval_tokens": config.max_new_tokens}
    for model, method, seed in dict.fromkeys((cell.model, cell.method, cell.seed) for cell in cells):
        for size in rl_sizes:
            name = rl_name(model, method, size, seed)  # of a cell, too
            start = {"model": str(path / CELLS / name / "model")} if size else {
                "model": model, "qlora_rank": config.qlora_rank if method == QLORA else 0}  # fmt: skip
            found[f"rl {name}"] = Job(
                f"rl {name}", Path(grpo_qwen2_5_0_5b.__file__), settings | start | {"seed": seed}, path / RL / name,
                (f"cell {name}",) if size else (), tuple(shlex.split(config.rl_flags)),
            )  # fmt: skip
    return list(found.values())


def line(outcome: Outcome, path: Path) -> str:
    """How a run ended, and what it measured last."""
    if outcome.status == FAILED:
        return f"FAILED {outcome.job}: {outcome.error}" + (
            f"\n  its log: {outcome.log}" if outcome.log else ""
        )
    measured = measured_by(path, *outcome.job.split(" ", 1))
    return f"{outcome.job}, {outcome.seconds:,.0f} s: " + "; ".join(map(str, measured.values()))


def main(config: Config) -> Path | None:
    grid = Grid(
        parse_models(config.models, config.methods),
        parse_numbers("sizes", config.sizes),
        config.seeds,
        config.fixed_batch,
    )
    rl_sizes, slots = (
        parse_numbers("rl_sizes", config.rl_sizes),
        places(config.device, config.gpus, config.workers),
    )
    card = {"row_tokens": config.row_tokens, "gpu_gb": config.gpu_gb, "qlora_rank": config.qlora_rank}
    if unknown := sorted({*rl_sizes} - {0, *grid.sizes}):
        raise ValueError(
            f"rl_sizes is {config.rl_sizes} but no model is made with {unknown[0]} traces; pass some of --sizes, or 0"
        )
    if config.plan:
        return make_plan(config, grid, card, len(slots))
    if config.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "a sweep needs an NVIDIA GPU and none is here. Three ways out:\n"
            "  python recipes/valley_sweep.py --plan     what it would take, on this machine, without a download\n"
            "  python recipes/valley_sweep.py --smoke    the whole path on this CPU in about a minute, with a tiny model\n"
            "  python recipes/valley_demo.py --quick     the valley of a toy, in minutes"
        )
    path = RunFolder.open(config).path
    print(f"settings\n{show(config)}\nsweep folder {path}")
    chosen = choose_settings(grid.cells(), path, max_grad_norm=gemma3_1b_8k.Config.max_grad_norm, **card)
    cells, forced = with_settings(grid.cells(), chosen)
    differences = deviations(config, grid) + forced
    jobs = jobs_of(config, cells, chosen, rl_sizes, path)
    write_sweep(path, cells, differences, rl_sizes)
    print(f"runs        {len(cells)} cells, {len({cell.baseline for cell in cells})} baselines, {len(jobs)} runs in all; "
          f"{len(slots)} at once, each with a log.txt in its folder")  # fmt: skip
    print("the paper   " + ("\n            ".join(differences) or "its setting"))
    for outcome in run_jobs(jobs, path, slots):
        tqdm.write(line(outcome, path))
        write_report(path)  # of what there is so far
    report = write_report(path)
    print("\n".join(sentences(Sweep.read(path))))
    print(f"report {report}")
    failed = [name for name, outcome in read_outcomes(path).items() if outcome.status == FAILED]
    if failed:
        raise SystemExit(
            f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}; --resume tries them again"
        )
    return report


def make_plan(config: Config, grid: Grid, card: dict, num_cards: int) -> None:
    """Print the plan of the whole sweep."""
    print(
        "memory      each model and method simulated once, in seconds, or in up to a minute if settings are chosen",
        flush=True,
    )
    memory = plan_memory(grid.cells(), **card, report=lambda text: print(text, flush=True))
    cells, forced = with_settings(
        grid.cells(),
        {pair: settings_of(found, gemma3_1b_8k.Config.max_grad_norm) for pair, found in memory.items()},
    )
    evaluation = Evaluation.of(config.benchmarks, num_questions=config.num_questions, num_samples=config.num_samples,
                               num_slots=config.num_slots)  # fmt: skip
    plans = plan_cells(cells, memory, evaluation=evaluation, max_steps=config.max_steps,
                       assumed=Assumed(config.trace_tokens, min(config.response_tokens, config.max_new_tokens)))  # fmt: skip
    print(describe(plans, num_cards=num_cards))
    print("the paper   " + ("\n            ".join(deviations(config, grid) + forced) or "its setting"))
    if config.json:
        write_plan(Path(config.json), plans)


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE, presets=PRESETS))
