"""Measure a model while it is trained: a fixed part of the benchmarks, and the loss on held-out traces.

    train(..., after_step=DuringTraining(model, chat, benchmarks, params, run.path, every=250))

Nothing here changes the training: no gradient is computed, and samples draw from streams of their own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from kit.config import some_of
from kit.data.chat import ChatFormat
from kit.evaluate.benchmarks import Benchmark
from kit.evaluate.measure import evaluate
from kit.evaluate.results import Result
from kit.generate.sampling import SamplingParams
from kit.journal import MEASUREMENT, Journal
from kit.kernels.linear_cross_entropy import linear_cross_entropy
from kit.models.backbone import head_weight, hidden_states, softcap
from kit.packing import Document, PackedBatch, plan_packs
from kit.ranks import here
from kit.run import DURING, RunFolder
from kit.watch import Tracker

HELD_OUT = 64  # traces


@dataclass
class DuringTraining:
    """Call it with the number of steps done. It measures at 0 and at every `every` steps, and logs a row.

    benchmarks: with the questions to ask, one sample each. held_out: traces that are not trained on.
    row_tokens, logit_rows: as in training. write_report: kit.report.write_report, or None.
    """

    model: torch.nn.Module
    chat: ChatFormat
    benchmarks: Sequence[Benchmark]
    params: SamplingParams
    run: Path
    every: int
    held_out: Sequence[Document] = ()
    row_tokens: int = 16_384
    logit_rows: int = 0
    num_slots: int = 0
    cuda_graphs: bool = True
    seed: int = 0
    write_report: Callable[..., object] | None = None
    tracker: Tracker = field(default_factory=Tracker)
    has_begun: bool = False

    def __call__(self, step: int) -> None:
        journal = Journal(self.run / f"{DURING}.jsonl", MEASUREMENT)
        folder = self.run / DURING / f"step_{step:06d}"

        def is_due() -> bool:
            if not self.has_begun:  # what a run that was killed had measured after its last checkpoint
                journal.keep(lambda row: row["step"] <= step)
            self.has_begun = True
            due = not step % self.every and all(row["step"] != step for row in journal.read())
            if due:
                shutil.rmtree(folder, ignore_errors=True)
            return due

        if not here().from_first(is_due):
            return
        how = {"num_samples": 1, **some_of(self, "num_slots", "cuda_graphs", "seed")}
        measured = {
            benchmark.name: figures(evaluate(self.model, self.chat, benchmark, self.params, folder, **how))
            for benchmark in self.benchmarks
        }
        loss = None
        if self.held_out:
            loss = mean_loss(self.model, self.held_out, self.row_tokens, logit_rows=self.logit_rows)
        journal.append({"step": step, "held_out_loss": loss, "benchmarks": measured})
        self.tracker.log(step, {"held_out_loss": loss} | measured)
        if self.write_report and here().is_first:
            self.write_report(self.run, goes_on=True)


def num_held_out(config) -> int:
    """Return how many traces a run needs beside those that it is trained on: none if it takes all.

    None either if the traces come in the file's order and the short ones from another file: which problems
    have a partner there depends on how far the file is read, and a measurement changes nothing in training.
    """
    in_order = config.short_traces and not config.shuffle
    return HELD_OUT if config.eval_every and config.num_traces and not in_order else 0


def of_run(config, model, chat, benchmarks, run: RunFolder, held_out) -> DuringTraining | None:
    """Return what measures a run of recipes/gemma3_1b_8k.py, and print what it will do; None if it is off.

    It asks the first config.eval_questions of every benchmark, the same ones each time. run: its `metrics`
    must be what kit.watch.watch returned, whose tracker and report get the measurements, too.
    """
    if not config.eval_every:
        return None
    part = [replace(b, questions=b.questions[: config.eval_questions]) for b in benchmarks]
    asked = ", ".join(f"{b.name} {len(b.questions)} x 1" for b in part)
    beside = f"the loss on {len(held_out)} held-out traces" if held_out else "no held-out traces"
    print(f"during      every {config.eval_every:,} steps: {asked}; {beside}")
    shared = some_of(config, "row_tokens", "logit_rows", "num_slots", "cuda_graphs", "seed")
    shared |= {"write_report": run.metrics.write_report, "tracker": run.metrics.tracker}
    return DuringTraining(model, chat, part, config.params, run.path, config.eval_every, held_out, **shared)


def figures(result: Result) -> dict[str, float]:
    """Return what is drawn of a measurement; shares are in 0..1."""
    names = ("accuracy", "interval", "paper_accuracy", "mean_tokens", "truncated", "reflection")
    return {name: getattr(result, name) for name in names}


@torch.no_grad()
def mean_loss(model, documents: Sequence[Document], row_tokens: int, *, logit_rows: int = 0) -> float:
    """Return the mean cross-entropy of the documents' target tokens, in nats.

    logit_rows: as in kit.train.savings. The model is left in the mode that it was in. Of several ranks, each
    computes its share of the rows, and the sum is added up in their order: it is that of one process.
    """
    training, weight = model.training, head_weight(model)
    model.eval()
    losses = []  # of each row: (its number, the sum over its targets, how many they are)
    packs = plan_packs([len(document) for document in documents], row_tokens)
    for number, pack in here().share(list(enumerate(packs))):
        batch = PackedBatch.build([documents[i] for i in pack]).to(weight.device)
        options = {"reduction": "sum", "softcap": softcap(model), "max_rows": logit_rows}
        loss = linear_cross_entropy(hidden_states(model, batch), weight, batch.targets, **options)
        losses.append((number, loss.item(), batch.num_targets))
    model.train(training)
    losses = sorted(row for found in here().gather(losses) for row in found)
    return sum(loss for _, loss, _ in losses) / sum(num_targets for _, _, num_targets in losses)
