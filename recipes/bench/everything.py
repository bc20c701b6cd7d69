"""Compare the kit with its peers on the same input in one run: seconds, memory, ratios.

    python recipes/bench/everything.py                          everything, on this machine
    python recipes/bench/everything.py --what packing           one part: packing, loss, attention or finetune
    python recipes/bench/everything.py --json bench.json        for posting

packing: `plan_packs` against TRL's `pack_dataset(strategy="bfd")` on lognormal lengths. TRL builds the packed
rows as it goes; ours are built when a step needs them, so building them is timed as well. loss, attention:
loss_and_attention.py. finetune: finetune.py, a whole run against TRL's SFTTrainer. A peer that is not
installed is named. Takes about ten minutes on two CPU cores. Left out on purpose: sampling and grading, which
have scripts of their own.
"""

import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import finetune
import loss_and_attention
import torch
from apart import has_trl

from kit.config import Checked, parse
from kit.machine import describe_machine
from kit.packing import Document, PackedBatch, fill, plan_packs
from kit.run import write_json


@dataclass(frozen=True)
class Config(Checked):
    # what
    what: str = "packing,loss,attention,finetune"  # parts [packing | loss | attention | finetune, ...]
    json: str = ""  # file for the figures; "" = none
    # packing
    num_rows: int = 100_000  # documents [>= 1]
    median_tokens: int = 4_096  # of the lognormal lengths [>= 1]
    sigma: float = 0.8  # of the lognormal lengths [>= 0]
    row_tokens: int = 16_384  # capacity of a pack; lengths are clipped to it [>= 1]
    # finetune; the sizes of loss and attention are flags of loss_and_attention.py
    model: str = "tiny"  # hub id, local folder or .gguf file
    traces: str = ""  # hub id[:config][@split] or file; "" = random tokens
    vocab_size: int = (
        262_144  # of a Llama with random weights, trained in a second run; 0 = no such run [>= 0]
    )
    # run
    smoke: bool = False  # small sizes, in seconds


SMOKE = {"num_rows": 2_000, "vocab_size": 0}


def main(config: Config) -> dict:
    small = loss_and_attention.SMOKE if config.smoke else {}
    parts = {
        "packing": lambda: bench_packing(config),
        "loss": lambda: loss_and_attention.main(loss_and_attention.Config(what="loss", **small)),
        "attention": lambda: loss_and_attention.main(loss_and_attention.Config(what="attention", **small)),
        "finetune": lambda: bench_run(config),
    }
    names = config.what.replace(" ", "").split(",")

    machine = describe_machine()
    print("\n".join(f"{key:<10} {value}" for key, value in machine.items()))
    results = {name: parts[name]() for name in names}
    if config.json:
        write_json(Path(config.json), {"machine": machine, "config": asdict(config), **results})
    return results


def bench_run(config: Config) -> list[list[dict]]:
    small = finetune.SMOKE if config.smoke else {}
    runs = [finetune.Config(model=config.model, traces=config.traces, **small)]
    if config.vocab_size:
        runs.append(finetune.Config(vocab_size=config.vocab_size, **small))
    return [finetune.main(run) for run in runs]


def bench_packing(config: Config) -> list[dict]:
    rng, mean = random.Random(0), math.log(config.median_tokens)
    drawn = [round(rng.lognormvariate(mean, config.sigma)) for _ in range(config.num_rows)]
    lengths = [min(config.row_tokens, max(1, length)) for length in drawn]
    print(f"\npacking {len(lengths):,} documents, {sum(lengths):,} tokens, rows of {config.row_tokens:,}")

    packs, *planned = timed(plan_packs, lengths, config.row_tokens)
    tokens = torch.zeros(sum(lengths), dtype=torch.int32)
    documents = [Document(ids, 0) for ids in tokens.split(lengths)]

    def build() -> None:
        for pack in packs:
            PackedBatch.build([documents[i] for i in pack])

    _, *built = timed(build)
    both = [sum(pair) for pair in zip(planned, built, strict=True)]
    ours = fill(packs, lengths, config.row_tokens)
    rows = [
        {"name": "ours, the plan", "seconds": planned[0], "cpu_seconds": planned[1], "fill": ours},
        {"name": "ours, plan and every row built", "seconds": both[0], "cpu_seconds": both[1], "fill": ours},
    ]
    if has_trl():
        rows.append(_trl_packing(tokens, lengths, config.row_tokens))
    for row in rows:
        row["rows_per_second"] = len(lengths) / row["seconds"]
        print(
            "  {name:<36}{seconds:8.2f} s  CPU {cpu_seconds:8.2f} s  fill {fill:.2%}  "
            "{rows_per_second:>9,.0f} rows/s".format(**row)
        )
    return rows


def timed(function, *arguments, **options) -> tuple:
    """Return (what a function returns, seconds, CPU seconds, which a busy machine changes less)."""
    start, cpu = time.perf_counter(), time.process_time()
    result = function(*arguments, **options)
    return result, time.perf_counter() - start, time.process_time() - cpu


def _trl_packing(tokens: torch.Tensor, lengths: list[int], row_tokens: int) -> dict:
    import datasets
    import pyarrow
    from trl import pack_dataset

    offsets = pyarrow.array([0, *torch.tensor(lengths).cumsum(0).tolist()], type=pyarrow.int64())
    column = pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(tokens.numpy()))
    dataset = datasets.Dataset(pyarrow.table({"input_ids": column}))
    datasets.disable_progress_bars()
    datasets.disable_caching()
    packed, seconds, cpu = timed(pack_dataset, dataset, row_tokens, strategy="bfd")
    fill_of_rows = sum(lengths) / (len(packed) * row_tokens)
    name = 'TRL pack_dataset(strategy="bfd")'
    return {"name": name, "seconds": seconds, "cpu_seconds": cpu, "fill": fill_of_rows}


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE))
