"""Ours and the peers on the same input in one run: seconds, memory, ratios.

    python recipes/bench.py                          everything, on this machine
    python recipes/bench.py --what packing           one part: packing or loss
    python recipes/bench.py --json bench.json        for posting

packing: `plan_packs` against TRL's `pack_dataset(strategy="bfd")` on lognormal lengths. TRL moves the tokens while it packs; ours
are moved when a step builds its rows, so that part is timed too. loss: forward and backward of the fused loss against
`F.cross_entropy` on full logits and `F.linear_cross_entropy` in chunks, each in a fresh process for its peak memory. A peer that
is not installed is named. Takes about ten minutes on two CPU cores. Left out on purpose: torch's own choice of chunk, a few rows
at this vocabulary, which takes minutes a call on a CPU; and, so far, everything that needs a GPU.
"""

import gc
import importlib.util
import json
import math
import multiprocessing
import platform
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from kit.config import parse
from kit.kernels.linear_cross_entropy import linear_cross_entropy
from kit.packing import Document, PackedBatch, fill, plan_packs


@dataclass(frozen=True)
class Config:
    # what
    what: str = "packing,loss"  # parts, comma-separated
    json: str = ""  # file for the figures; "" = none
    # packing
    num_rows: int = 100_000  # documents
    median_tokens: int = 4_096  # of the lognormal lengths
    sigma: float = 0.8  # of the lognormal lengths
    row_tokens: int = 16_384  # capacity of a pack; lengths are clipped to it
    # loss
    num_tokens: int = 4_096  # N
    hidden_size: int = 640  # H
    vocab_size: int = 262_144  # V
    repeats: int = 3  # timed runs; the median counts
    # run
    smoke: bool = False  # small sizes, in seconds


SMOKE = {"num_rows": 2_000, "num_tokens": 600, "hidden_size": 32, "vocab_size": 5_000, "repeats": 1}


def main(config: Config) -> dict:
    parts = {"packing": bench_packing, "loss": bench_loss}
    unknown = [name for name in config.what.split(",") if name not in parts]
    if unknown:
        raise ValueError(f"what is {config.what!r} but the parts are {', '.join(parts)}; leave {unknown[0]!r} out")
    threads = torch.get_num_threads()
    print(f"{platform.machine()}, {threads} threads, torch {torch.__version__}; GPU: not timed")
    results = {name: parts[name](config) for name in config.what.split(",")}
    if config.json:
        Path(config.json).write_text(json.dumps({"torch": torch.__version__, "threads": threads, **results}, indent=2) + "\n")
    return results


def bench_packing(config: Config) -> list[dict]:
    rng = random.Random(0)
    lengths = [
        min(config.row_tokens, max(1, round(rng.lognormvariate(math.log(config.median_tokens), config.sigma))))
        for _ in range(config.num_rows)
    ]
    print(f"\npacking {len(lengths):,} documents, {sum(lengths):,} tokens, rows of {config.row_tokens:,}")
    start = time.perf_counter()
    packs = plan_packs(lengths, config.row_tokens)
    planned = time.perf_counter() - start
    tokens = torch.zeros(sum(lengths), dtype=torch.int32)
    documents = [Document(ids, 0) for ids in tokens.split(lengths)]
    start = time.perf_counter()
    for pack in packs:
        PackedBatch.build([documents[i] for i in pack])
    built = time.perf_counter() - start
    rows = [
        {"name": "ours, the plan", "seconds": planned, "fill": fill(packs, lengths, config.row_tokens)},
        {"name": "ours, plan and every row built", "seconds": planned + built, "fill": fill(packs, lengths, config.row_tokens)},
    ]
    if importlib.util.find_spec("trl"):
        rows.append(_trl_packing(tokens, lengths, config.row_tokens))
    else:
        print("TRL is not installed (pip install trl): not compared")
    for row in rows:
        row["rows_per_second"] = len(lengths) / row["seconds"]
    _show(rows, rows[-1]["seconds"])
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
    start = time.perf_counter()
    packed = pack_dataset(dataset, row_tokens, strategy="bfd")
    seconds = time.perf_counter() - start
    return {"name": 'TRL pack_dataset(strategy="bfd")', "seconds": seconds, "fill": sum(lengths) / (len(packed) * row_tokens)}


def _torch_in_chunks(rows: int):
    return lambda hidden, weight, targets: F.linear_cross_entropy(
        hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    )


LOSSES = {
    "ours": linear_cross_entropy,
    "F.linear_cross_entropy, chunks of 512": _torch_in_chunks(512),
    "F.linear_cross_entropy, chunks of 1,024": _torch_in_chunks(1024),
    "F.cross_entropy on full logits": lambda hidden, weight, targets: F.cross_entropy(hidden @ weight.T, targets),
}


def bench_loss(config: Config) -> list[dict]:
    N, H, V = config.num_tokens, config.hidden_size, config.vocab_size
    print(f"\nloss, forward and backward, fp32, N = {N:,}, H = {H:,}, V = {V:,}; memory besides inputs")
    rows = []
    for name in ["the three matmuls alone", *LOSSES]:
        # a process of its own: a peak is the highest there ever was
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(_time_loss, name, N, H, V, config.repeats, torch.get_num_threads()).result())
        _show(rows[-1:], rows[min(len(rows) - 1, 1)]["seconds"])
    return rows


def _time_loss(name: str, N: int, H: int, V: int, repeats: int, threads: int) -> dict:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    hidden = torch.randn(N, H).requires_grad_()
    weight = (torch.randn(V, H) * H**-0.5).requires_grad_()
    targets = torch.randint(V, (N,))
    before, times, loss = _status("VmRSS"), [], math.nan
    for _ in range(repeats + 1):  # the first one warms up
        hidden.grad = weight.grad = None
        gc.collect()
        start = time.perf_counter()
        if name in LOSSES:
            value = LOSSES[name](hidden, weight, targets)
            value.backward()
            loss = value.item()
            del value
        else:
            _three_matmuls(hidden.detach(), weight.detach())
        times.append(time.perf_counter() - start)
    peak = _status("VmHWM")
    extra = None if peak is None else (peak - before) / 2**20
    return {"name": name, "seconds": statistics.median(times[1:]), "extra_gib": extra, "loss": loss}


def _three_matmuls(hidden: torch.Tensor, weight: torch.Tensor, chunk: int = 512) -> None:
    """What no way around exists for: logits, dX and dW, in chunks, into buffers that are used again."""
    logits, dhidden, dweight = torch.empty(chunk, len(weight)), torch.empty_like(hidden), torch.empty_like(weight)
    for start in range(0, len(hidden), chunk):
        rows = hidden[start : start + chunk]
        part = torch.mm(rows, weight.T, out=logits[: len(rows)])
        torch.mm(part, weight, out=dhidden[start : start + chunk])
        torch.addmm(dweight, part.T, rows, beta=float(start > 0), out=dweight)


def _status(key: str) -> int | None:
    """KiB from Linux's process status; None elsewhere."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(key)), None)


def _show(rows: list[dict], reference: float) -> None:
    for row in rows:
        extra = "" if row.get("extra_gib") is None else f"  {row['extra_gib']:7.2f} GiB"
        full = f"  fill {row['fill']:.2%}  {row['rows_per_second']:>11,.0f} rows/s" if "fill" in row else ""
        print(f"  {row['name']:<40}{row['seconds']:9.2f} s  x{row['seconds'] / reference:6.3f}{extra}{full}")


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE))
