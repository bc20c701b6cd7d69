"""The paper's valley on a card: models x numbers of traces x (full | QLoRA | LoRA) x seeds, in one report.

    python recipes/valley_sweep.py --plan                   what fits, how many hours, how much disk
    python recipes/valley_sweep.py --plan --preset rtx24    the same for what one card of 24 GB can finish
    python recipes/valley_sweep.py --preset rtx24           run it; what differs from the paper is printed
    python recipes/valley_sweep.py --gpus 0,1,2,3           the paper's setting, one run per GPU
    python recipes/valley_sweep.py --resume                 go on after a kill, and try again what failed;
                                                            or help the processes that are at it
    python recipes/valley_sweep.py --smoke                  the same path in about a minute on any CPU

Every cell is a run of recipes/gemma3_1b_8k.py with epochs and batch from the paper's Table 2
(kit/valley/study.py). The base model is measured once per model and seed. A run that fails is reported with
its reason, and the others go on. --plan needs neither a GPU nor a download; --smoke uses a tiny model.

`--arms long,short,quarter,mixed` adds training sets that the paper lacks: the data set's short solutions to
the same problems (or `--short_traces FILE`), and mixtures, a quarter or half of them long. `--fixed_batch
128` adds long traces with one batch at every size. `--rl_sizes 0,lowest,most` adds reinforcement learning
from the base model, the lowest point and the largest size, on the MATH levels that follow from the model's
size. A finished sweep takes more arms, sizes or seeds with --resume.

Several processes, on one machine or on many, share a study: start each with the same settings and the same
--out, on a disk that all of them see, or with --resume and that --out. Each takes the next run that nobody
has, and stays until all have ended: those of a machine that dies are taken over five minutes later
(kit/valley/claims.py). The first one's plan counts for all, and so does its choice of attention: if cards
differ, pass --gpu_gb of the smallest.
recipes/valley_sweep.slurm starts them on a cluster.

Time: not timed on a GPU; --plan estimates. Left out on purpose: one model on several GPUs.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path

from kit import data, memory, models, paper, report, valley
from kit.command import clean_up_if_refused, start
from kit.command_line import command_of, shell_word, started_as
from kit.config import full_command, parse, some_of
from kit.evaluate.settings import EVENING, BenchmarkSettings, EvaluationSettings, ModelSettings
from kit.journal import CONFIG
from kit.machine import require_gpu
from kit.memory.settings import TrainingPlanSettings
from kit.recipes import evaluate, gemma3_1b_8k, grpo_qwen2_5_0_5b
from kit.run import FREE_TO_CHANGE, read_json_if_any, recipe_name, stored_settings, write_json
from kit.valley.finished import RL
from kit.valley.jobs import workers_of
from kit.valley.runs import LOWEST, MOST, Recipes, open_study, run_study
from kit.valley.study import ARMS, FIXED_BATCH, FULL, Cell, Study, parse_numbers, short_name
from kit.watch import WatchSettings, check_tracker


@dataclass(frozen=True)
class Config(ModelSettings, EvaluationSettings, TrainingPlanSettings, WatchSettings):
    preset: str = "paper"  # settings that the other flags may change [paper | evening | rtx24]
    # cells
    models: str = ",".join(paper.MODELS)  # as in gemma3_1b_8k.py; MODEL=full+lora: methods of its own
    methods: str = "full"  # of other models [full | qlora | lora | full+qlora | full+lora | full+qlora+lora]
    arms: str = "long"  # the first: all sizes [long | short | quarter | mixed | most | growing | fixed, ...]
    sizes: str = "8000,16000,32000,64000,128000,220000"  # traces; epochs, batch: Table 2 [1..10000000, ...]
    control_sizes: str = ""  # traces, of the other arms; "" = all sizes [1..10000000, ...]
    seeds: int = 1  # how many: of subset, packs and samples; the paper does not say [1..1000]
    fixed_batch: int = 0  # traces per step in a control arm with one batch at every size; 0 = none [>= 0]
    # data
    traces: str = paper.OPENR1  # hub id[:part][@split], or a .jsonl, .json or .parquet file
    columns: str = ""  # columns of other formats, such as problem=question,trace=response; "" = known ones
    verify: str = "llama"  # keep traces that Math-Verify accepts, it or Llama, or all [math | llama | none]
    short_traces: str = ""  # short traces of the arms that mix; "" = the data set's `solution`
    row_tokens: int = 16_384  # tokens per pack; longer traces are dropped [>= 1]
    cache_dir: str = "~/.cache/through-the-valley"  # tokenised traces, shared by all methods; "" = no cache
    # optimisation
    lr: float = 5e-5  # peak learning rate [> 0, <= 1]
    warmup_ratio: float = 0.05  # share of the steps; 0 = none [0..1]
    max_steps: int = 0  # stop every schedule here; 0 = all epochs [>= 0]
    checkpoint_every: int = 200  # steps between checkpoints; 0 = only at the end [>= 0]
    qlora_rank: int = 16  # of the adapters, QLoRA's and LoRA's [1..4096]
    # reinforcement learning
    rl_sizes: str = ""  # start from models of these sizes; 0 = the base [lowest | most | 0..10000000, ...]
    rl_flags: str = ""  # further flags of recipes/grpo_qwen2_5_0_5b.py, as typed: --rl_flags="--preset rtx24"
    # run
    gpus: str = ""  # numbers of the cards, one run on each at a time; "" = the first card [0..1023, ...]
    workers: int = 0  # runs at once with --device cpu, each on one thread; 0 = one per core [0..1024]
    smoke: bool = False  # tiny model, shipped traces, two sizes, CPU


SMALLEST = "Qwen/Qwen2.5-0.5B-Instruct"
RTX24_MODELS = (
    "google/gemma-3-1b-it",
    SMALLEST,
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen2.5-3B-Instruct=qlora",
)
PRESETS = {
    "paper": {},
    "evening": EVENING | {"models": SMALLEST, "sizes": "125,500", "row_tokens": 8_192},
    "rtx24": {
        "models": ",".join(RTX24_MODELS),
        "sizes": "500,2000,8000",
        "gpu_gb": "24",
        "num_questions": 100,
        "num_samples": 2,
        "max_new_tokens": 8_192,
    },
}
SMOKE = {  # that of one run, for several
    **{name: value for name, value in gemma3_1b_8k.SMOKE.items() if name not in ("model", "num_traces")},
    "models": "tiny",
    "sizes": "24,96",
    "num_questions": 25,
    "max_new_tokens": 300,
    "trace_tokens": 119,
    "response_tokens": 100,
}
OF_A_RUN = {"smoke", "resume", "out", "preset", "models", "qlora_rank"}
OF_A_RUN |= {field.name for field in fields(TrainingPlanSettings)}
RL_SHARED = [field.name for kind in (ModelSettings, BenchmarkSettings) for field in fields(kind)]
RL_SHARED.append("log")
GROWS = ("arms", "sizes", "control_sizes", "seeds")  # a resumed sweep may have more of these


def study_of(config: Config) -> Study:
    arms = [word.strip() for word in config.arms.split(",")]
    return Study(
        models=valley.study.parse_models(config.models, config.methods),
        arms=tuple(dict.fromkeys([*arms, *([FIXED_BATCH] if config.fixed_batch else [])])),
        sizes=parse_numbers(config.sizes),
        control_sizes=parse_numbers(config.control_sizes),
        seeds=config.seeds,
        batch_traces=config.fixed_batch or paper.TABLE[-1].batch_traces,
    )


def deviations(config: Config, study: Study) -> list[str]:
    """Return what differs from the paper's setting, except for what follows from the card's size."""
    methods = [method for _, methods in study.models for method in methods]
    ranks = valley.study.ranks_of(FULL if FULL in methods else methods[0], config.qlora_rank)
    found = paper.deviations(vars(config) | ranks)
    of_models = (line for model, _ in study.models for line in paper.deviations_of_model(model))
    return [*found, *dict.fromkeys(of_models), *study.deviations(config.qlora_rank)]


def shared(config: Config, other: type) -> dict:
    """Return the settings that the sweep and one of its recipes both have, except those of a run itself."""
    names = {field.name for field in fields(other)} - OF_A_RUN
    return some_of(config, *(name for name in vars(config) if name in names))


def recipes_of(config: Config, chosen: valley.estimate.Chosen) -> Recipes:
    """Return the recipes with the sweep's settings. chosen: the memory settings of each model and method."""
    if config.attention == "auto":
        config = replace(config, attention="kit")  # or each run would pick for itself
    # without the noise of that recipe's --smoke, which would make the start another model
    learning = some_of(config, *RL_SHARED) | {"eval_tokens": config.max_new_tokens, "weaken": 0.0}

    def finetune(cell: Cell) -> dict:
        settings, problem = chosen[cell.model, cell.method]
        if problem:
            raise ValueError(problem)
        of_arm = {} if ARMS[cell.arm].long_share < 1 else {"short_traces": ""}
        return shared(config, gemma3_1b_8k.Config) | settings | of_arm

    return Recipes(
        shared(config, evaluate.Config) | {"gpu_gb": config.gpu_gb, "desktop_gb": config.desktop_gb},
        finetune,
        lambda start: learning,
        rank=config.qlora_rank,
        rl_flags=tuple(shlex.split(config.rl_flags)),
    )


def starts_of(config: Config, study: Study) -> list[str]:
    """Return where reinforcement learning starts. Raises ValueError for a size that the study lacks."""
    words = [word.strip() for word in config.rl_sizes.split(",") if word.strip()]
    sizes = {int(word) for word in words if word not in (LOWEST, MOST)}
    if unknown := sorted(sizes - {0, *study.sizes}):
        raise ValueError(
            f"rl_sizes is {config.rl_sizes} but no model is trained on {unknown[0]} traces; "
            f"pass some of --sizes, 0, {LOWEST} or {MOST}"
        )
    return words


def read_rl_flags(text: str) -> grpo_qwen2_5_0_5b.Config:
    """Return the settings that rl_flags gives. Raises ValueError for a flag that is not allowed."""
    recipe = grpo_qwen2_5_0_5b
    try:
        return parse(recipe.Config, shlex.split(text), smoke=recipe.SMOKE, presets=recipe.PRESETS)
    except ValueError as error:
        raise ValueError(f"rl_flags is {text!r}, and in it {error}") from error


def adapted_models(study: Study) -> list[str]:
    """Return the models from whose adapters reinforcement learning may start."""
    return [model for model, methods in study.models if {*methods} - {FULL} and model in study.compared]


def rl_words(config: Config, study: Study) -> list[str]:
    """Return the flags that add reinforcement learning to a finished sweep of these settings."""
    given = read_rl_flags(config.rl_flags)
    missing = ["--smoke"] * (config.smoke and not given.smoke)  # the paper's GRPO would take a CPU weeks
    missing += ["--kl_coef 0"] * bool(adapted_models(study) and given.kl_coef)
    flags = " ".join([config.rl_flags, *missing]).strip()
    return ["--rl_sizes", "0,lowest,most", *([f"--rl_flags={flags}"] if missing else [])]


def check_rl_flags(config: Config) -> None:
    """Raise ValueError if reinforcement learning has begun with other settings: one report must not mix them.

    A run that is done is not started again, so it would not refuse them itself.
    """
    if not (config.resume or config.out):  # a new folder
        return
    path = stored_settings(recipe_name(Config), config.out)[0] if config.resume else Path(config.out)
    before = read_json_if_any(path / CONFIG).get("rl_flags", config.rl_flags)
    if before != config.rl_flags and any((path / RL).glob(f"*/{CONFIG}")):
        was, given = vars(read_rl_flags(before)), vars(read_rl_flags(config.rl_flags))
        if changed := [name for name in sorted(was.keys() - FREE_TO_CHANGE) if was[name] != given[name]]:
            raise ValueError(
                f"rl_flags was {before!r} and is {config.rl_flags!r}, which changes {', '.join(changed)}, "
                f"but runs in {path / RL} have begun; pass the same, or another --out"
            )


def check_before_hours(config: Config, study: Study) -> None:
    """Raise ValueError for what a run would refuse only when its turn comes."""
    for model, _ in study.models:
        models.loading.path_of(model)
    data.rows.check_sources(config.traces, config.short_traces)
    check_tracker(config.log)
    flags, adapted = read_rl_flags(config.rl_flags), adapted_models(study)
    if adapted and flags.kl_coef and {*starts_of(config, study)} - {"0"}:
        raise ValueError(
            f"rl_sizes is {config.rl_sizes} and kl_coef {flags.kl_coef:g}, but {short_name(adapted[0])} is "
            'trained with adapters, and their base would be the reference; pass --rl_flags="--kl_coef 0"'
        )


def check_attention(config: Config, study: Study) -> None:
    """Raise ValueError if varlen, which a study that this process joins may have, cannot run a model here."""
    where = {"device": config.device, "dtype": models.loading.default_dtype(config.device)}
    for model, _ in study.models if config.attention == "varlen" else ():
        models.attention.attention_name("varlen", models.loading.load_config(model), **where)


@clean_up_if_refused
def main(config: Config) -> Path | None:
    study = study_of(config)
    least = min(ARMS[arm].long_share for arm in study.arms)
    data.mixtures.check_mixture(least, config.short_traces, config.columns)
    data.formats.parse_columns(config.columns)
    starts, workers = starts_of(config, study), workers_of(config.device, config.gpus, config.workers)
    what = {
        **some_of(config, "num_slots", "row_tokens", "qlora_rank"),
        "params": config.params,
        "num_samples": config.count_samples(),
        "cuda_graphs": config.plans_graphs,
        "card": config,
    }
    check_before_hours(config, study)
    config = config.with_attention(*(model for model, _ in study.models))
    what |= some_of(config, "attention")
    if config.plan:
        return make_plan(config, study, what, len(workers))
    instead = {
        f"{started_as()} --plan": "what it would take: no GPU, no download",
        f"{started_as()} --smoke": "the whole path with a tiny model, in a minute",
        f"{command_of('demo')} --quick": "the valley of a toy, in minutes",
    }
    require_gpu(config.device, "a sweep", instead)
    check_attention(config, study)
    check_rl_flags(config)
    path = open_study(config, GROWS)
    chosen = valley.estimate.choose_settings(study.cells(), path, at_once=len(workers), **what)
    cells, forced = valley.estimate.with_settings(study.cells(), chosen)
    run = f" --out {shell_word(config.out)}" if config.out else ""
    return run_study(
        study,
        cells,
        path,
        recipes_of(config, chosen),
        workers,
        deviations=deviations(config, study) + forced,
        rl=starts,
        write_report=report.valley.write_report,
        then=(
            "reinforcement learning from three sizes",
            f"{started_as()} --resume{run}",
            *rl_words(config, study),
        ),
    )


def make_plan(config: Config, study: Study, what: dict, num_cards: int) -> None:
    """Print the plan of the whole sweep."""
    planned = valley.estimate.plan_memory(study.cells(), **what)
    cells, forced = valley.estimate.with_settings(study.cells(), valley.estimate.settings_of(planned))
    response_tokens = min(config.response_tokens, config.max_new_tokens)
    work = memory.hours.Work(
        what["num_samples"], response_tokens, trace_tokens=config.trace_tokens, max_steps=config.max_steps
    )
    estimates = valley.estimate.estimate_cells(cells, planned, work, card=config.card)
    print(valley.estimate.describe(cells, planned, estimates, num_cards=num_cards))
    print(paper.describe(deviations(config, study) + forced))
    started = replace(config.to_start(), **some_of(config, "gpu_gb", "faster", "desktop_gb"))
    print(f"start       {full_command(started, started_as(), smoke=SMOKE, presets=PRESETS)}")
    if config.json:
        write_json(Path(config.json), valley.estimate.as_json(cells, planned, estimates, config.desktop_gb))


if __name__ == "__main__":
    alone = "the sweep starts a process per card itself; start it without torchrun, with --gpus 0,1"
    start(main, Config, alone=alone, smoke=SMOKE, presets=PRESETS)
