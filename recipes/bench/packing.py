"""Compare packing with TRL's on lognormal lengths: seconds, and how full the rows are.

    python recipes/bench/packing.py                         100,000 documents, on this machine
    python recipes/bench/packing.py --num_rows 30000 --json packing.json

`plan_packs` against TRL's `pack_dataset(strategy="bfd")`. TRL builds the packed rows as it goes; ours are
built when a step needs them, so building them is timed as well. If TRL is not installed, ours is timed alone.
"""

import math
import random
from dataclasses import dataclass

import torch
from contest import has_trl, save, timed

from kit.config import Checked, parse
from kit.packing import Document, PackedBatch, fill, plan_packs


@dataclass(frozen=True)
class Config(Checked):
    num_rows: int = 100_000  # documents [>= 1]
    median_tokens: int = 4_096  # of the lognormal lengths [>= 1]
    sigma: float = 0.8  # of the lognormal lengths [>= 0]
    row_tokens: int = 16_384  # capacity of a pack; lengths are clipped to it [>= 1]
    json: str = ""  # file for the figures; "" = none
    smoke: bool = False  # few documents, in seconds


SMOKE = {"num_rows": 2_000}


def main(config: Config) -> list[dict]:
    rng, mean = random.Random(0), math.log(config.median_tokens)
    drawn = [round(rng.lognormvariate(mean, config.sigma)) for _ in range(config.num_rows)]
    lengths = [min(config.row_tokens, max(1, length)) for length in drawn]
    print(f"packing {len(lengths):,} documents, {sum(lengths):,} tokens, rows of {config.row_tokens:,}")

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
    save(config, rows=rows)
    return rows


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
