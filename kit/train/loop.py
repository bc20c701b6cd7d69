"""Supervised fine-tuning: the plain loop from packed documents to weights.

Each optimizer step trains on a few rows (packs) with one backward pass per row. The loss is the sum of token
losses divided by the number of targets in the whole step, so that it does not matter which documents share a
row. The plan of the steps depends on lengths and seed alone: a run that resumes at step n sees the same rows
as one that was not interrupted. Several ranks (kit/ranks.py) run this loop together, and share the rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kit.command import LetFinish, Stopped
from kit.inputs import digest_of_documents
from kit.machine import describe_machines, return_memory
from kit.models.backbone import head_weight
from kit.packing import Document, fill, pack_rows, plan_packs, plan_steps
from kit.progress import Progress
from kit.ranks import here
from kit.run import MACHINE, RunFolder, write_json
from kit.train import checkpoint
from kit.train.loss import LossOfRow
from kit.train.optimizer import cosine_with_warmup
from kit.train.savings import Savings
from kit.train.step import TrainingStep
from kit.train.weight_updates import NotFinite


class Unwatched:
    """Measure nothing of a card's memory. kit.memory.PeakMemory measures.

    gib, reserved_gib: the peaks so far; None = not measured.
    """

    gib: float | None = None
    reserved_gib: float | None = None

    def look(self, step: int, num_steps: int) -> None:
        """Measure after step 1, 2, ... of num_steps."""

    def leave_out(self) -> None:
        """Leave out of the peaks what was held since the last step."""

    def exhausted(self, step: int, newest: Path | None) -> ValueError:
        """Return the error of a step that ran out of memory. newest: the last checkpoint."""
        last = newest or "none, so the run starts over"
        return ValueError(f"step {step} ran out of memory; the last checkpoint is {last}")


@dataclass(frozen=True)
class TrainingPlan:
    """Every step of a training run: steps[i] is a list of rows, and a row is a list of document indices."""

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
    ) -> TrainingPlan:
        """Plan all steps. Each epoch packs the whole set in a new order.

        lengths: tokens per document. max_steps: the number of steps; 0 = all epochs.
        Raises ValueError for no epoch, and whatever plan_packs and plan_steps raise.
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
            f"{n:,} optimizer steps of {self.traces / n:.1f} traces and {self.tokens / n:,.0f} tokens on "
            f"average; {self.packs:,} packs of up to {self.row_tokens:,} tokens, {self.fill:.1%} full"
        )


def train(
    model,
    tokenizer,
    documents: Sequence[Document],
    plan: TrainingPlan,
    run: RunFolder,
    *,
    lr: float,
    warmup_ratio: float,
    weight_decay: float = 0.0,
    beta2: float = 0.999,
    max_grad_norm: float = 1.0,
    savings: Savings | None = None,
    loss_of: LossOfRow | None = None,
    memory: Unwatched | None = None,
    checkpoint_every: int = 0,
    save_fp32: bool = False,
    after_step: Callable[[int], object] | None = None,
    after_every: int = 1,
    seed: int = 0,
) -> Path:
    """Fine-tune `model` in place, write one line per step to run.metrics, and return the finished model's
    folder.

    max_grad_norm: as in TrainingStep.
    savings: None = Savings().
    loss_of: the loss of a row (kit.train.loss); None = mean token cross-entropy.
    memory: watches the card, such as kit.memory.PeakMemory; None = nothing does.
    checkpoint_every: steps; 0 = no checkpoint before the end.
    save_fp32: write the finished model in fp32, with the bits that bf16 weights lack; off: as it was loaded.
    after_step: is called with the number of steps done, when training begins or goes on and then every
        after_every steps, such as kit.evaluate.during_training; None = nothing is.

    If run.path holds a checkpoint, training continues from it (bit for bit on a CPU), also with another
    number of ranks. If it holds the finished model, that folder is returned at once. Raises ValueError if
    another run has written them, or if ranks have different weights, data or settings.
    Raises ValueError if the loss or the gradient norm is not finite, or if memory runs out. It names the last
    checkpoint, which is intact. Raises Stopped after Ctrl-C, once the step has ended and a checkpoint is
    written.
    """
    savings = savings or Savings()
    savings.check_saving(save_fp32)
    finished, checkpoints = run.path / "model", run.path / "checkpoints"
    settings = (lr, warmup_ratio, weight_decay, beta2, max_grad_norm, seed)
    data = {"documents": digest_of_documents(documents), "plan": plan.steps}
    name = checkpoint.name_of_run(model, **data, settings=settings)
    if checkpoint.is_finished(finished, name):
        return finished
    write_json(run.path / MACHINE, describe_machines())

    training_step = TrainingStep(
        model,
        savings,
        lr=lr,
        weight_decay=weight_decay,
        betas=(0.9, beta2),
        max_grad_norm=max_grad_norm,
        seed=seed,
    )
    optimizer, device, num_steps = training_step.optimizer, head_weight(model).device, len(plan.steps)
    memory = memory or Unwatched()
    done = checkpoint.resume(checkpoints, model, optimizer, run=name, num_steps=num_steps)
    run.metrics.keep(lambda row: row["step"] <= done)
    if done:
        print(f"training    goes on after step {done} of {num_steps}")

    progress = Progress("training", "steps", num_steps, done)
    saved = done

    def save(step: int) -> None:
        nonlocal saved
        if step > saved:
            run.metrics.sync()
            checkpoint.save(checkpoints, model, tokenizer, optimizer, step, name)
            saved = step

    def measure(step: int) -> None:
        """Call after_step, with the step's memory given back. If it fails or is stopped, the step is kept."""
        optimizer.zero_grad(set_to_none=True)
        return_memory(device)
        alone = here().count == 1
        if not alone:  # perhaps one rank will fail, and only all together can save
            save(step)
        try:
            after_step(step)
        except BaseException as error:
            if alone:
                save(step)
            if isinstance(error, KeyboardInterrupt):
                kept = f"step {step} was measured, whose checkpoint is kept"
                raise Stopped(f"while {kept if step else 'the base model was measured'}") from None
            raise
        memory.leave_out()

    with LetFinish("this step, then a checkpoint") as interrupt:
        with progress:
            if after_step:
                measure(done)
                if done < num_steps and interrupt.agreed():
                    raise Stopped(f"before step {done + 1} of {num_steps}")
            for step in range(done, num_steps):
                start = time.perf_counter()
                compiles = device.type == "cuda" and step == done
                if compiles:
                    progress.text = "the first step compiles Triton's kernels"
                factor = cosine_with_warmup(step, num_steps, warmup_ratio)
                for group in optimizer.param_groups:
                    group["lr"] = lr * factor
                try:
                    batches = pack_rows([[documents[i] for i in row] for row in plan.steps[step]], device)
                    loss, norm = (x.item() for x in training_step(batches, loss_of))
                except torch.OutOfMemoryError as error:
                    raise memory.exhausted(step + 1, checkpoint.latest(checkpoints)) from error
                except NotFinite as error:
                    raise checkpoint.diverged(step + 1, lr * factor, error, checkpoints) from error
                seconds = time.perf_counter() - start
                memory.look(step + 1, num_steps)
                tokens = sum(map(len, batches))
                run.metrics.append(
                    {
                        "step": step + 1,
                        "loss": loss,
                        "lr": lr * factor,
                        "grad_norm": norm,
                        "tokens": tokens,
                        "targets": sum(batch.num_targets for batch in batches),
                        "traces": sum(batch.num_documents for batch in batches),
                        "seconds": seconds,
                        "compiles": compiles,
                        "peak_gib": memory.gib,
                        "reserved_gib": memory.reserved_gib,
                    }
                )
                speed = "kernels compiled" if compiles else f"{tokens / seconds:,.0f} tokens/s"
                peak = "" if memory.gib is None else f", {memory.gib:.1f} GiB"
                progress.update(f"loss {loss:.3f}, {speed}{peak}")
                if after_step and (step + 1) % after_every == 0 and not interrupt.agreed():
                    measure(step + 1)
                due = checkpoint_every and (step + 1) % checkpoint_every == 0 and step + 1 < num_steps
                if due or interrupt.agreed():
                    save(step + 1)
                    if interrupt.agreed():  # also if it came while the checkpoint was written
                        raise Stopped(f"at step {step + 1} of {num_steps}, checkpoint {step + 1} kept")

        interrupt.what = "the model's folder"
        rests = checkpoint.rests_of(optimizer) if save_fp32 else None
        training_step.close()
        training_step = optimizer = None
        return_memory(device)  # gradients and optimizer states: evaluation needs the room for its cache
        run.metrics.sync()
        checkpoint.finish(finished, model, tokenizer, checkpoints, num_steps, name, rests)
    return finished
