"""The valley on a CPU: a small model learns from more and more long traces. Does it fall? Does it recover?

    python recipes/valley_demo.py --quick                   one seed, fewer sizes
    python recipes/valley_demo.py                           three seeds, four arms
    python recipes/valley_demo.py --resume                  go on after an interruption; finished models stay
    python recipes/valley_demo.py --resume --sizes 16,64,256,1024,4096,8192,16384    add sizes, arms or seeds
    python recipes/valley_demo.py --resume --rl_steps 80    add reinforcement learning from three models
    python recipes/valley_demo.py --quick --seed 7          in a class: each student with another seed, then
    python -m kit.report --pool class student1 student2     one report of all their run folders, in class/

The model that ships with the kit has learned chains of additions and subtractions (kit/data/toy.py) from
40,000 short traces. It is fine-tuned on more and more long ones, which recheck and correct themselves, and
measured each time as the paper measures: samples at temperature 0.6 and top-p 0.95 on held-out problems.
Compared with that are a smaller model, short traces of the same problems, half of each, and long traces with
a batch that grows with the data, as in the paper's Table 2. Every model is a run of recipes/gemma3_1b_8k.py
in a folder of its own. What came out, and what it says, is in report.html of the run folder.

Learning rate and batch size were chosen once, by a rule: recipes/bench/LOG.md has the rule and all that was
tried.

Time on two idle Xeon cores (2026-11-22): 31 min for the full setting, which trains on 51 million tokens (the
two models learn 13,000 and 21,000 per second), a tenth of it for samples; 3 min 19 s for --quick. 16,384
traces, added later: 73 minutes on one core. On two idle AMD EPYC cores (2026-11-26) --quick took 1 min 39 s.

It is about the toy, not about language models. Left out on purpose: the best learning rate for each size.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kit import report
from kit.command import clean_up_if_refused, start
from kit.command_line import command_of, shell_word
from kit.config import some_of
from kit.data.mixtures import is_long
from kit.data.toy import make_pairs, make_rows, num_tokens
from kit.evaluate.benchmarks import BENCHMARKS
from kit.journal import write_rows
from kit.models.shipped import SHIPPED
from kit.valley.jobs import workers_of
from kit.valley.runs import LOWEST, MOST, Recipes, open_study, run_study
from kit.valley.study import ARMS, Cell, Study, parse_models, parse_numbers
from kit.watch import WatchSettings, check_tracker


@dataclass(frozen=True)
class Config(WatchSettings):
    # model
    models: str = "tiny,tinier"  # shipped, or folders of models that know the toy; the first gets all arms
    # cells
    arms: str = "long,short,mixed,growing"  # [long | short | quarter | mixed | most | growing | fixed, ...]
    sizes: str = "16,64,256,1024,4096,8192"  # numbers of traces, of the first arm [1..1000000, ...]
    control_sizes: str = "64,1024,4096"  # numbers of traces, of the other arms [1..1000000, ...]
    seeds: int = 3  # how many: of traces, packs and samples [1..1000]
    seed: int = 0  # the first of them; in a class, each student's own number [0..1000000]
    # optimisation
    epochs: int = 4  # passes over the traces [1..1000]
    lr: float = 1e-3  # peak learning rate, cosine; chosen as told at the top [> 0, <= 1]
    warmup_ratio: float = 0.05  # share of all steps; 0 = none [0..1]
    batch_traces: int = 16  # traces per step; the growing arm's reaches 16 [>= 1]
    # evaluation
    num_questions: int = 0  # questions, of the 100 held-out problems; 0 = all [>= 0]
    num_samples: int = 4  # samples per question [1..10000]
    temperature: float = 0.6  # 0 = greedy, which the paper avoids [0 | 0.001..1000]
    top_p: float = 0.95  # 1 = off [> 0, <= 1]
    max_new_tokens: int = 512  # tokens per response; the longest trace has about 340 [>= 1]
    num_slots: int = 100  # responses sampled at once [>= 1]
    # reinforcement learning, from the base model, the lowest point and the largest size of the first arm
    rl_steps: int = 0  # steps of 16 prompts x 8 answers; 0 = off [>= 0]
    # run
    workers: int = 0  # runs at once, each in a process with one thread; 0 = one per core [0..1024]
    quick: bool = False  # one seed, fewer sizes and samples: minutes
    smoke: bool = False  # four models to train, about a minute


QUICK = {
    "models": "tiny", "arms": "long,short,mixed", "sizes": "16,64,256,1024,4096", "control_sizes": "64,1024",
    "seeds": 1, "num_samples": 2,
}  # fmt: skip
SMOKE = QUICK | {"arms": "long,short", "sizes": "16,64,256", "control_sizes": "64", "num_questions": 50}
GROWS = ("models", "arms", "sizes", "control_sizes", "seeds")  # a resumed run may have more of these
MAX_ROW_TOKENS = 2_048  # per pack: larger ones are no faster on a CPU
# The learning rate of reinforcement learning is the better of two that were tried, one seed, 60 steps, %
# right before and after on 100 other problems: from 64 long traces 4.8 -> 89.5 at 1e-4 and 4.8 -> 24.5 at
# 3e-4; from 16,384 long traces 77.8 -> 83.5 and 77.8 -> 83.0. Longer problems leave nothing to learn from:
# the base model solves those with eight numbers, the most it has seen, and hardly one with nine (3 %, before
# and after 60 steps at either rate).
REINFORCE = {
    "lr": 1e-4,
    "kl_coef": 1e-3,
    "normaliser": "sequences",
    "dual_clip": 0.0,
    "weight_decay": 0.0,
    "undecided_is_wrong": False,
    "batch_prompts": 16,
    "minibatch_prompts": 8,
    "num_slots": 256,
    "row_tokens": 4_096,
    "recompute": False,
    "checkpoint_every": 10,
}
RL_PROMPTS = 2_000  # problems to draw from
RL_TOKENS = 384  # per answer; the longest trace has about 340


def study_of(config: Config) -> Study:
    """Return the study. The growing batch reaches that of the others, 16, at 4,096 traces."""
    return Study(
        models=parse_models(config.models),
        arms=tuple(config.arms.split(",")),
        sizes=parse_numbers(config.sizes),
        control_sizes=parse_numbers(config.control_sizes),
        control_models=1,
        seeds=config.seeds,
        first_seed=config.seed,
        epochs=config.epochs,
        grows=False,
        batch_traces=config.batch_traces,
        min_batch=4,
        steps_per_epoch=256,
    )


def write_data(study: Study, held_out: set[str], folder: Path, *, rl: bool) -> None:
    """Write each seed's traces, and prompts for reinforcement learning, without the held-out problems."""
    folder.mkdir(exist_ok=True)
    largest = max(study.sizes + study.control_sizes)
    for seed in study.all_seeds:
        write_rows(folder / f"traces-seed{seed}.jsonl", make_pairs(largest, seed=seed, exclude=held_out))
        if rl:
            prompts = make_rows("short", RL_PROMPTS, seed=1_000 + seed, exclude=held_out)
            write_rows(folder / f"prompts-seed{seed}.jsonl", prompts)


def row_tokens(cell: Cell, rows: list[dict]) -> int:
    """Return the length of a pack: that of a step's traces, so that a step takes no more than it should."""
    lengths = []
    for place, row in enumerate(rows[: cell.num_traces]):
        kind = "trace" if is_long(place, ARMS[cell.arm].long_share) else "solution"
        lengths.append(num_tokens(row["problem"], row[kind]))
    return max(*lengths, min(MAX_ROW_TOKENS, cell.batch_traces * sum(lengths) // len(lengths)))


def recipes_of(config: Config, data: Path) -> Recipes:
    """Return the recipes with the settings of the toy. data: folder of the traces and prompts."""
    common = {"device": "cpu", "instruction": "", "benchmarks": "toy"}
    common |= some_of(config, "num_questions", "num_samples")
    evaluation = common | some_of(config, "temperature", "top_p", "max_new_tokens", "num_slots")

    @cache  # all sizes of a seed are parts of one file
    def rows_in(traces: Path) -> list[dict]:
        return [json.loads(line) for line in traces.read_text(encoding="utf-8").splitlines()]

    def finetune(cell: Cell) -> dict:
        traces = data / f"traces-seed{cell.seed}.jsonl"
        own = {"traces": str(traces), "row_tokens": row_tokens(cell, rows_in(traces))}
        own |= {"shuffle": False, "cache_dir": "", "beta2": 0.95, "recompute": False}
        return evaluation | own | some_of(config, "lr", "warmup_ratio", "log")

    def reinforce(start: Cell) -> dict:
        prompts = data / f"prompts-seed{start.seed}.jsonl"
        own = {"prompts": str(prompts), "steps": config.rl_steps, "log": config.log}
        tokens = config.max_new_tokens
        return common | REINFORCE | own | {"max_new_tokens": min(RL_TOKENS, tokens), "eval_tokens": tokens}

    return Recipes(evaluation, finetune, reinforce)


@clean_up_if_refused
def main(config: Config) -> Path:
    study, workers = study_of(config), workers_of("cpu", "", config.workers)
    check_tracker(config.log)
    for model, _ in study.models:
        if model not in SHIPPED and not Path(model).is_dir():
            raise ValueError(
                f"models is {config.models!r} but there is no folder {model}; pass folders of models that "
                f"know the toy, or some of {', '.join(SHIPPED)}, which ship with the kit"
            )
    path = open_study(config, GROWS)
    benchmark = BENCHMARKS["toy"].read(limit=config.num_questions)
    held_out = {question.problem for question in benchmark.questions}
    write_data(study, held_out, path / "data", rl=bool(config.rl_steps))
    return run_study(
        study,
        study.cells(),
        path,
        recipes_of(config, path / "data"),
        workers,
        deviations=["a toy: tiny models, chains of additions and subtractions; not about language models"],
        rl=("0", LOWEST, MOST) if config.rl_steps else (),
        write_report=report.valley.write_report,
        then=next_command(config),
    )


def next_command(config: Config) -> tuple[str, str]:
    """Return the effect of what to type next, and the command, which a notebook's reader can type, too."""
    if config.smoke:
        return "the whole valley, with the climb out of it, in minutes", f"{command_of('demo')} --quick"
    if config.quick:
        return "three seeds, more sizes and a smaller model, in half an hour", command_of("demo")
    run = f" --out {shell_word(config.out)}" if config.out else ""
    effect = "reinforcement learning from three of the models"
    return effect, f"{command_of('demo')} --resume{run} --rl_steps 80"


if __name__ == "__main__":
    alone = "the demo trains several models at once by itself (--workers); start it without torchrun"
    start(main, Config, alone=alone, smoke=SMOKE, quick=QUICK)
