"""Supervised fine-tuning: the plain loop from packed documents to weights.

Each optimizer step takes a few rows (packs), one backward pass a row. The loss is the sum of token losses divided by the
number of targets in the whole step, so how documents happen to share rows does not weight them. The step's plan depends on
lengths and seed alone: a run that resumes at step n sees exactly what it would have seen.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from kit.machine import return_memory
from kit.models import folder
from kit.models.backbone import head_weight
from kit.packing import Document, fill, pack_rows, plan_packs, plan_steps
from kit.run import RunFolder
from kit.train import checkpoint
from kit.train.loss import LossOfRow
from kit.train.optimizer import cosine_with_warmup
from kit.train.savings import Savings
from kit.train.step import TrainingStep


class Memory(Protocol):
    """Watches a card's memory while a run trains. gib, reserved_gib: the most so far; None = not measured."""

    gib: float | None
    reserved_gib: float | None

    def look(self, step: int, num_steps: int) -> None: ...

    def exhausted(self, step: int, newest: Path | None) -> ValueError: ...


class Unwatched:
    """Nobody watches the memory."""

    gib = reserved_gib = None

    def look(self, step: int, num_steps: int) -> None:
        """No-op: nothing is measured."""

    def exhausted(self, step: int, newest: Path | None) -> ValueError:
        """Return what to say of a step that ran out of memory. newest: the last checkpoint."""
        return ValueError(
            f"step {step} ran out of memory; the last checkpoint is {newest or 'none, so the run starts over'}"
        )


@dataclass(frozen=True)
class TrainingPlan:
    """Every step of a training run: steps[i] is a list of rows, a row a list of document indices."""

    steps: list[list[list[int]]]
    row_tokens: int
    packs: int  # rows over all epochs
    fill: float  # share of the rows' capacity that holds a token
    tokens: int  # over all epochs
    traces: int  # over all epochs

    @classmethod
    def make(
        cls,
        lengths: Sequence[int],
        *,
        row_tokens: int,
        batch_traces: int,
        epochs: int,
        max_steps: int = 0,
        seed: int = 0,
    ):
        """Plan all steps. lengths: tokens per document. Each epoch packs the whole set again. max_steps: stop
        there; 0 = all epochs.

        Raises ValueError for no epoch, and for what plan_packs and plan_steps refuse.
        """
        if epochs < 1:
            raise ValueError(f"epochs is {epochs} but training needs at least one; pass --epochs 1")
        steps: list[list[list[int]]] = []
        for epoch in range(epochs):
            packs = plan_packs(lengths, row_tokens, seed=seed + epoch)
            steps += [[packs[row] for row in rows] for rows in plan_steps(packs, batch_traces)]
        steps = steps[: max_steps or None]
        packs = [pack for step in steps for pack in step]
        return cls(
            steps=steps,
            row_tokens=row_tokens,
            packs=len(packs),
            fill=fill(packs, lengths, row_tokens),
            tokens=sum(lengths[i] for pack in packs for i in pack),
            traces=sum(map(len, packs)),
        )

    def __str__(self) -> str:
        n = len(self.steps)
        return (
            f"{n:,} optimizer steps of {self.traces / n:.1f} traces and {self.tokens / n:,.0f} tokens on average; "
            f"{self.packs:,} packs of up to {self.row_tokens:,} tokens, {self.fill:.1%} full"
        )


def train(
    model, tokenizer, documents: Sequence[Document], plan: TrainingPlan, run: RunFolder, *,
    lr: float, warmup_ratio: float, weight_decay: float = 0.0, beta2: float = 0.999, max_grad_norm: float = 1.0,
    max_tensor_norm: float = 0.0, savings: Savings | None = None,
    loss_of: LossOfRow | None = None, memory: Memory | None = None, checkpoint_every: int = 0, seed: int = 0,
) -> Path:  # fmt: skip
    """Fine-tune `model` in place, append one row per step to run.metrics, and return the folder of the finished model.

    loss_of: the loss of a row (kit.train.loss); None = mean token cross-entropy. savings: None = Savings(). max_grad_norm,
    max_tensor_norm: as TrainingStep's. memory: watches the card, such as kit.memory.PeakMemory; None = nobody does.

    checkpoint_every: steps; 0 = none before the end. If run.path holds a checkpoint, training continues from it (bit for bit on a
    CPU); if it holds the finished model, nothing is done and that folder is returned.
    Raises ValueError if the loss is not finite; the last checkpoint is intact and named.
    """
    finished = run.path / "model"
    if finished.is_dir():
        return finished
    training_step = TrainingStep(
        model, savings or Savings(), lr=lr, weight_decay=weight_decay, betas=(0.9, beta2), max_grad_norm=max_grad_norm,
        max_tensor_norm=max_tensor_norm, seed=seed,
    )  # fmt: skip
    optimizer = training_step.optimizer
    checkpoints = run.path / "checkpoints"
    newest = checkpoint.latest(checkpoints)
    done = checkpoint.load(newest, model, optimizer) if newest else 0
    run.metrics.keep(lambda row: row["step"] <= done)
    device = head_weight(model).device
    memory = memory or Unwatched()
    bar = tqdm(total=len(plan.steps), initial=done, desc="training", unit=" steps", disable=None)
    for step in range(done, len(plan.steps)):
        start = time.perf_counter()
        factor = cosine_with_warmup(step, len(plan.steps), warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        try:
            batches = pack_rows([[documents[i] for i in row] for row in plan.steps[step]], device)
            loss, norm = (x.item() for x in training_step(batches, loss_of))
        except torch.OutOfMemoryError as error:
            raise memory.exhausted(step + 1, checkpoint.latest(checkpoints)) from error
        seconds, compiles = (
            time.perf_counter() - start,
            device.type == "cuda" and step == done,
        )  # Triton's kernels, in step 1
        if not math.isfinite(loss) or not math.isfinite(norm):
            newest = checkpoint.latest(checkpoints)
            raise ValueError(
                f"step {step + 1}: loss is {loss} and gradient norm {norm} at lr {lr * factor:.2e}; lower --lr. "
                f"The last checkpoint is {newest or 'none: pass --checkpoint_every'}"
            )
        tokens = sum(map(len, batches))
        memory.look(step + 1, len(plan.steps))
        run.metrics.append(
            {"step": step + 1, "loss": loss, "lr": lr * factor, "grad_norm": norm, "tokens": tokens,
             "targets": sum(batch.num_targets for batch in batches), "traces": sum(batch.num_documents for batch in batches),
             "seconds": seconds, "compiles": compiles, "peak_gib": memory.gib, "reserved_gib": memory.reserved_gib}
        )  # fmt: skip
        held = {} if memory.gib is None else {"GiB": f"{memory.gib:.1f}"}
        speed = "kernels compiled" if compiles else f"{tokens / seconds:,.0f}"
        bar.set_postfix({"loss": f"{loss:.3f}", "tok/s": speed, **held}, refresh=False)
        bar.update()
        if checkpoint_every and (step + 1) % checkpoint_every == 0 and step + 1 < len(plan.steps):
            checkpoint.save(checkpoints, model, tokenizer, optimizer, step + 1)
    bar.close()
    training_step.close()
    training_step = optimizer = None
    return_memory(device)  # gradients and optimizer states: evaluation needs the room for its cache
    folder.save_model(finished, model, tokenizer)
    shutil.rmtree(checkpoints, ignore_errors=True)  # larger than the model, and of no use beside it
    return finished
