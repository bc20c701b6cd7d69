"""The valley on a CPU: a small model learns from more and more long traces. Does it fall, and does it climb out again?

    python recipes/valley_demo.py --quick          one seed, fewer sizes
    python recipes/valley_demo.py                  three seeds, all arms
    python recipes/valley_demo.py --resume         go on after an interruption: finished models are kept
    python recipes/valley_demo.py --rl_steps 30    and then reinforcement learning from three of the models

The model that ships with the kit has learned chains of additions and subtractions (kit/toy.py) from 40,000 short traces. It is
fine-tuned on more and more long ones, which recheck and correct themselves, and measured each time as the paper measures: samples
at temperature 0.6 and top-p 0.95 on held-out problems. Beside that stand the same problems with short traces, half and half, and
long traces with one batch size throughout. The batch grows with the data, as in the paper's Table 2. Everything goes through the
pipeline of the real recipes; what came out, and what it says, is in report.html of the run folder.

The learning rate was chosen once, by a rule: the largest of those tried at which the short control, 64 and 1,024 more traces of
the kind that the model knows, does not fall beyond chance. Else a fall would be the rate's, not the long traces'. All that was
run, one seed, 100 questions x 2 samples, accuracy in percent (untouched 99.0); "-" was not run:

    lr      short 64   short 256   short 1,024   long 16   long 64   long 256   long 1,024   long 4,096
    3e-3         8.0        54.5          88.0       3.5       1.5        4.0          3.5          7.0 (39.5: other traces)
    1e-3        72.0           -          97.0         -         -          -            -            -
    3e-4        95.5        97.5          99.0      86.5       2.5        2.5          6.0          5.0
    1e-4        98.0           -          99.5         -         -          -            -            -

At this rate nothing climbed out by 4,096 traces; the full setting goes on to 16,384, which has not been run.

Time: not measured on a quiet machine. --quick trains on 3.3 million tokens and samples 0.2 million: 8.2 minutes of CPU time, in
one thread on a busy machine of two cores. The full setting trains on 47 million tokens.

It is about the toy, not about language models. Left out on purpose: a second size of model, and ratios other than half and half.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from kit.benchmarks import BENCHMARKS
from kit.config import parse, show
from kit.generate import SamplingParams
from kit.run import RunFolder
from kit.study import Study
from kit.sweep import parse_numbers
from kit.valley import Finished, Valley, curves, read_cells
from kit.valley_curves import findings
from kit.valley_report import write_report
from kit.valley_rl import read_climbs, rl_findings, run_rl


@dataclass(frozen=True)
class Config:
    # model
    models: str = "tiny,tinier"  # shipped ones, or folders of others that know the toy; the first has all arms
    # cells
    arms: str = "long,short,mixed,growing"  # of kit/study.py, which has two more mixtures; the first has all sizes
    sizes: str = "16,64,256,1024,4096,16384"  # traces, of the first arm
    control_sizes: str = "64,1024,4096"  # traces, of the other arms
    seeds: int = 3  # of traces, packs and samples
    # optimisation
    epochs: int = 4  # passes over the traces
    lr: float = 1e-3  # peak, cosine; why this one: above
    warmup_ratio: float = 0.05  # share of all steps; 0 = none
    batch_traces: int = 16  # traces a step; what the growing batch of that arm does: kit/study.py
    # evaluation
    num_questions: int = 0  # of the 100 held-out problems; 0 = all
    num_samples: int = 4  # samples a question
    temperature: float = 0.6  # 0 = greedy, which the paper avoids
    top_p: float = 0.95  # 1 = off
    max_new_tokens: int = 512  # tokens a response; the longest trace has about 340
    num_slots: int = 100  # responses sampled at once
    # reinforcement learning, from the untouched model, the lowest point and the largest size of the first arm
    rl_steps: int = 0  # steps of 32 prompts x 8 answers; 0 = off
    # run
    workers: int = 0  # cells made at once, each in a process with one thread; 0 = one a core
    quick: bool = False  # one seed, fewer sizes and samples: minutes
    smoke: bool = False  # three models, about a minute
    resume: bool = False  # go on with the run in --out, or with the newest one
    out: str = ""  # run folder; "" = the next free one under runs/


QUICK = {"models": "tiny", "arms": "long,short,mixed", "sizes": "16,64,256,1024,4096", "control_sizes": "64,1024", "seeds": 1,
         "num_samples": 2}  # fmt: skip
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
    trained = f"{row['steps']:>5,} steps, {row['training_seconds']:>4.0f} s" if "steps" in row else "untouched"
    return (
        f"{finished.cell.name:<26} {100 * row['accuracy']:5.1f} % right, {row['mean_tokens']:4.0f} tokens, "
        f"{100 * row['truncated']:3.0f} % cut off; {trained}, {row['sampling_seconds']:.0f} s of sampling"
    )


def main(config: Config) -> Path:
    study = study_of(config)
    valley_run = RunFolder.open(config)
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
        for climb in run_rl(valley, found, steps=config.rl_steps, num_workers=workers):
            tqdm.write(f"rl {climb.cell.name:<23} {climb.before.accuracy:6.1%} -> {climb.after.accuracy:.1%} right")
    report = write_report(valley_run.path)
    print("\n".join(findings(curves(found)) + rl_findings(read_climbs(valley_run.path))))
    print(f"report {report}")
    return report


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE, quick=QUICK))
