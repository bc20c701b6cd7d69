"""Where and when a step's numbers are kept and used must not change them: the same bits in every arrangement.

A small Qwen2 in bf16 is trained for a few steps in several ways, and all weights are compared bit by bit:
- layer inputs in CPU memory or on the card, also if copies are late; if a wait is missing, bits must differ
- weights updated inside the backward pass or after it; optimizer states in CPU memory or on the card
- gradients of several rows in CPU memory or on the card, also if copies are late or a wait is missing
- the tied head's gradient whole or in blocks: after one step hardly any number differs
- four steps in one go, or two, a checkpoint, and two more in a new model; in full and through adapters
No row holds a token twice, so that sums by atomics have one summand each.
Left out: real models and long runs, where the same code runs on other sizes.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from kit.data.toy import make_tokenizer
from kit.packing import PackedBatch
from kit.recipes.card.models import NO_BF16, QWEN, build, model_config, packed_row
from kit.recipes.card.results import Card, Results
from kit.train import Savings, TrainingStep, checkpoint
from kit.train.offload import HostGradients, HostInputs, SideStream
from kit.train.recompute import recompute_layers
from kit.train.weight_updates import NotFinite

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 40_960,
}
SMALL_SIZES = {"num_hidden_layers": 3, "vocab_size": 2_048}
RANK = 16
CYCLES = 20_000_000  # of the card's clock that a late copy waits: about 10 ms, longer than a layer takes
PLAIN = Savings(optimizer="adamw8bit")
INPUTS = Savings(optimizer="adamw8bit", offload_inputs=True)
STATES = Savings(optimizer="adamw8bit", offload_optimizer=True)
BOTH = Savings(optimizer="adamw8bit", offload_optimizer=True, offload_inputs=True)
GRADIENTS = Savings(optimizer="adamw8bit", offload_gradients=True)
ALL_IN_CPU_MEMORY = replace(BOTH, offload_gradients=True)
IN_BACKWARD = Savings(update_in_backward=True)
ALL = Savings(update_in_backward=True, offload_optimizer=True, offload_inputs=True)
BLOCKED = Savings(update_in_backward=True, head_update="blocked")
BLOCKED_ON_HOST = replace(GRADIENTS, head_update="blocked")
RESUMED = {"full": (INPUTS, 0), "full, states in CPU memory": (BOTH, 0), "QLoRA": (INPUTS, RANK)}

Rows = list[list[PackedBatch]]  # of each step
Weights = dict[str, torch.Tensor]  # name -> values after training; "loss": of each step


def run(results: Results, card: Card) -> None:
    card.need_rtx_30(NO_BF16)
    lengths = [128] if card.small else [16_384] if card.quick else [2_048, 16_384]
    T = 128 if card.small else 4_096
    cases = [(check_offload, (random_rows(card, length, 3), f"{length:,} tokens")) for length in lengths]
    cases += [(check_updates, (random_rows(card, T, 2), random_rows(card, T, 2, rows=2)))]
    cases += [(check_gradients, (random_rows(card, T, 2, rows=3),))]
    cases += [(check_blocks, (random_rows(card, T, 1), random_rows(card, T, 1, rows=3)))]
    cases += [(check_resume, (random_rows(card, T, 4, rows=2), label)) for label in RESUMED]
    cases += [(check_missing_wait, (random_rows(card, lengths[-1], 1),))]  # last: stray copies may do harm
    for check, arguments in cases:
        name = " ".join([check.__name__, *(text for text in arguments if isinstance(text, str))])
        with results.case(name):
            results.need(seconds=6)
            check(results, card, *arguments)


class Late(SideStream):
    """Late copies, or side=False: late computing. waits=False: nobody waits for the events of copies."""

    cycles = CYCLES

    def __init__(self, *arguments, side: bool, waits: bool = True):
        super().__init__(*arguments)
        self.side, self.waits, self.copies = side, waits, 0

    @contextmanager
    def _beside(self):
        self.copies += 1
        if self.stream is not None:
            with torch.cuda.stream(self.stream if self.side else torch.cuda.current_stream()):
                torch.cuda._sleep(self.cycles)
        with super()._beside():
            yield

    def _event(self) -> torch.cuda.Event | None:
        return super()._event() if self.waits else None


class LateInputs(Late, HostInputs):
    """Inputs whose copies are late."""


class LateGradients(Late, HostGradients):
    """Gradients whose copies are late. A layer has a dozen of them."""

    cycles = CYCLES // 10


def check_offload(results: Results, card: Card, rows: Rows, title: str) -> None:
    kept = train(card, rows, PLAIN)
    if not same(results, f"{title}, inputs on the card, twice", kept, train(card, rows, PLAIN)):
        results.not_run(f"{title}, inputs offloaded", "two runs without offloading differ already")
        return
    same(results, f"{title}, inputs offloaded", kept, train(card, rows, INPUTS))
    for label, host in {"copies": LateInputs(side=True), "computing": LateInputs(side=False)}.items():
        name = f"{title}, inputs offloaded, {label} late"
        same(results, name, kept, train(card, rows, INPUTS, host=host), copies=host.copies)


def check_missing_wait(results: Results, card: Card, rows: Rows) -> None:
    """Show that these checks would notice: without the waits for copies, bits differ."""
    late, plain = {"side": True, "waits": False}, train(card, rows, PLAIN)
    for label, savings, hasty in (
        ("inputs offloaded", INPUTS, {"host": LateInputs(**late)}),
        ("gradients in CPU memory", GRADIENTS, {"late_gradients": late}),
    ):
        try:
            found = differences(plain, train(card, rows, savings, **hasty))
        except NotFinite:  # what was read too early may be anything, NaN included
            found = list(plain)
            card.synchronize()  # copies may still be writing to freed memory
        name = f"{label}, a wait missing on purpose"
        if card.is_cuda:
            results.check(name, bool(found), f"{len(found)} tensors differ; some must")
        else:
            results.not_run(name, "no streams on a CPU")


def check_gradients(results: Results, card: Card, rows: Rows) -> None:
    """Compare steps of three rows, clipped, whose gradients are added up on the card and in CPU memory."""
    plain, title = train(card, rows, PLAIN, norm=1.0), "three rows, clipped: gradients"
    same(results, f"{title} in CPU memory", plain, train(card, rows, GRADIENTS, norm=1.0))
    everything = train(card, rows, ALL_IN_CPU_MEMORY, norm=1.0)
    same(results, f"{title}, states and inputs in CPU memory", plain, everything)
    for label, side in {"copies": True, "computing": False}.items():
        late = train(card, rows, GRADIENTS, norm=1.0, late_gradients={"side": side})
        same(results, f"{title} in CPU memory, {label} late", plain, late)


def check_updates(results: Results, card: Card, one_row: Rows, two_rows: Rows) -> None:
    at_end = train(card, one_row, PLAIN)
    same(results, "update in the backward pass = at its end", at_end, train(card, one_row, IN_BACKWARD))
    same(results, "optimizer states in CPU memory = on the card", at_end, train(card, one_row, STATES))
    same(results, "both, and inputs in CPU memory", at_end, train(card, one_row, ALL))
    clipped = train(card, two_rows, PLAIN, norm=1.0)
    offloaded = train(card, two_rows, BOTH, norm=1.0)
    same(results, "two rows, clipped: states and inputs in CPU memory", clipped, offloaded)


def check_blocks(results: Results, card: Card, one_row: Rows, three_rows: Rows) -> None:
    for title, rows, whole, blocked, norm in (
        ("one step", one_row, IN_BACKWARD, BLOCKED, 0.0),
        ("three rows, clipped, in CPU memory", three_rows, GRADIENTS, BLOCKED_ON_HOST, 1.0),
    ):
        both = (train(card, rows, savings, norm=norm) for savings in (whole, blocked))
        compare_blocks(results, f"head in blocks = whole, {title}", *both)


def compare_blocks(results: Results, name: str, whole: Weights, blocked: Weights) -> None:
    """Compare two heads that round the embedding's gradient, and on a card dhidden, at different places.

    Few numbers may differ. The other tensors are counted together, because in some of them many may: a bias
    of the keys moves all scores of a query by nearly the same amount, so much of its gradient is rounding.
    """
    embedding = next(name for name in whole if "embed_tokens" in name)
    others = [name for name in whole if name not in (embedding, "loss")]
    apart = {name: (whole[name] != blocked[name]).float() for name in (embedding, *others)}
    share, worst = apart[embedding].mean().item(), apart[embedding].mean(1).max().item()
    rest = sum(apart[name].sum().item() for name in others) / sum(apart[name].numel() for name in others)
    loss = abs(blocked["loss"][0] / whole["loss"][0] - 1).item()
    text = f"{share:.2%} of the embedding differ, at most {worst:.0%} of a row; loss by {loss:.0e}"
    text += f"; {rest:.2%} of all other numbers"
    holds = rest < 0.01 and share < 0.02 and worst < 0.5 and loss < 1e-4
    results.check(name, holds, text, share=share)


def check_resume(results: Results, card: Card, rows: Rows, label: str) -> None:
    savings, rank = RESUMED[label]
    settings = {"savings": savings, "rank": rank, "norm": 1.0}
    unbroken = train(card, rows, **settings)
    with TemporaryDirectory() as folder:
        first = train(card, rows[:2], **settings, save_in=Path(folder))
        seed = 3 if rank else 4  # a checkpoint of adapters leaves out the base: it must be the same model
        second = train(card, rows, **settings, seed=seed, resume_from=checkpoint.latest(Path(folder)))
    second["loss"] = torch.cat([first["loss"], second["loss"]])
    same(results, f"4 steps = 2 + checkpoint + 2, {label}", unbroken, second)


def random_rows(card: Card, T: int, steps: int, *, rows: int = 1) -> Rows:
    """Pack rows of T tokens in four documents for each step; no token comes twice in a row."""
    V = (SMALL_SIZES if card.small else SIZES)["vocab_size"]
    lengths = [T // 2 + T // 16, T // 4, T // 8, T // 16]
    drawn = [packed_row(lengths, V, seed, unique=True) for seed in range(steps * rows)]
    return [drawn[step * rows : (step + 1) * rows] for step in range(steps)]


def train(
    card: Card,
    rows: Rows,
    savings: Savings,
    *,
    rank=0,
    norm=0.0,
    seed=3,
    host: HostInputs | None = None,
    late_gradients: dict[str, bool] | None = None,
    save_in: Path | None = None,
    resume_from: Path | None = None,
) -> Weights:
    """Train a new small model.

    host: offloads its inputs. late_gradients: what LateGradients takes. save_in, resume_from: of checkpoints.
    """
    config = model_config(QWEN, small=card.small, **(SMALL_SIZES if card.small else SIZES))
    model = build(card, config, rank=rank, seed=seed)
    step = TrainingStep(model, savings, lr=1e-3, max_grad_norm=norm)
    if host is not None:
        recompute_layers(model, offload=host, tile_tokens=savings.tile_tokens)
    if late_gradients is not None:
        step.updates.gradients = LateGradients(model, **late_gradients)
    done = checkpoint.load(resume_from, model, step.optimizer) if resume_from else 0
    losses = torch.stack([step(batches)[0] for batches in rows[done:]])
    card.synchronize()
    if save_in:
        checkpoint.save(save_in, model, make_tokenizer(), step.optimizer, len(rows))
    step.close()
    floats = {name: p.detach() for name, p in model.named_parameters() if p.is_floating_point()}
    return floats | {"loss": losses}


def same(results: Results, name: str, a: Weights, b: Weights, *, copies: int = 1) -> bool:
    """Judge two trainings: equal bits, finite losses, and copies made if they were to be late."""
    found = differences(a, b)
    problems = [f"{len(found)} tensors differ, such as {found[0]}"] if found else []
    problems += [] if a["loss"].isfinite().all() else ["a loss is not finite"]
    problems += [] if copies else ["nothing was copied"]
    results.check(name, not problems, "; ".join(problems) or "every bit is the same")
    return not found


def differences(a: Weights, b: Weights) -> list[str]:
    """List the names of tensors that differ by a bit."""
    return [name for name in a if not torch.equal(*(x[name].contiguous().view(torch.uint8) for x in (a, b)))]
