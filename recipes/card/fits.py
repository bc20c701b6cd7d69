"""Does training fit where the memory plan says so? The allocator gets what a card of the planned size leaves.

For each model, full fine-tuning and QLoRA, and for the first one steps of two rows with gradients, optimizer
states and layer inputs in CPU memory, the head whole or in blocks: kit.memory.simulate plans the step. Then
three rows of 16,384 tokens are trained, first one document, then several, with torch's allocator capped at
the plan's total less what the plan leaves to CUDA. --cap_gb adds the same under the cap of a card of that
size. A case passes if nothing runs out of memory, if the tensors' peak is within 3 % of the plan's, and if
the reserved memory stays below the cap.
Left out: the memory that CUDA uses outside torch's allocator (an assumption of the plan), other programs on
the card, and settings as --gpu_gb chooses them.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import torch

from kit.machine import CONTEXT, GIB
from kit.memory import Plan
from kit.memory.phases import QLORA_RANK
from kit.recipes.card.memory import beside_plan, held_gib, measured, memory_cap, timed, warm_up
from kit.recipes.card.models import NO_BF16, Training, build
from kit.recipes.card.plans import plan_of, planned
from kit.recipes.card.results import PASS, Card, Results, Skip
from kit.train import Savings, TrainingStep

LEAN = Savings(tile_tokens=2_048, optimizer="adamw8bit", offload_inputs=True, logit_rows=256)
ROWS = ([16_384], [12_001, 2_983, 1_400], [7_000, 5_211, 2_100, 903, 700, 470])  # documents of each step
CLOSE = 0.03  # share of the planned peak by which the measured one may differ


def run(results: Results, card: Card) -> None:
    card.need_rtx_30(NO_BF16)
    check_cap(results, card)
    with planned(chosen_cases(card)) as plans:
        for case, job in plans.items():
            with results.case(title_of(case)):
                run_case(results, card, case, job)
    add_headlines(results)


def chosen_cases(card: Card) -> list[Training]:
    """List the first model in full and the last through adapters, then the others."""
    first, last = card.models[0], card.models[-1]
    chosen = [(first, 0), (last, QLORA_RANK)]
    if not card.quick:
        chosen += [(name, rank) for rank in (0, QLORA_RANK) for name in card.models]
    lean = replace(LEAN, tile_tokens=64, logit_rows=32) if card.small else LEAN
    savings = {0: replace(lean, update_in_backward=True), QLORA_RANK: lean}
    cases = [Training(name, savings[rank], rank, card.small) for name, rank in dict.fromkeys(chosen)]
    on_host = replace(lean, offload_optimizer=True, offload_gradients=True)
    leanest = replace(on_host, head_update="blocked")
    several = [Training(first, savings, 0, card.small, rows=2) for savings in (on_host, leanest)]
    return cases + several * (not card.quick)


def title_of(case: Training) -> str:
    title = f"{case.short} {'QLoRA' if case.rank else 'full fine-tuning'}"
    if case.rows == 1:
        return title
    blocked = ", head in blocks" * (case.savings.head_update == "blocked")
    return f"{title}, {case.rows} rows per step, gradients in CPU memory{blocked}"


def check_cap(results: Results, card: Card) -> None:
    """Show that the allocator refuses what lies beyond the cap: every other claim here rests on it."""
    name = "the cap on memory holds"
    with results.case(name):
        if not card.is_cuda:
            raise Skip("no card")
        refused = False
        with memory_cap(card, held_gib(card) + 1):
            try:
                torch.empty(2 * GIB, dtype=torch.uint8, device=card.device)
            except torch.OutOfMemoryError:
                refused = True
            torch.empty(GIB // 2, dtype=torch.uint8, device=card.device)  # there is room below the cap
        setting = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
        results.check(name, refused, f"2 GiB under a cap of 1; PYTORCH_ALLOC_CONF is {setting or 'not set'}")


def run_case(results: Results, card: Card, case: Training, job: Future) -> None:
    """Train under the cap of the plan's total, and under that of the card that --cap_gb asks for."""
    title, seconds = title_of(case), case.rows * case.guessed_seconds(card, case.row(ROWS[0], 0))
    results.need(seconds=seconds)
    found = plan_of(results, job, seconds)
    fit(results, card, case, found, title, found.total / GIB)
    if card.cap_gb:
        larger = f"{title} in {card.cap_gb:g} GB"
        with results.case(larger):
            results.need(seconds=seconds)
            fit(results, card, case, found, larger, card.cap_gb)


def fit(results: Results, card: Card, case: Training, found: Plan, title: str, card_gib: float) -> None:
    """Train three steps with what a card of card_gib GiB leaves to the allocator."""
    rows = [case.row(lengths, seed) for seed, lengths in enumerate(ROWS)]
    held = warm_up(card)
    model = build(card, case.config, rank=case.rank)
    cap, peak = card_gib - CONTEXT / GIB, found.peak / GIB
    losses, seconds, problems = [], 0.0, []

    def train() -> None:
        nonlocal seconds
        try:
            norm = 0.0 if case.savings.update_in_backward else 1.0
            step = TrainingStep(model, case.savings, lr=1e-5, max_grad_norm=norm)
            for row in rows:
                batches = [row] * case.rows
                (loss, _), seconds = timed(card, partial(step, batches))  # of the last: the others compile
                losses.append(loss.item())
            step.close()
        except torch.OutOfMemoryError as error:
            problems.append(f"OUT OF MEMORY after {len(losses)} steps: {' '.join(str(error).split())[:90]}")

    usage = measured(card, train, held=held, cap=cap)
    if card.is_cuda and not problems and abs(usage.allocated / peak - 1) > CLOSE:
        problems.append(f"allocated is off by {usage.allocated / peak - 1:+.1%}, more than {CLOSE:.0%}")
    if usage.reserved > cap + 0.01:
        problems.append("reserved exceeds the cap")
    if not all(map(math.isfinite, losses)):
        problems.append("a loss is not finite")
    numbers, speed = case.speed(card, rows[-1], seconds / case.rows) if losses else ({}, "no step")
    numbers |= {"planned_gib": peak, "allocated_gib": usage.allocated, "reserved_gib": usage.reserved}
    numbers |= {"cap_gib": cap, "held_before_gib": held}
    text = "; ".join([*problems, beside_plan(peak, usage, cap), speed])
    results.check(title, not problems, text, case=title_of(case), **numbers)


def add_headlines(results: Results) -> None:
    """Record the largest model that fitted, in full and with QLoRA, for the closing sentence."""
    for is_qlora in (False, True):
        passed = [row for row in results.rows if row.get("case") and row["status"] == PASS]
        passed = [row for row in passed if bool(row["qlora_rank"]) == is_qlora]
        if passed:
            best = max(passed, key=lambda row: row["planned_gib"])
            text = f"{best['case']} at {best['row_tokens']:,} tokens: {best['reserved_gib']:.1f} GiB, "
            text += f"{best['tokens_per_second']:,.0f} tokens/s"
            results.figure("largest that fits", text, headline=text if results.card.is_cuda else "")
