"""The valley on a CPU: a small model learns from more and more long traces. Does it fall, and does it climb out again?

    python recipes/valley_demo.py --quick          one seed, fewer sizes
    python recipes/valley_demo.py                  three seeds, all arms
    python recipes/valley_demo.py --resume         go on after an interruption: finished models are kept
    python recipes/valley_demo.py --resume --sizes 16,64,256,1024,4096,8192,16384     and then more sizes, arms or seeds
    python recipes/valley_demo.py --resume --rl_steps 80    and then reinforcement learning from three of the models

The model that ships with the kit has learned chains of additions and subtractions (kit/data/toy.py) from
40,000 short traces. It is fine-tuned on more and more long ones, which recheck and correct themselves, and
measured each time as the paper measures: samples at temperature 0.6 and top-p 0.95 on held-out problems.
Beside that stand a smaller model, the same problems with short traces, half and half, and long traces with a
batch that grows with the data, as in the paper's Table 2. Everything goes through the pipeline of the real
recipes; what came out, and what it says, is in report.html of the run folder.

Learning rate and batch size were chosen once, by a rule; recipes/bench/LOG.md has the rule and everything that was tried.

Time: the full setting trains on 51 million tokens and took 31 min on two idle Xeon cores (2026-11-22; the two models learn 13,000
and 21,000 tokens per second), a tenth of it for samples; --quick 3 min 19 s. 16,384 traces, added later: 73 minutes of one core.

It is about the toy, not about language models. Left out on purpose: what learning rate each size would like best.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from kit.config import parse, show
from kit.evaluate import BENCHMARKS
from kit.generate import SamplingParams
from kit.report.valley import write_report
from kit.run import RunFolder
from kit.valley import Study
from kit.valley.curves import findings
from kit.valley.sweep import parse_numbers
from kit.valley.toy_cells import Finished, Valley, curves, read_cells
from kit.valley.toy_rl import read_rl_runs, rl_findings, run_rl


@dataclass(frozen=True)
class Config:
    # model
    models: str = (
        "tiny,tinier"  # shipped ones, or folders of others that know the toy; the first has all arms
    )
    # cells
    arms: str = "long,short,mixed,growing"  # of kit/valley/study.py, which has two more mixtures; the first has all sizes
    sizes: str = "16,64,256,1024,4096,8192"  # traces, of the first arm
    control_sizes: str = "64,1024,4096"  # traces, of the other arms
    seeds: int = 3  # of traces, packs and samples
    # optimisation
    epochs: int = 4  # passes over the traces
    lr: float = 1e-3  # peak, cosine; why this one: above
    warmup_ratio: float = 0.05  # share of all steps; 0 = none
    batch_traces: int = 16  # traces per step; what the growing batch of that arm does: kit/valley/study.py
    # evaluation
    num_questions: int = 0  # of the 100 held-out problems; 0 = all
    num_samples: int = 4  # samples per question
    temperature: float = 0.6  # 0 = greedy, which the paper avoids
    top_p: float = 0.95  # 1 = off
    max_new_tokens: int = 512  # tokens per response; the longest trace has about 340
    num_slots: int = 100  # responses sampled at once
    # reinforcement learning, from the base model, the lowest point and the largest size of the first arm
    rl_steps: int = 0  # steps of 16 prompts x 8 answers; 0 = off
    # run
    workers: int = 0  # cells made at once, each in a process with one thread; 0 = one a core
    quick: bool = False  # one seed, fewer sizes and samples: minutes
    smoke: bool = False  # four models to train, about a minute
    resume: bool = False  # go on with the run in --out, or with the newest one
    out: str = ""  # run folder; "" = the next free one under runs/


QUICK = {"models": "tiny", "arms": "long,short,mixed", "sizes": "16,64,256,1024,4096", "control_sizes": "64,1024", "seeds": 1,
         "num_samples": 2}  # fmt: skip
GROWS = (
    "models",
    "arms",
    "sizes",
    "control_sizes",
    "seeds",
)  # of which a resumed run may have more: models once made are kept
SMOKE = {"models": "tiny", "arms": "long,short", "sizes": "16,64,256", "control_sizes": "64", "seeds": 1, "num_questions": 50,
         "num_samples": 2}  # fmt: skip


def study_of(config: Config) -> Study:
    return Study(
        models=tuple(config.models.split(",")), arms=tuple(config.arms.split(",")), sizes=parse_numbers("sizes", config.sizes),
        control_sizes=parse_numbers("control_sizes", config.control_sizes), seeds=config.seeds, epochs=config.epochs,
        lr=config.lr, warmup_ratio=config.warmup_ratio, batch_traces=config.batch_traces,
        params=SamplingParams(config.temperature, config.top_p, max_new_tokens=config.max_new_tokens),
        num_samples=config.num_samples, num_slots=config.num_slots,
    )  # fmt: skip


def line(finished: Finished) -> str:
    row = finished.row
    trained = (
        f"{row['steps']:>5,} steps, {row['training_seconds']:>4.0f} s" if "steps" in row else "base model"
    )
    return (
        f"{finished.cell.name:<26} {100 * row['accuracy']:5.1f} % right, {row['mean_tokens']:4.0f} tokens, "
        f"{100 * row['truncated']:3.0f} % cut off; {trained}, {row['sampling_seconds']:.0f} s of sampling"
    )


def main(config: Config) -> Path:
    study = study_of(config)
    valley_run = RunFolder.open(config, may_grow=GROWS)
    print(f"settings\n{show(config)}\nrun folder {valley_run.path}")
    benchmark = BENCHMARKS["toy"].read(limit=config.num_questions)
    valley = Valley(study, benchmark, valley_run.path)
    cells = study.cells()
    print(
        f"cells       {len(cells)} models to measure on {len(benchmark.questions)} questions x {study.num_samples} samples, "
        f"{valley.trained_tokens():,.0f} tokens to train on in all"
    )
    workers = config.workers or os.cpu_count() or 1
    for finished in valley.run(num_workers=workers):
        tqdm.write(line(finished))
    found = read_cells(valley_run.path)
    if config.rl_steps:
        for rl_run in run_rl(valley, found, steps=config.rl_steps, num_workers=workers):
            tqdm.write(
                f"rl {rl_run.cell.name:<23} {rl_run.before.accuracy:6.1%} -> {rl_run.after.accuracy:.1%} right"
            )
    report = write_report(valley_run.path)
    print("\n".join(findings(curves(found)) + rl_findings(read_rl_runs(valley_run.path))))
    print(f"report {report}")
    return report


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE, quick=QUICK))
