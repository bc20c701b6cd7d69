"""Training steps at 16,384 tokens, from plain to lean settings: are the losses the same, where does time go?

Every model that fits the card is trained three steps with each setting, from the same random weights, on rows
of four documents. The second step is timed; the third runs under torch.profiler. If the second was short, two
more are timed after them, and the median counts. Settings may change speed and memory, not the losses;
without offloading, at most 6 copies to the host per row may make the CPU wait.
Left out: how much memory a step takes (section fits; here --cap_gb only decides what runs), and several rows
per step.
"""

from __future__ import annotations

import math
from dataclasses import replace

from kit.memory.run_plan import as_savings, entries_for
from kit.recipes.card.memory import median_seconds, timed
from kit.recipes.card.models import NO_BF16, ROW_TOKENS, Training, build, model_config, shipped
from kit.recipes.card.plans import plan_of, planned
from kit.recipes.card.profile import Profile, profiled
from kit.recipes.card.results import Card, Results
from kit.train import Savings, TrainingStep

USUAL = ("google/gemma-3-1b-it", "Qwen/Qwen2.5-0.5B-Instruct", "meta-llama/Llama-3.2-3B-Instruct")
DOCUMENTS = [ROW_TOKENS // 4] * 4
SAME_LOSS = 1e-3  # relative; tiles and blocks add in another order, and bf16 rounds what they add
COPIES = 6  # to the host, per row


def chosen_models(names: str) -> list[str]:
    """Split comma-separated names of models; "" = the usual three, "all" = every shipped config.

    Raises ValueError for a model without a shipped config.
    """
    known = shipped()
    if names == "all":
        return known
    chosen = [name.strip() for name in names.split(",")] if names else list(USUAL)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ValueError(f"no config of {unknown[0]!r} ships with the kit; pass some of {', '.join(known)}")
    return chosen


def run(results: Results, card: Card) -> None:
    card.need_rtx_30(NO_BF16)
    cases = {
        Training(name, savings, small=card.small): label
        for name in card.models[: 1 if card.quick else None]
        for label, savings in settings(name, card).items()
    }
    references = {}  # model -> losses of the first setting that runs
    with planned(list(cases) if card.is_cuda else []) as plans:
        for training, label in cases.items():
            title = f"{training.short}, {label}"
            with results.case(title):
                seconds = training.guessed_seconds(card, training.row(DOCUMENTS, 0))
                results.need(seconds=seconds)
                if card.is_cuda:
                    plan_of(results, plans[training], seconds)
                losses = train(results, card, title, training)
                compare(results, title, losses, references.setdefault(training.model, losses))


def settings(name: str, card: Card) -> dict[str, Savings]:
    """List the settings to try, from plain to lean."""
    tiles, rows = (64, 32) if card.small else (2_048, 512)
    return {
        "defaults": Savings(),
        "tiles": Savings(tile_tokens=tiles),
        "tiles and offloaded inputs": Savings(tile_tokens=tiles, offload_inputs=True),
        "leanest": replace(as_savings(entries_for(model_config(name))), tile_tokens=tiles, logit_rows=rows),
    }


def train(results: Results, card: Card, title: str, training: Training) -> list[float]:
    """Train, and record speed and profile. Returns the losses of the first three steps."""
    rows = [training.row(DOCUMENTS, seed) for seed in range(3)]
    step = TrainingStep(build(card, training.config), training.savings, lr=1e-5)
    first = step([rows[0]])[0]  # compiles
    second, seconds = timed(card, lambda: step([rows[1]])[0])
    losses = [first, second]
    profile = profiled(card, lambda: losses.append(step([rows[2]])[0]))
    seconds = median_seconds(card, lambda: step([rows[1]]), first=seconds)
    step.close()

    numbers, text = training.speed(card, rows[1], seconds)
    results.figure(title, text, **numbers)
    record(results, title, training.savings, profile, seconds)
    return [loss.item() for loss in losses]


def record(results: Results, title: str, savings: Savings, profile: Profile, seconds: float) -> None:
    """Record the profile and judge the copies to the host."""
    if not profile.seconds:
        results.not_run(f"{title}, profile", "the profiler saw no kernel")
        return
    copies, shares = profile.copies_to_host, (profile.busy / profile.seconds, profile.busy / seconds)
    text = f"{profile.launches:,} launches, {profile.kernels:,} kernels, {copies} copies to the host; "
    text += "busy for {:.0%} of the profiled step, {:.0%} of the timed one".format(*shares)
    numbers = {"launches": profile.launches, "kernels": profile.kernels, "busy": shares[1]}
    results.figure(f"{title}, profile", text, **numbers, longest=profile.longest)
    for kernel, milliseconds, times in profile.longest[:5]:
        print(f"{milliseconds:16.2f} ms {times:>6} x {kernel[:80]}")

    if not (savings.offload_inputs or savings.offload_optimizer):  # which copy to the host on purpose
        text = f"{copies} per row, at most {COPIES}"
        results.check(f"{title}, copies to the host", copies <= COPIES, text)


def compare(results: Results, title: str, losses: list[float], reference: list[float]) -> None:
    """Judge the losses beside those of the first setting that ran."""
    apart = max(abs(loss / other - 1) for loss, other in zip(losses, reference, strict=True))
    holds = all(map(math.isfinite, losses)) and apart <= SAME_LOSS
    found = ", ".join(f"{loss:.5f}" for loss in losses)
    text = f"{found}: {apart:.1e} from the first setting's, at most {SAME_LOSS:g}"
    results.check(f"{title}, losses", holds, text, losses=losses)
