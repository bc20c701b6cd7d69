"""Does 8-bit AdamW on bf16 weights follow fp32 AdamW? Three runs train the same weights on the same rows.

    python recipes/bench/optimizer.py                   the shipped tiny model
    python recipes/bench/optimizer.py --model HuggingFaceTB/SmolLM2-135M-Instruct --traces traces.jsonl

1. fp32      fp32 weights, torch's AdamW: the reference.
2. kit       bf16 weights, 8-bit states, both rounded stochastically: training with --no_exact_weights.
3. nearest   bf16 weights, torch's AdamW, whose states are then bf16 too, rounded to nearest: plain bf16.

Prints the loss of each run over the last tenth of the steps, its difference from fp32's, and the distance
between its final weights and fp32's, as a share of the distance that fp32's weights moved.

On a CPU matmuls run in fp32 (bf16 is several times slower there), on weights whose values are bf16, and
gradients are rounded to bf16. With --compute bf16, and on a card, everything runs in bf16. Never run on a GPU
so far.
Left out on purpose: clipping and schedules, which are the same in all three.
"""

from dataclasses import dataclass
from statistics import fmean

import torch
from contest import save

from kit import models
from kit.config import Checked, parse, show
from kit.data import ChatFormat, load_documents
from kit.data.toy import LONG_TRACES
from kit.kernels.linear_cross_entropy import linear_cross_entropy
from kit.models import backbone
from kit.packing import PackedBatch
from kit.progress import Progress
from kit.train import TrainingPlan
from kit.train.optimizer import AdamW8bit

ARMS = ("fp32", "kit", "nearest")


@dataclass(frozen=True)
class Config(Checked):
    model: str = "tiny"  # hub id, local folder, .gguf file, or "tiny"
    device: str = "cpu"  # [cpu | cuda]
    compute: str = "auto"  # of the bf16 runs' matmuls; auto: bf16 on a card, else fp32 [auto | fp32 | bf16]
    traces: str = str(LONG_TRACES)  # hub id[:config][@split], or a .jsonl, .json or .parquet file
    num_traces: int = 0  # traces; 0 = all [>= 0]
    row_tokens: int = 1_024  # tokens per pack; longer traces are dropped [>= 1]
    num_steps: int = 200  # steps of one pack each; the last tenth is compared [>= 10]
    lr: float = 1e-4  # constant [> 0, <= 1]
    seed: int = 0  # of the packs and the rounding [>= 0]
    smoke: bool = False  # 20 steps, in seconds
    json: str = ""  # file for the figures, with the loss of every step; "" = none


SMOKE = {"num_steps": 20, "num_traces": 64, "row_tokens": 512}


class Weights:
    """The weights as a run stores them, and their optimizer.

    The model computes on a copy if the dtypes differ.
    """

    def __init__(self, model, arm: str, config: Config):
        self.used = list(model.parameters())
        dtype = torch.float32 if arm == "fp32" else torch.bfloat16
        self.stored = [p if p.dtype == dtype else torch.nn.Parameter(p.detach().to(dtype)) for p in self.used]
        if arm == "kit":
            self.optimizer = AdamW8bit(self.stored, lr=config.lr, weight_decay=0.0, seed=config.seed)
        else:
            self.optimizer = torch.optim.AdamW(self.stored, lr=config.lr, weight_decay=0.0)
        self.copy()

    @torch.no_grad()
    def copy(self) -> None:
        for used, stored in zip(self.used, self.stored, strict=True):
            used.copy_(stored)

    def step(self) -> None:
        for used, stored in zip(self.used, self.stored, strict=True):
            if used is not stored:
                stored.grad, used.grad = used.grad.to(stored.dtype), None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.copy()


def train(
    config: Config, arm: str, batches: list[PackedBatch]
) -> tuple[list[float], list[torch.Tensor], list[torch.Tensor]]:
    """Return (loss per step, weights before, weights after) of one run."""
    bf16 = config.compute == "bf16" or (config.compute == "auto" and config.device == "cuda")
    dtype = torch.bfloat16 if bf16 and arm != "fp32" else torch.float32
    model, _ = models.load(config.model, device=config.device, dtype=dtype)
    model.train()
    before = [p.detach().float().cpu().clone() for p in model.parameters()]
    weights, losses = Weights(model, arm, config), []
    for step in Progress(arm, "steps", config.num_steps).over(range(config.num_steps)):
        batch = batches[step % len(batches)].to(torch.device(config.device))
        hidden, weight = backbone.hidden_states(model, batch), backbone.head_weight(model)
        loss = linear_cross_entropy(hidden, weight, batch.targets, softcap=backbone.softcap(model))
        loss.backward()
        weights.step()
        losses.append(loss.item())
    return losses, before, [p.detach().float().cpu() for p in weights.stored]


def main(config: Config) -> dict:
    print(show(config))
    _, tokenizer = models.load(config.model, device="cpu")
    chat = ChatFormat(tokenizer, instruction="")
    documents, drop_counts = load_documents(
        config.traces, chat, row_tokens=config.row_tokens, num_traces=config.num_traces, seed=config.seed,
        max_bad_rows=20, cache_dir="",
    )  # fmt: skip
    plan = TrainingPlan.make(
        [len(d) for d in documents], row_tokens=config.row_tokens, batch_traces=1, epochs=1, seed=config.seed
    )
    batches = [PackedBatch.build([documents[i] for i in pack]) for step in plan.steps for pack in step]
    print(f"data        {drop_counts}")
    print(f"{len(batches)} packs of up to {config.row_tokens:,} tokens, {config.num_steps} steps")

    results = {}
    for arm in ARMS:
        losses, before, after = train(config, arm, batches)
        if arm == "fp32":  # the first
            reference, way = after, _distance(before, after)
        last = fmean(losses[-max(config.num_steps // 10, 1) :])
        results[arm] = {"losses": losses, "last": last, "distance": _distance(reference, after) / way}
        off = results[arm]["off"] = last / results["fp32"]["last"] - 1
        print(
            f"{arm:<9} loss {losses[0]:.4f} at first, {last:.4f} at the end, {off:+.2%} from fp32's; "
            f"distance of the weights from fp32's {results[arm]['distance']:.1%} of how far those moved"
        )
    save(config, **results)
    return results


def _distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return sum((x - y).square().sum().item() for x, y in zip(a, b, strict=True)) ** 0.5


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE))
