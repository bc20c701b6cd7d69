"""The memory plan: what a training step holds at its worst moment, and who holds it.

plan() runs the real training step (kit.train.step) on fake tensors, which have shapes but no data, and counts
every live byte (kit.memory.live_bytes). It needs no GPU, no weights, and no download for the models whose
configs ship with the kit. The result is simulated; after ten steps on a card the measured peak is printed
beside it. kit.memory.choose finds settings that fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kit.config import as_flags
from kit.extras import require
from kit.machine import CONTEXT, GIB
from kit.memory import live_bytes
from kit.memory.live_bytes import Ledger
from kit.models.attention import REGISTERED
from kit.models.loading import load_config
from kit.packing import PackedBatch
from kit.train.loss import LossOfRow
from kit.train.savings import Savings
from kit.train.step import TrainingStep

SLACK = 0.06  # share of the peak that the allocator loses to gaps between blocks; an assumption
CARDS = (6, 8, 12, 16, 24)  # GiB


def card_bytes(peak: int) -> int:
    """Return the bytes a card needs for a peak of tensors, with slack and CUDA's own memory."""
    return round(peak * (1 + SLACK)) + CONTEXT


@dataclass(frozen=True)
class Plan:
    """What one training step holds."""

    model: str
    row_tokens: int
    qlora_rank: int
    savings: Savings
    peak: int  # bytes of tensors at the worst moment
    when: str  # the worst moment
    owners: dict[str, int]  # owner -> bytes at that moment
    host: int  # bytes of CPU memory
    rows: int = 1  # that the simulated step took; 2 stands for more
    desktop_gb: float = 0.0  # GiB of the card that a desktop uses
    what: str = ""  # sampling or scoring, in words; "" = a training step

    @property
    def total(self) -> int:
        """Bytes a card needs: tensors, slack and CUDA's own memory."""
        return card_bytes(self.peak)

    @property
    def fits_gb(self) -> list[int]:
        """Sizes of the usual cards that this fits."""
        return [gb for gb in CARDS if self.fits(gb)]

    @property
    def fits_text(self) -> str:
        desktop = f"; {self.desktop_gb:g} GB of each is left to a desktop" if self.desktop_gb else ""
        return "fits " + ", ".join(f"{gb} GB: {'yes' if self.fits(gb) else 'no'}" for gb in CARDS) + desktop

    def fits(self, gpu_gb: float) -> bool:
        return self.total + self.desktop_gb * GIB <= gpu_gb * GIB

    def __str__(self) -> str:
        return f"{self.details}\n  {self.fits_text}"

    @property
    def details(self) -> str:
        """The plan in words, without the cards that it fits."""
        what = f"QLoRA of rank {self.qlora_rank}" if self.qlora_rank else "full fine-tuning"
        rows = "one row per step" if self.rows == 1 else "several rows per step"
        step = self.what or f"{what}, {self.row_tokens:,} tokens per row, {rows}"
        lines = [
            f"{self.model}, {step}: {self.total / GIB:.2f} GiB (simulated)",
            f"  switched on: {as_flags(self.savings.switched_on) or 'nothing but the defaults'}",
            f"  peak of tensors {self.peak / GIB:.2f} GiB in: {self.when}; assumed on top: {SLACK:.0%} "
            f"slack, {CONTEXT / GIB:.2f} GiB for CUDA; in CPU memory {self.host / GIB:.2f} GiB",
            *(f"    {owner:<18}{num_bytes / GIB:7.2f} GiB" for owner, num_bytes in self.largest()),
        ]
        return "\n".join(lines[:1] + lines[2:] if self.what else lines)

    def largest(self) -> list[tuple[str, int]]:
        """List (owner, bytes) on the card, the largest first."""
        on_card = [(owner, n) for owner, n in self.owners.items() if n and owner != live_bytes.HOST]
        return sorted(on_card, key=lambda pair: -pair[1])

    def largest_owners(self) -> str:
        """Name the three largest owners, for an error message."""
        return ", ".join(f"{owner} {n / GIB:.2f} GiB" for owner, n in self.largest()[:3])

    def as_json(self) -> dict:
        return asdict(self) | {"total": self.total, "simulated": True, "fits_gb": self.fits_gb}


def fake_batch(row_tokens: int) -> PackedBatch:
    """Return a row that is one document with a target at every token: the most a row can cost."""
    ids = torch.zeros(row_tokens, dtype=torch.int64)
    cu_seqlens = torch.zeros(2, dtype=torch.int32)
    return PackedBatch(ids, ids.clone(), ids.clone(), cu_seqlens, row_tokens, row_tokens)


def fake_model(config: PreTrainedConfig, qlora_rank: int) -> tuple[PreTrainedModel, FakeTensorMode]:
    """Return (the bf16 model that training would load, on fake tensors; their mode)."""
    if qlora_rank:  # outside of the mode, in which any tensor that an import creates would be fake for good
        require("qlora_rank", "bitsandbytes", "peft")
        from kit.models.nf4 import simulate_quantised_decoder
        from kit.models.qlora import add_adapters

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        attention = REGISTERED["kit"]
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=torch.bfloat16, trust_remote_code=False
        )
        if qlora_rank:
            simulate_quantised_decoder(model)
            add_adapters(model, base="", rank=qlora_rank)
    return model, mode


def measure(
    model: PreTrainedModel,
    savings: Savings,
    batch: PackedBatch,
    *,
    steps: int = 1,
    rows: int = 1,
    loss_of: LossOfRow | None = None,
    resident: Mapping[str, Sequence[Tensor]] = MappingProxyType({}),
) -> Ledger:
    """Run training steps on real or fake tensors and return their ledger.

    steps: 2 counts an optimizer that creates its states in the first step. rows: how often each step takes
    the batch. loss_of: as TrainingStep's. resident: owner -> tensors that exist beside the step.
    """
    ledger = Ledger(model)
    for owner, tensors in resident.items():
        for tensor in tensors:
            ledger.enter(tensor, owner)

    step = TrainingStep(model, savings, lr=1e-5)
    for state in step.optimizer.state.values():
        for name, tensor in state.items():
            is_on_host = savings.offload_optimizer and name != "step"
            ledger.enter(tensor, live_bytes.HOST if is_on_host else live_bytes.OPTIMIZER)
    if savings.offload_optimizer:  # slabs on the card, through which the states pass
        for slab in step.optimizer.slabs.slabs:
            for tensor in slab.values():
                ledger.enter(tensor, live_bytes.OPTIMIZER)

    if savings.offload_gradients:
        ledger.enter(step.updates.gradients.memory, live_bytes.HOST)
        ledger.enter(step.updates.gradients.slab, live_bytes.GRADIENTS)

    _follow_updates(step, ledger)
    with ledger:
        for _ in range(steps):
            step([batch] * rows, loss_of)
    ledger.close()
    step.close()
    return ledger


def _follow_updates(step: TrainingStep, ledger: Ledger) -> None:
    """Let a step tell the ledger when it updates weights."""
    finish, finish_head = step.updates.finish, step.head.finish

    def update_head():
        ledger.phase, ledger.owner = "update of the head", live_bytes.HEAD
        finish_head()

    def update(loss):
        ledger.phase, ledger.owner = "update of the weights", live_bytes.OPTIMIZER
        return finish(loss)

    step.updates.finish, step.head.finish = update, update_head


def plan(
    model: str,
    *,
    row_tokens: int,
    savings: Savings | None = None,
    qlora_rank: int = 0,
    rows: int = 1,
    desktop_gb: float = 0.0,
) -> Plan:
    """Simulate one training step of bf16 weights with rows of row_tokens; takes seconds.

    model: as load_config takes it. rows: rows of the step. The second row's loss and backward pass find the
    first one's gradients; a third row changes nothing more. desktop_gb: GiB of a card that are not ours.
    Raises ValueError for a model without a config at hand and for savings that exclude one another.
    """
    savings = savings or Savings()
    fake, mode = fake_model(load_config(model), qlora_rank)
    with mode:
        ledger = measure(fake, savings, fake_batch(row_tokens), rows=rows)

    return Plan(
        model=model,
        row_tokens=row_tokens,
        qlora_rank=qlora_rank,
        savings=savings,
        peak=ledger.peak,
        when=ledger.when,
        owners={owner: n for owner, n in ledger.owners.items() if n},
        host=ledger.host_peak,
        rows=rows,
        desktop_gb=desktop_gb,
    )
