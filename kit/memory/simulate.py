"""The memory plan: what a training step holds at its worst moment, and who holds it.

plan() runs the real training step (kit.train.step) on fake tensors, which have shapes but no data, and counts
every live byte (kit.memory.live_bytes). It needs no GPU, no weights, and no download for the models whose
configs ship with the kit. The result is simulated; after ten steps on a card the measured peak is printed
beside it. kit.memory.run_plan finds settings that fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kit.config import as_flags
from kit.extras import require_for_adapters
from kit.machine import CONTEXT, GIB
from kit.memory import live_bytes
from kit.memory.live_bytes import Ledger
from kit.models.attention import REGISTERED
from kit.models.loading import load_config
from kit.models.other_families import check_parts
from kit.packing import PackedBatch
from kit.ranks import Alone
from kit.train.loss import LossOfRow
from kit.train.savings import Savings
from kit.train.step import TrainingStep

# what the allocator loses, an assumption: a share of the peak, to gaps between blocks; but no less than may
# lie beyond the last block on each of three streams, where it grows by 20 MiB
SLACK, LEAST_SLACK = 0.06, 64 * 2**20
CARDS = (6, 8, 12, 16, 24)  # GiB


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
    what: str = ""  # sampling, in words; "" = a training step
    lora_rank: int = 0

    @classmethod
    def of_step(cls, ledger: Ledger, **sizes) -> Plan:
        """Return the plan of a step from its ledger. sizes: the model and what else it was simulated with."""
        owners = {owner: n for owner, n in ledger.owners.items() if n}
        return cls(peak=ledger.peak, when=ledger.when, owners=owners, host=ledger.host_peak, **sizes)

    @property
    def total(self) -> int:
        """Bytes a card needs: tensors, slack and CUDA's own memory."""
        return self.peak + self.slack + CONTEXT

    @property
    def slack(self) -> int:
        """Bytes that the allocator loses."""
        return max(round(self.peak * SLACK), LEAST_SLACK)

    def fits(self, gib: float) -> bool:
        """Return whether a card fits this. gib: GiB of it that nothing else uses."""
        return self.total <= gib * GIB

    @property
    def title(self) -> str:
        what = f"QLoRA of rank {self.qlora_rank}" if self.qlora_rank else "full fine-tuning"
        what = f"LoRA of rank {self.lora_rank} in 16 bits" if self.lora_rank else what
        rows = "one row per step" if self.rows == 1 else "several rows per step"
        return f"{self.model}, {self.what or f'{what}, {self.row_tokens:,} tokens per row, {rows}'}"

    def __str__(self) -> str:
        lines = [
            f"{self.title}: {self.total / GIB:.2f} GiB (simulated)",
            f"  switched on: {as_flags(self.savings.switched_on) or 'nothing but the defaults'}",
            f"  peak of tensors {self.peak / GIB:.2f} GiB in: {self.when}; assumed on top: "
            f"{self.slack / GIB:.2f} GiB of slack, {CONTEXT / GIB:.2f} GiB for CUDA; in CPU memory "
            f"{self.host / GIB:.2f} GiB",
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

    def as_json(self, desktop_gb: float = 0.0) -> dict:
        """Return the plan for a file. desktop_gb: GiB of each usual card that a desktop uses."""
        fits_gb = [gb for gb in CARDS if self.fits(gb - desktop_gb)]
        return asdict(self) | {"total": self.total, "simulated": True, "fits_gb": fits_gb}


def fake_batch(row_tokens: int) -> PackedBatch:
    """Return a row that is one document with a target at every token: the most a row can cost."""
    ids = torch.zeros(row_tokens, dtype=torch.int32)
    cu_seqlens = torch.zeros(2, dtype=torch.int32)
    return PackedBatch(ids, ids.long(), ids.clone(), cu_seqlens, row_tokens, row_tokens)


def fake_model(
    config: PreTrainedConfig, qlora_rank: int, lora_rank: int = 0
) -> tuple[PreTrainedModel, FakeTensorMode]:
    """Return (the bf16 model that training would load, on fake tensors; their mode)."""
    if qlora_rank or lora_rank:  # imported outside of the mode, in which their tensors would be fake for good
        require_for_adapters(nf4=bool(qlora_rank))
        from kit.models.qlora import add_adapters
    if qlora_rank:
        from kit.models.nf4 import simulate_quantised_decoder

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        attention = REGISTERED["kit"]
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=torch.bfloat16, trust_remote_code=False
        )
        check_parts(model)
        if qlora_rank:
            simulate_quantised_decoder(model)
        if qlora_rank or lora_rank:
            add_adapters(model, base="", rank=qlora_rank or lora_rank, nf4=bool(qlora_rank))
    return model, mode


def measure(
    model: PreTrainedModel,
    savings: Savings,
    batch: PackedBatch,
    *,
    rows: int = 1,
    loss_of: LossOfRow | None = None,
    reference: Sequence[Tensor] = (),
) -> Ledger:
    """Run a training step on real or fake tensors and return its ledger.

    rows: how often the step takes the batch. loss_of: as TrainingStep's. reference: tensors beside the step.
    """
    ledger = Ledger(model)
    for tensor in reference:
        ledger.enter(tensor, live_bytes.REFERENCE)

    with ledger:
        ledger.owner = live_bytes.OPTIMIZER
        step = TrainingStep(model, savings, lr=1e-5, ranks=Alone())
        if savings.offload_gradients:
            ledger.enter(step.updates.gradients.slab, live_bytes.GRADIENTS)
        _follow_updates(step, ledger)
        step([batch] * rows, loss_of)
    ledger.close()
    step.close()
    return ledger


def _follow_updates(step: TrainingStep, ledger: Ledger) -> None:
    """Let a step tell the ledger when it updates weights."""

    def follow(holder: object, method: str, phase: str, owner: str) -> None:
        call = getattr(holder, method)

        def followed(*arguments):
            ledger.phase, ledger.owner = phase, owner
            return call(*arguments)

        setattr(holder, method, followed)

    follow(step.updates, "use_parts", "blocks of the head", live_bytes.HEAD)
    follow(step.head, "finish", "update of the head", live_bytes.HEAD)
    follow(step.updates, "finish", "update of the weights", live_bytes.OPTIMIZER)


def plan(
    model: str,
    *,
    row_tokens: int,
    savings: Savings | None = None,
    qlora_rank: int = 0,
    lora_rank: int = 0,
    rows: int = 1,
) -> Plan:
    """Simulate one training step of bf16 weights with rows of row_tokens; takes seconds.

    model: as load_config takes it. rows: rows of the step. The second row's loss and backward pass find the
    first one's gradients; a third row changes nothing more.
    Raises ValueError for a model without a config at hand and for savings that exclude one another.
    """
    savings = savings or Savings()
    ranks = {"qlora_rank": qlora_rank, "lora_rank": lora_rank}
    fake, mode = fake_model(load_config(model), **ranks)
    with mode:
        ledger = measure(fake, savings, fake_batch(row_tokens), rows=rows)
    return Plan.of_step(ledger, model=model, row_tokens=row_tokens, savings=savings, rows=rows, **ranks)
