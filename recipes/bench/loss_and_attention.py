"""Compare the kernels with their peers on the same tensors: seconds and memory, forward and backward.

    python recipes/bench/loss_and_attention.py            the loss and attention, on this machine
    python recipes/bench/loss_and_attention.py --what loss --hidden_size 1152 --num_tokens 2048

loss: ours against `F.linear_cross_entropy` in chunks, `F.cross_entropy` on full logits and, on a card, Liger
and Apple's CCE; and against three matmuls alone, which every exact loss needs.
attention: ours against one SDPA over the masked square and, on a card, flash-attn.

fp32 on a CPU, bf16 on a card. Each contestant runs in a process of its own, so that its peak memory can be
measured; the inputs are not counted. Peers that are not installed or need a card are named and skipped. Left
out on purpose: torch's own choice of chunk, a few rows at this vocabulary, which takes minutes per call on a
CPU. On a card, recipes/check_card.py --only speed times the kernels at the sizes of real models.
"""

import gc
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from apart import in_a_process
from kernel_traffic import causal_pairs

from kit.config import Checked, parse
from kit.kernels.linear_cross_entropy import linear_cross_entropy
from kit.machine import GIB, describe_machine, peak_resident_bytes, resident_bytes
from kit.models.attention import PACK_ATTENTION
from kit.models.loading import default_device, default_dtype
from kit.recipes.card.peers import cce, liger, three_matmuls
from kit.run import write_json


@dataclass(frozen=True)
class Config(Checked):
    # what
    what: str = "loss,attention"  # parts [loss | attention, ...]
    json: str = ""  # file for the figures; "" = none
    repeats: int = 3  # timed runs after a warm-up; the median is reported [>= 1]
    # loss
    num_tokens: int = 2_048  # N [>= 1]
    hidden_size: int = 640  # H [>= 1]
    vocab_size: int = 262_144  # V [>= 1]
    # attention
    documents: str = "1500,300,900,50,1346"  # tokens of each document in the pack [1..10000000, ...]
    num_heads: int = 4  # of the queries [>= 1]
    num_kv_heads: int = 1  # of keys and values [>= 1]
    head_dim: int = 256  # features per head [>= 1]
    window: int = 0  # tokens that a query sees; 0 = all [>= 0]
    # run
    smoke: bool = False  # small sizes, in seconds


SMOKE = {
    "num_tokens": 600, "hidden_size": 32, "vocab_size": 5_000, "documents": "90,7,33", "head_dim": 16,
    "repeats": 1,
}  # fmt: skip


def main(config: Config) -> dict:
    parts = {"loss": bench_loss, "attention": bench_attention}
    names = config.what.replace(" ", "").split(",")
    results = {name: parts[name](config) for name in names}
    if config.json:
        write_json(Path(config.json), {"machine": describe_machine(), "config": asdict(config), **results})
    return results


def _torch_in_chunks(rows: int):
    def loss(hidden, weight, targets):
        if not hasattr(F, "linear_cross_entropy"):
            raise NotImplementedError(f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has")
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        return F.linear_cross_entropy(hidden, weight, targets, options=options)

    return loss


def _cross_entropy(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).float(), targets)


def _losses() -> dict[str, tuple[str, bool, Callable]]:
    """Return name -> (package, needs a card, function of hidden, weight, targets)."""
    return {
        "the three matmuls alone": ("torch", False, partial(three_matmuls, chunk=512)),
        "ours": ("torch", False, linear_cross_entropy),
        "F.linear_cross_entropy, chunks of 512": ("torch", False, _torch_in_chunks(512)),
        "F.linear_cross_entropy, chunks of 1,024": ("torch", False, _torch_in_chunks(1024)),
        "F.cross_entropy on full logits": ("torch", False, _cross_entropy),
        "Liger fused_linear_cross_entropy": ("liger_kernel", True, liger),
        "Apple cut_cross_entropy": ("cut_cross_entropy", True, cce),
    }


def bench_loss(config: Config) -> list[dict]:
    N, H, V = config.num_tokens, config.hidden_size, config.vocab_size
    sizes = f"N = {N:,}, H = {H:,}, V = {V:,}"
    print(f"\nloss, forward and backward, {_precision()}, {sizes}; memory besides the inputs")
    return _contest("_losses", "_loss_inputs", config, reference="the three matmuls alone")


def _loss_inputs(config: Config, device, dtype):
    N, H, V = config.num_tokens, config.hidden_size, config.vocab_size
    hidden = torch.randn(N, H, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(V, H, device=device, dtype=dtype) * H**-0.5).requires_grad_()
    return hidden, weight, torch.randint(V, (N,), device=device)


def _masked_square(q, k, v, cu_seqlens, max_seqlen, window):
    """Compute one SDPA over the whole row: all pairs of tokens, most of them masked."""
    position = torch.arange(len(q), device=q.device)
    document = torch.bucketize(position, cu_seqlens[1:], right=True)
    distance = position[:, None] - position[None, :]
    seen = (document[:, None] == document[None, :]) & (distance >= 0) & (distance < (window or len(q)))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)


def _attentions() -> dict[str, tuple[str, bool, Callable]]:
    def packed(choice: str) -> Callable:
        return lambda *arguments: PACK_ATTENTION[choice](*arguments[:-1], window=arguments[-1])

    return {
        "ours": ("torch", False, packed("kit")),
        "SDPA over the masked square": ("torch", False, _masked_square),
        "flash-attn": ("flash_attn", True, packed("flash-attn")),
    }


def bench_attention(config: Config) -> list[dict]:
    lengths = _lengths(config)
    heads = f"{config.num_heads} heads on {config.num_kv_heads}, head_dim {config.head_dim}"
    window = f"window {config.window or 'none'}"
    print(
        f"\nattention, forward and backward, {_precision()}, {heads}, {window}, documents of "
        f"{config.documents} tokens"
    )
    seen = causal_pairs(lengths, config.window) / sum(lengths) ** 2
    print(f"  {seen:.1%} of all pairs of tokens see each other")
    return _contest("_attentions", "_attention_inputs", config, reference="ours")


def _lengths(config: Config) -> list[int]:
    try:
        lengths = [int(n) for n in config.documents.split(",")]
    except ValueError as error:
        wanted = "pass token counts, comma-separated: 1500,300,900"
        raise ValueError(f"documents is {config.documents!r}; {wanted}") from error
    if min(lengths) < 1:
        raise ValueError(f"documents is {config.documents!r} but every document has at least one token")
    return lengths


def _attention_inputs(config: Config, device, dtype):
    lengths = _lengths(config)
    T, D = sum(lengths), config.head_dim
    q, k, v = (
        torch.randn(T, heads, D, device=device, dtype=dtype).requires_grad_()
        for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    )
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    return q, k, v, cu_seqlens, max(lengths), config.window or None


def _contest(contestants: str, inputs: str, config: Config, reference: str) -> list[dict]:
    rows = []
    for name, (package, needs_card, _) in globals()[contestants]().items():
        if importlib.util.find_spec(package) is None:
            print(f"  {name}: {package} is not installed, not compared")
        elif needs_card and not torch.cuda.is_available():
            print(f"  {name}: runs on a GPU only, not timed")
        else:
            try:
                found = in_a_process(_measure, contestants, inputs, name, config)
            except Exception as error:
                if name == "ours":
                    raise
                print(f"  {name}: does not run here, not timed: {type(error).__name__}: {error}")
                continue
            rows.append({"name": name, **found})
            base = next((row["seconds"] for row in rows if row["name"] == reference), rows[0]["seconds"])
            rows[-1]["ratio"] = rows[-1]["seconds"] / base
            print("  {name:<42}{seconds:9.3f} s  x{ratio:6.3f}  {extra_gib:7.2f} GiB".format(**rows[-1]))
    return rows


def _measure(contestants: str, inputs: str, name: str, config: Config) -> dict:
    torch.manual_seed(0)
    device = default_device()
    card = device.type == "cuda"
    tensors = globals()[inputs](config, device, default_dtype(device))
    function = globals()[contestants]()[name][2]
    before = torch.cuda.memory_allocated() if card else resident_bytes()
    times = []
    for _ in range(config.repeats + 1):  # the first one warms up
        for x in tensors:
            if isinstance(x, torch.Tensor):
                x.grad = None
        gc.collect()
        if card:
            torch.cuda.synchronize()
        start = time.perf_counter()
        out = function(*tensors)
        if out is not None:
            out.sum().backward()
        del out
        if card:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if card else peak_resident_bytes()
    return {
        "seconds": statistics.median(times[1:]),
        "extra_gib": math.nan if peak is None else (peak - before) / GIB,
    }


def _precision() -> str:
    device = default_device()
    dtype = str(default_dtype(device)).removeprefix("torch.")
    return f"{dtype} on {'a CPU' if device.type == 'cpu' else describe_machine()['gpu']}"


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE))
