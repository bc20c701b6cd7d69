"""The memory plan: what a training step holds at its worst moment, who holds it, and what to switch on so that it fits.

The plan is no formula. It runs the real training step (kit.train.step) on fake tensors, which have shapes and
no numbers, and counts every live byte (kit.memory.live_bytes): no GPU, no weights, no download for the models
whose configs ship with the kit. It simulates; what a card really holds is printed beside it after ten steps.
kit.memory.closed_form is a second opinion; kit.memory.choose finds settings that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import floor
from types import MappingProxyType

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from kit.machine import CONTEXT, GIB
from kit.memory import live_bytes
from kit.memory.live_bytes import Ledger
from kit.memory.seconds import ASSUMED, extra_seconds, step_seconds
from kit.models.attention import REGISTERED
from kit.models.backbone import head_weight
from kit.models.loading import load_config
from kit.packing import PackedBatch
from kit.train.head import TiedHead
from kit.train.loss import LossOfRow
from kit.train.savings import Savings
from kit.train.step import TrainingStep

SLACK = 0.06  # of the peak: what the allocator cannot use between blocks; an assumption
CARDS = (6, 8, 12, 16, 24)  # GiB


def card_bytes(peak: int) -> int:
    """Bytes a card needs for a peak of tensors: slack and CUDA's own besides."""
    return round(peak * (1 + SLACK)) + CONTEXT


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
    seconds: dict[str, float] = field(
        default_factory=dict
    )  # "step", and what each saving adds; estimated; empty = not
    rows: int = 1  # that the simulated step took; 2 stands for more

    @property
    def total(self) -> int:
        """Bytes a card needs: tensors, slack, CUDA's own."""
        return card_bytes(self.peak)

    def fits(self, gpu_gb: float) -> bool:
        return self.total <= gpu_gb * GIB

    def __str__(self) -> str:
        what = f"QLoRA of rank {self.qlora_rank}" if self.qlora_rank else "full fine-tuning"
        on = ", ".join(
            f"{name} {value}"
            for name, value in asdict(self.savings).items()
            if value != getattr(Savings(), name)
        )
        rows = "one row per step" if self.rows == 1 else "several rows per step"
        lines = [
            f"{self.model}, {what}, {self.row_tokens:,} tokens per row, {rows}: {self.total / GIB:.2f} GiB (simulated)",
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
        return [
            f"  a step of one row {self.seconds['step']:.1f} s, and the savings add {added or 'nothing'}",
            f"    ({ASSUMED}; not timed)",
        ]

    def largest(self) -> list[tuple[str, int]]:
        on_card = [(owner, n) for owner, n in self.owners.items() if n and owner != live_bytes.HOST]
        return sorted(on_card, key=lambda pair: -pair[1])

    def largest_owners(self) -> str:
        """The three largest, for an error message."""
        return ", ".join(f"{owner} {n / GIB:.2f} GiB" for owner, n in self.largest()[:3])

    def as_json(self) -> dict:
        return asdict(self) | {
            "total": self.total,
            "simulated": True,
            "fits_gb": [gb for gb in CARDS if self.fits(gb)],
        }


def fake_batch(row_tokens: int) -> PackedBatch:
    """A row of one document, every token of it a target: the most a row can cost."""
    ids = torch.zeros(row_tokens, dtype=torch.int64)
    return PackedBatch(
        ids, ids.clone(), ids.clone(), torch.zeros(2, dtype=torch.int32), row_tokens, row_tokens
    )


def measure(
    model, savings: Savings, batch: PackedBatch, *, steps: int = 1, rows: int = 1, later_row: bool = False,
    loss_of: LossOfRow | None = None, resident: Mapping[str, Sequence[torch.Tensor]] = MappingProxyType({}),
) -> Ledger:  # fmt: skip
    """The ledger of real or fake training steps. steps: 2 counts an optimizer that makes its states in the first. rows: times
    that a step takes the batch. later_row: the gradients of a row before lie there, as from a step's second row on: that costs no
    second row's time. loss_of: as TrainingStep's. resident: owner -> tensors that lie beside the step."""
    book = Ledger(model)
    for owner, tensors in resident.items():
        for tensor in tensors:
            book.enter(tensor, owner)
    training_step = TrainingStep(model, savings, lr=1e-5)
    for state in training_step.optimizer.state.values():
        for name, tensor in state.items():
            book.enter(
                tensor,
                live_bytes.HOST if savings.offload_optimizer and name != "step" else live_bytes.OPTIMIZER,
            )
    if savings.offload_optimizer:  # what offloaded states visit
        for tensor in (tensor for slab in training_step.optimizer.slabs.slabs for tensor in slab.values()):
            book.enter(tensor, live_bytes.OPTIMIZER)
    finish, update_after = training_step.head.finish, training_step.updates.finish

    def head_update():
        book.phase, book.owner = "update of the head", live_bytes.HEAD
        finish()

    def update():
        book.phase, book.owner = "update of the weights", live_bytes.OPTIMIZER
        return update_after()

    begin = training_step.updates.begin

    def begin_with_gradients(num_rows: int):
        begin(num_rows)
        if later_row:
            _leave_gradients(training_step, book)

    training_step.updates.begin = begin_with_gradients
    training_step.head.finish, training_step.updates.finish = head_update, update
    with book:
        for _ in range(steps):
            training_step([batch] * rows, loss_of)
    book.close()
    training_step.close()
    return book


def _leave_gradients(training_step: TrainingStep, book: Ledger) -> None:
    """A gradient of nothing for every trained parameter: the tied head keeps its own until the step ends."""
    for group in training_step.optimizer.param_groups:
        for parameter in group["params"]:
            gradient = torch.zeros_like(parameter)
            if isinstance(training_step.head, TiedHead) and parameter is head_weight(training_step.model):
                training_step.head.dweight = gradient
                book.enter(gradient, live_bytes.HEAD)
            else:
                parameter.grad = gradient
                book.enter(gradient, live_bytes.GRADIENTS)


def plan(
    model: str, *, row_tokens: int, savings: Savings | None = None, qlora_rank: int = 0, rows: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Plan:  # fmt: skip
    """Simulate one training step of rows of row_tokens. model: as load_config takes it. Takes seconds to a minute.

    rows: of the step. The second row's loss and backward pass find the first one's gradients there; a third changes nothing more.
    Raises ValueError for a model without a config at hand and for savings that exclude one another.
    """
    savings = savings or Savings()
    config = load_config(model)
    if qlora_rank:  # seconds of bitsandbytes and peft; and not below, where a tensor made by an import would be fake for good
        from kit.models.nf4 import simulate_quantised_decoder
        from kit.models.qlora import add_adapters
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = AutoModelForCausalLM.from_config(config, attn_implementation=REGISTERED["kit"], dtype=dtype)
        if qlora_rank:
            simulate_quantised_decoder(fake)
            add_adapters(fake, base="", rank=qlora_rank)
        book = measure(fake, savings, fake_batch(row_tokens), steps=steps_to_count(savings, dtype), rows=rows)
    owners = {owner: n for owner, n in book.owners.items() if n}
    costs = config, row_tokens, savings, qlora_rank
    seconds = {"step": step_seconds(*costs), **extra_seconds(*costs)}
    return Plan(
        model, row_tokens, qlora_rank, savings, book.peak, book.when, owners, book.host_peak, seconds, rows
    )


def steps_to_count(savings: Savings, dtype: torch.dtype) -> int:
    """Two where the optimizer makes its states in the first step."""
    return (
        2 if savings.optimizer == "adamw" or (savings.optimizer == "auto" and dtype == torch.float32) else 1
    )


def check_free_memory(planned: Plan) -> None:
    """Raises ValueError if the card has less memory free than the plan needs, with the way to settings that fit."""
    free, total = torch.cuda.mem_get_info()
    if planned.total - CONTEXT > free:  # CUDA is up by now and has taken its own part
        raise ValueError(
            f"the plan needs {planned.total / GIB:.2f} GiB but {free / GIB:.2f} of the card's {total / GIB:.2f} GiB are free; "
            f"its largest owners are {planned.largest_owners()}; pass --gpu_gb {floor(10 * free / GIB) / 10} to have settings "
            "chosen, or close what uses the card"
        )
