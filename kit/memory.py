"""The memory plan: what a training step holds at its worst moment, who holds it, and what to switch on so that it fits.

The plan is no formula. It runs the real training step (kit.step) on fake tensors, which have shapes and no numbers, and counts
every live byte (kit.ledger): no GPU, no weights, no download for the models whose configs ship with the kit. It simulates; what a
card really holds is printed beside it after ten steps. `formula` is a second opinion from the model's sizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from kit import ledger
from kit.cost import ASSUMED, Sizes, extra_seconds, step_seconds
from kit.kernels.blocked_head import BLOCK_BYTES
from kit.kernels.linear_head import rows_per_chunk
from kit.ledger import Ledger
from kit.machine import GIB
from kit.packing import PackedBatch
from kit.savings import Savings
from kit.step import LossOfRow, TrainingStep
from kit.toy import SHIPPED

CONFIGS = Path(__file__).parent / "configs"
CONTEXT = round(0.55 * GIB)  # bytes a card gives to CUDA itself, its libraries and the display; an assumption
SLACK = 0.06  # of the peak: what the allocator cannot use between blocks; an assumption
CARDS = (6, 8, 12, 16, 24)  # GiB

# From fastest to leanest (kit.cost); each rung keeps what the ones before it switched on.
LADDER = (
    {"optimizer": "adamw8bit"},
    {"tile_tokens": 2048},
    {"update_in_backward": True},
    {"logit_rows": 512},
    {"offload_inputs": True},
    {"head_update": "blocked"},
    {"offload_optimizer": True},
)


@dataclass(frozen=True)
class Plan:
    """What one training step holds."""

    model: str
    row_tokens: int
    qlora_rank: int
    savings: Savings
    peak: int  # bytes of tensors at the worst moment
    when: str
    owners: dict[str, int]  # owner -> bytes at that moment
    host: int  # bytes of CPU memory
    seconds: dict[str, float] = field(default_factory=dict)  # "step", and what each saving adds; estimated; empty = not

    @property
    def total(self) -> int:
        """Bytes a card needs: tensors, slack, CUDA's own."""
        return round(self.peak * (1 + SLACK)) + CONTEXT

    def fits(self, gpu_gb: float) -> bool:
        return self.total <= gpu_gb * GIB

    def __str__(self) -> str:
        what = f"QLoRA of rank {self.qlora_rank}" if self.qlora_rank else "full fine-tuning"
        on = ", ".join(f"{name} {value}" for name, value in asdict(self.savings).items() if value != getattr(Savings(), name))
        lines = [
            f"{self.model}, {what}, {self.row_tokens:,} tokens a row: {self.total / GIB:.2f} GiB (simulated)",
            f"  switched on: {on or 'nothing but the defaults'}",
            f"  peak of tensors {self.peak / GIB:.2f} GiB in: {self.when}; assumed besides: {SLACK:.0%} slack, "
            f"{CONTEXT / GIB:.2f} GiB for CUDA; in CPU memory {self.host / GIB:.2f} GiB",
            *(f"    {owner:<18}{num_bytes / GIB:7.2f} GiB" for owner, num_bytes in self.largest()),
            *self._costs(),
            "  fits " + ", ".join(f"{gb} GB: {'yes' if self.fits(gb) else 'no'}" for gb in CARDS),
        ]
        return "\n".join(lines)

    def _costs(self) -> list[str]:
        if not self.seconds:
            return []
        added = ", ".join(f"{name} {s:.2f} s" for name, s in self.seconds.items() if name != "step")
        return [f"  a step {self.seconds['step']:.1f} s, and the savings add {added or 'nothing'}", f"    ({ASSUMED}; not timed)"]

    def largest(self) -> list[tuple[str, int]]:
        on_card = [(owner, n) for owner, n in self.owners.items() if n and owner != ledger.HOST]
        return sorted(on_card, key=lambda pair: -pair[1])

    def as_json(self) -> dict:
        return asdict(self) | {"total": self.total, "simulated": True, "fits_gb": [gb for gb in CARDS if self.fits(gb)]}


def load_config(model: str) -> PreTrainedConfig:
    """A model's config without its weights: shipped with the kit, from a folder or GGUF file, or from the hub.

    Raises ValueError where there is none, with the way to give one.
    """
    shipped = CONFIGS / f"{model.replace('/', '--')}.json"
    if shipped.is_file():
        settings = json.loads(shipped.read_text(encoding="utf-8"))
        return AutoConfig.for_model(**settings)
    folder = SHIPPED.get(model, Path(model).expanduser())
    try:
        if folder.suffix == ".gguf":
            return AutoConfig.from_pretrained(folder.parent, gguf_file=folder.name)
        return AutoConfig.from_pretrained(folder if folder.is_dir() else model)
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(path.stem.replace("--", "/") for path in CONFIGS.glob("*.json")))
        raise ValueError(
            f"model is {model} and no config of it is at hand; pass a folder that holds its config.json, go online for the "
            f"hub's, or take one of those that ship with the kit: {known}\n{error}"
        ) from error


def fake_batch(row_tokens: int) -> PackedBatch:
    """A row of one document, every token of it a target: the most a row can cost."""
    ids = torch.zeros(row_tokens, dtype=torch.int64)
    return PackedBatch(ids, ids.clone(), ids.clone(), torch.zeros(2, dtype=torch.int32), row_tokens, row_tokens)


def measure(
    model, savings: Savings, batch: PackedBatch, *, steps: int = 1, rows: int = 1, loss_of: LossOfRow | None = None,
    resident: Mapping[str, Sequence[torch.Tensor]] = MappingProxyType({}),
) -> Ledger:  # fmt: skip
    """The ledger of real or fake training steps. steps: 2 counts an optimizer that makes its states in the first. rows: times
    that a step takes the batch. loss_of: as TrainingStep's. resident: owner -> tensors that lie beside the step."""
    book = Ledger(model)
    for owner, tensors in resident.items():
        for tensor in tensors:
            book.enter(tensor, owner)
    training_step = TrainingStep(model, savings, lr=1e-5)
    for state in training_step.optimizer.state.values():
        for name, tensor in state.items():
            book.enter(tensor, ledger.HOST if savings.offload_optimizer and name != "step" else ledger.OPTIMIZER)
    finish, update_after = training_step.head.finish, training_step.updates.finish

    def head_update():
        book.phase, book.owner = "update of the head", ledger.HEAD
        finish()

    def update():
        book.phase, book.owner = "update of the weights", ledger.OPTIMIZER
        return update_after()

    training_step.head.finish, training_step.updates.finish = head_update, update
    with book:
        for _ in range(steps):
            training_step([batch] * rows, loss_of)
    book.close()
    training_step.close()
    return book


def plan(
    model: str, *, row_tokens: int, savings: Savings | None = None, qlora_rank: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Plan:
    """Simulate one training step of a row of row_tokens. model: as load_config takes it. Takes seconds to a minute.

    Raises ValueError for a model without a config at hand and for savings that exclude one another.
    """
    savings = savings or Savings()
    config = load_config(model)
    if qlora_rank:  # seconds of bitsandbytes and peft; and not below, where a tensor made by an import would be fake for good
        from kit.nf4 import simulate_quantised_decoder
        from kit.qlora import add_adapters
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = AutoModelForCausalLM.from_config(config, attn_implementation="kit", dtype=dtype)
        if qlora_rank:
            simulate_quantised_decoder(fake)
            add_adapters(fake, base="", rank=qlora_rank)
        lazy = savings.optimizer == "adamw" or (savings.optimizer == "auto" and dtype == torch.float32)
        book = measure(fake, savings, fake_batch(row_tokens), steps=2 if lazy else 1)
    owners = {owner: n for owner, n in book.owners.items() if n}
    costs = config, row_tokens, savings, qlora_rank
    seconds = {"step": step_seconds(*costs), **extra_seconds(*costs)}
    return Plan(model, row_tokens, qlora_rank, savings, book.peak, book.when, owners, book.host_peak, seconds)


def rungs(qlora_rank: int) -> list[Savings]:
    """Settings to try, from fastest to leanest. QLoRA has no head gradient to block and few states to move."""
    found, settings = [], {}
    for rung in LADDER:
        if qlora_rank and rung.keys() & {"head_update", "offload_optimizer", "update_in_backward"}:
            continue
        settings |= rung
        found.append(Savings(**settings))
    return found


def choose(model: str, *, row_tokens: int, gpu_gb: float, qlora_rank: int = 0) -> Plan:
    """The plan of the fastest settings that fit a card of gpu_gb GiB.

    Raises ValueError where none does, naming the three largest owners of the leanest and a row that would fit, or QLoRA.
    """
    config, settings = load_config(model), rungs(qlora_rank)
    likely = [s for s in settings[:-1] if sum(formula(config, row_tokens, s, qlora_rank).values()) <= 1.1 * gpu_gb * GIB]
    for savings in [*likely, settings[-1]]:
        found = plan(model, row_tokens=row_tokens, savings=savings, qlora_rank=qlora_rank)
        if found.fits(gpu_gb):
            return found
    owners = ", ".join(f"{owner} {n / GIB:.2f} GiB" for owner, n in found.largest()[:3])
    shorter = next((t for t in (8192, 4096, 2048, 1024) if t < row_tokens and formula_total(config, t, settings[-1], qlora_rank)
                    <= gpu_gb * GIB), None)  # fmt: skip
    ways = [f"--row_tokens {shorter}" if shorter else "", "" if qlora_rank else "--qlora_rank 16", "a larger card"]
    raise ValueError(
        f"gpu_gb is {gpu_gb:g} but {model} at {row_tokens:,} tokens needs {found.total / GIB:.2f} GiB with every saving on; its "
        f"largest owners are {owners}; pass {', or '.join(filter(None, ways))}"
    )


def formula_total(config: PreTrainedConfig, row_tokens: int, savings: Savings, qlora_rank: int = 0) -> int:
    """Plan.total by the formula."""
    return round(sum(formula(config, row_tokens, savings, qlora_rank).values()) * (1 + SLACK)) + CONTEXT


def formula(config: PreTrainedConfig, row_tokens: int, savings: Savings, qlora_rank: int = 0) -> dict[str, int]:
    """A second opinion on bf16 weights, owner by owner, in bytes, at the larger of the two moments that can be the worst: the
    loss, and one layer's backward pass. Good to a tenth."""
    T, sizes = row_tokens, Sizes.of(config)
    V, H, L, intermediate, q, kv = sizes.V, sizes.H, sizes.L, sizes.intermediate, sizes.q, sizes.kv
    head = V * H * (1 if sizes.tied else 2)
    trainable = sizes.linears + head
    weights = 2 * trainable
    if qlora_rank:
        trainable = L * qlora_rank * (2 * (H + q) + 2 * (H + kv) + 3 * (H + intermediate))
        weights = round(sizes.linears * 4.127 / 8) + 2 * (head + trainable)
    row = T * H * 2  # bytes of one (T, H) in bf16
    states = 0 if savings.offload_optimizer else round(trainable * (8 if savings.optimizer == "adamw" else 2 + 8 / 256))
    gradients = 0 if savings.update_in_backward else 2 * trainable
    whole = savings.head_update == "whole" and not qlora_rank
    tile = min(savings.tile_tokens or T, T)
    # a tile's gate, up, activation and product, their gradients; attention's q, k, v and out with gradients, and in fp32 in norms
    layer = tile * 8 * intermediate * 2 + T * 3 * (q + kv) * 2 + 3 * row
    if not qlora_rank:
        layer += 2 * sizes.attention + sizes.mlp * (6 if tile < T else 2)
    else:
        layer += 2 * H * intermediate  # one weight, dequantised
    chunk = rows_per_chunk(T, V, H, 2, savings.logit_rows) * 2 * (V + 3 * H)
    norm_graph = 0 if savings.recompute else 5 * row  # the last norm's, two fp32 copies and a bf16 one
    at_loss = {ledger.LOGITS: chunk, ledger.HEAD: 4 * V * H if whole else 0, ledger.REST: 2 * row + norm_graph}
    in_layer = {ledger.LAYER: layer, ledger.HEAD: 2 * V * H if whole else 0}
    if not savings.update_in_backward:
        in_layer[ledger.GRADIENTS] = gradients - in_layer[ledger.HEAD]
    block = min(V, BLOCK_BYTES // (2 * T + 4 * H)) * (2 * T + 4 * H)
    in_head = {} if whole or qlora_rank else {ledger.HEAD: block, ledger.REST: 6 * row}
    worst = max(at_loss, in_layer, in_head, key=lambda owners: sum(owners.values()))
    return {
        ledger.WEIGHTS: weights,
        ledger.OPTIMIZER: states,
        ledger.INPUTS: row * (3 if savings.offload_inputs else L + 1),
    } | worst


def switches(chosen: Plan) -> dict:
    """The chosen savings as a recipe's settings, with what they bring along: one row a step, no global norm."""
    found = asdict(chosen.savings)
    if chosen.savings.update_in_backward:
        found["batch_traces"] = 1
    if chosen.savings.head_update == "blocked":
        found["max_grad_norm"] = 0.0
    return found


def check_free_memory(planned: Plan) -> None:
    """Raises ValueError where the card has less memory free than the plan needs, with the way to settings that fit."""
    free, total = torch.cuda.mem_get_info()
    if planned.total - CONTEXT > free:  # CUDA is up by now and has taken its own part
        owners = ", ".join(f"{owner} {n / GIB:.2f} GiB" for owner, n in planned.largest()[:3])
        raise ValueError(
            f"the plan needs {planned.total / GIB:.2f} GiB but {free / GIB:.2f} of the card's {total / GIB:.2f} GiB are free; "
            f"its largest owners are {owners}; pass --gpu_gb {int(free / GIB)} to have settings chosen, or close what uses the "
            "card"
        )


def with_savings(config, chosen: Plan):
    """A recipe's config with the switches of a plan."""
    return replace(config, **switches(chosen))
