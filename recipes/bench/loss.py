"""Compare the loss with its peers on a CPU, on the same tensors: seconds and memory, forward and backward.

    python recipes/bench/loss.py
    python recipes/bench/loss.py --hidden_size 1152 --num_tokens 2048

Ours against `F.linear_cross_entropy` in chunks and `F.cross_entropy` on full logits, and against three
matmuls alone, which every exact loss needs; all in fp32.

Each contestant runs in a process of its own, so that its peak memory can be measured; the inputs are not
counted. Left out on purpose: torch's own choice of chunk, a few rows at this vocabulary, which takes minutes
per call; and cards, on which recipes/check_card.py --only speed times the kernels beside their peers, at the
sizes of real models.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from contest import in_a_process, peak_gib, save

from kit.config import Checked, parse
from kit.kernels.linear_cross_entropy import linear_cross_entropy
from kit.machine import resident_bytes
from kit.recipes.card.peers import three_matmuls


@dataclass(frozen=True)
class Config(Checked):
    num_tokens: int = 2_048  # N [>= 1]
    hidden_size: int = 640  # H [>= 1]
    vocab_size: int = 262_144  # V [>= 1]
    repeats: int = 3  # timed runs after a warm-up; the median is reported [>= 1]
    json: str = ""  # file for the figures; "" = none
    smoke: bool = False  # small sizes, in seconds


SMOKE = {"num_tokens": 600, "hidden_size": 32, "vocab_size": 5_000, "repeats": 1}


def main(config: Config) -> list[dict]:
    N, H, V = config.num_tokens, config.hidden_size, config.vocab_size
    sizes = f"N = {N:,}, H = {H:,}, V = {V:,}"
    print(f"loss, forward and backward, fp32 on a CPU, {sizes}; memory besides the inputs")
    rows = []
    for name in LOSSES:
        try:
            rows.append({"name": name, **in_a_process(measure, name, config)})
        except NotImplementedError as error:
            print(f"  {name}: not timed: {error}")
            continue
        rows[-1]["ratio"] = rows[-1]["seconds"] / rows[0]["seconds"]
        print("  {name:<42}{seconds:9.3f} s  x{ratio:6.3f}  {extra_gib:7.2f} GiB".format(**rows[-1]))
    save(config, rows=rows)
    return rows


def _torch_in_chunks(rows: int) -> Callable:
    def loss(hidden, weight, targets):
        if not hasattr(F, "linear_cross_entropy"):
            raise NotImplementedError(f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has")
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        return F.linear_cross_entropy(hidden, weight, targets, options=options)

    return loss


LOSSES = {  # the first is what the others are compared with
    "the three matmuls alone": partial(three_matmuls, chunk=512),
    "ours": linear_cross_entropy,
    "F.linear_cross_entropy, chunks of 512": _torch_in_chunks(512),
    "F.linear_cross_entropy, chunks of 1,024": _torch_in_chunks(1024),
    "F.cross_entropy on full logits": lambda h, w, targets: F.cross_entropy((h @ w.T).float(), targets),
}


def measure(name: str, config: Config) -> dict:
    """Time one contestant in this process, and return its seconds and the memory that it added."""
    torch.manual_seed(0)
    N, H, V = config.num_tokens, config.hidden_size, config.vocab_size
    hidden = torch.randn(N, H).requires_grad_()
    weight = (torch.randn(V, H) * H**-0.5).requires_grad_()
    targets = torch.randint(V, (N,))
    before, times = resident_bytes(), []
    for _ in range(config.repeats + 1):  # the first one warms up
        hidden.grad = weight.grad = None
        gc.collect()
        start = time.perf_counter()
        loss = LOSSES[name](hidden, weight, targets)
        if loss is not None:
            loss.backward()
        del loss
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times[1:]), "extra_gib": peak_gib(before)}


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE))
