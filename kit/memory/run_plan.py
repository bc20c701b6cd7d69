"""The plan of a whole run: does it fit, with which settings, how long does it take, what does it write?

LADDER is one ordered list of memory settings. choose() switches its entries on one after another until a run
fits, then switches off those that turn out not to be needed, the last one first. None of them changes the
update, but by rounding. --faster adds two that do, in the place of those that copy most. Settings that were
typed stay as they are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from transformers import PreTrainedConfig

from kit import paper
from kit.command_line import started_as
from kit.config import as_flags, full_command, part_of
from kit.machine import GIB
from kit.memory.hours import Work, card_named, estimate_run, in_words
from kit.memory.phases import CACHE, MOST_SLOTS, MeasuredRun, Run, RunPlan, most_slots
from kit.memory.settings import Config, PlanSettings
from kit.memory.simulate import CARDS
from kit.models.families import OTHER, family_of
from kit.models.loading import load_config
from kit.ranks import here
from kit.run import write_json
from kit.train.savings import Savings

Entry = tuple[str, object]  # a field of Savings, and its value

# What costs least comes first. The order stands here and nowhere else.
LADDER: tuple[Entry, ...] = (
    ("optimizer", "adamw8bit"),
    ("tile_tokens", 8192),  # of a row of 16,384: narrow tiles launch many small kernels. Gemma-3-1B launches
    ("tile_tokens", 4096),  # 3,119 kernels without tiles and 13,311 with tiles of 2,048 (counted)
    ("tile_tokens", 2048),
    ("logit_rows", 512),
    ("offload_inputs", True),
    ("offload_optimizer", True),
    ("offload_gradients", True),
    ("logit_rows", 256),  # reads the head's weight twice as often
    ("head_update", "blocked"),  # computes the logits once more
)
# With --faster these come before the optimizer's states cross the bus. It saves little: those of Qwen2.5-3B
# move 24.9 GB per step both ways together (counted), a second at 25 GB/s, beside 31 s of computing (estimated
# for an RTX 4080: 36,000 tokens, the paper's batch). With gradients and states in CPU memory, the six models
# take at most 0.23 GiB less of the card. It is CPU memory that is saved: 8.0 GiB instead of 19.5 (simulated).
FASTER: tuple[Entry, ...] = (("exact_weights", False), ("update_in_backward", True))
GIVES_UP = {  # settings that change the update -> what they give up
    "exact_weights": "bf16 weights are rounded stochastically",
    "update_in_backward": "one row per step, and no clipping",
}
# Of no use to adapters, which have few gradients and optimizer states and no gradient of the head.
FULL_ONLY = {"offload_optimizer", "offload_gradients", "head_update", *GIVES_UP}
EXCLUDES: dict[Entry, set[str]] = {  # a setting that was typed -> others that it excludes: see Savings
    ("recompute", False): {"tile_tokens", "offload_inputs"},
    ("offload_gradients", True): {"update_in_backward"},
}


def given_up(savings: Savings) -> str:
    """Say how the update differs from that of the defaults; "" if it is the same."""
    return "; ".join(words for name, words in GIVES_UP.items() if name in savings.switched_on)


def entries_for(
    config: PreTrainedConfig,
    adapted: bool = False,
    without: Collection[str] = (),
    *,
    faster: bool = False,
    held: Sequence[Entry] = (),
) -> list[Entry]:
    """Return the entries of LADDER that this model can have, after those of `held`, which were typed.

    without: settings that stay off.
    """
    first = dict([*LADDER[:1], *held])
    excluded = {*without, *first, *(FULL_ONLY if adapted else ())}
    for entry in held:
        excluded |= EXCLUDES.get(entry, set())
    if family_of(config) is OTHER:  # its layers have no tiles
        excluded.add("tile_tokens")
    if not config.tie_word_embeddings:  # only a tied head has blocks
        excluded.add("head_update")
    if here().count > 1:  # several ranks sum whole gradients after the backward pass
        excluded |= {"head_update", "update_in_backward"}
    place = LADDER.index(("offload_optimizer", True)) if faster else len(LADDER)
    entries = LADDER[:place] + (FASTER if faster else ()) + LADDER[place:]
    return [*first.items(), *(entry for entry in entries if entry[0] not in excluded)]


def entries_of(run: Run, **options) -> list[Entry]:
    return entries_for(load_config(run.model), run.has_adapters, run.without, **options)


def held_by(card: PlanSettings) -> list[Entry]:
    """Return the savings that were typed. A batch and a norm to clip by need all gradients at once."""
    held = [entry for entry in card.held.items() if entry[0] in vars(Savings())]
    if card.held.get("batch_traces", 1) > 1 or card.held.get("max_grad_norm"):
        held.insert(0, ("update_in_backward", False))
    return held


def as_savings(entries: list[Entry]) -> Savings:
    """Return the settings with these entries switched on; the last one counts for each field.

    What is updated in the backward pass leaves no gradient to offload. The head has blocks with either.
    """
    settings = dict(entries)
    if settings.get("update_in_backward"):
        settings.pop("offload_gradients", None)
    elif not settings.get("offload_gradients"):
        settings.pop("head_update", None)
    return Savings(**settings)


def plan_run(run: Run, card: PlanSettings, savings: Savings | None = None) -> RunPlan:
    """Plan a run; takes seconds per setting that is tried.

    card: with gpu_gb, the savings and as many slots as fit are chosen, except for what was typed; otherwise
    they are those that are passed. Raises ValueError if nothing fits, with a way out, and for a card without
    known rates.
    """
    card_named(card.card)  # a wrong name is refused now, not in a minute
    print(f"memory plan: simulating {run.model} takes seconds per setting that is tried", flush=True)
    if not card.gpu_gib:
        return run.simulate(savings or Savings())
    asked = card.held.get("num_slots", 1)
    if isinstance(run, MeasuredRun) and not run.at(asked).fits(card.room):  # whatever savings training has
        least = run.at(asked)
        without_cache = replace(least, peak=least.peak - least.owners[CACHE])
        smaller = "--max_new_tokens" if without_cache.fits(card.room) else "--model"
        fewer = most_slots(run.at, card.room, asked)
        raise ValueError(
            f"{card.size} but sampling from {least.title}, needs {least.total / GIB:.2f} GiB; its largest "
            f"owners are {least.largest_owners()}; pass "
            f"{f'--num_slots {fewer}' if fewer else f'a smaller {smaller}'}, or a larger card"
        )
    found = choose(run, card) if run.row_tokens else run.simulate(Savings())
    if "num_slots" in card.held:
        return found
    slots = most_slots(found.at, card.room, min(run.num_samples, MOST_SLOTS))
    return replace(found, num_slots=slots, is_flexible=False)


def choose(run: Run, card: PlanSettings) -> RunPlan:
    """Return the plan of the first settings of LADDER with which a step, and one answer at a time, fit.

    Takes up to a minute; a line is printed for each setting that is tried. card: its gpu_gb is set.
    Raises ValueError if none fits, naming the three largest owners and what would fit.
    """

    @cache
    def simulated(savings: Savings) -> RunPlan:
        found = _fewest_slots(run.simulate(savings), card)
        flags = as_flags(savings.switched_on) or "the defaults"
        print(f"  {found.update.total / GIB:6.2f} GiB with {flags}", flush=True)
        return found

    def fits(entries: list[Entry]) -> bool:
        return simulated(as_savings(entries)).fits(card.room)

    held = held_by(card)
    always = len({"optimizer", *dict(held)})
    entries = entries_of(run, faster=getattr(card, "faster", False), held=held)
    steps = [entries[:count] for count in range(always, len(entries) + 1)]
    for step in steps:
        if fits(step):
            needed = _needed(step, always, fits) if run.drops_unneeded else step
            chosen = simulated(as_savings(needed))
            if price := given_up(chosen.update.savings):
                print(f"  faster, at this price: {price}", flush=True)
            return chosen

    leanest = min((simulated(as_savings(step)) for step in steps), key=lambda found: found.larger.peak)
    other = simulated(as_savings(entries_of(run, faster=True, held=held)))
    least, price = leanest.larger, given_up(other.update.savings)
    faster = f"--faster ({price}), or " if hasattr(card, "faster") and other.fits(card.room) else ""
    raise ValueError(
        f"{card.size} but {least.title}, needs {least.total / GIB:.2f} GiB even with "
        f"{as_flags(leanest.update.savings.switched_on)}; its largest owners are {least.largest_owners()}; "
        f"{_without_typed(run, card)}pass {faster}{_ways_out(leanest, card)}"
    )


def _fewest_slots(found: RunPlan, card: PlanSettings) -> RunPlan:
    return found if "num_slots" in card.held else replace(found, num_slots=1)


def _needed(entries: list[Entry], always: int, fits: Callable[[list[Entry]], bool]) -> list[Entry]:
    """Remove every entry without which the others still fit, the last one first. The first `always` stay."""
    for entry in reversed(entries[always:]):
        others = [other for other in entries if other != entry]
        if fits(others):
            entries = others
    return entries


def _without_typed(run: Run, card: PlanSettings) -> str:
    """Name the typed setting that keeps the run from fitting, or all that do together; "" if none does."""
    for names in filter(None, [*([name] for name in card.held), [*card.held]]):
        free = replace(card, typed=tuple(name for name in card.typed if name not in names))
        entries = entries_of(run, faster=getattr(card, "faster", False), held=held_by(free))
        found = _fewest_slots(run.simulate(as_savings(entries)), free)
        if found.fits(card.room):
            typed = as_flags({name: card.held[name] for name in names})
            return f"leave out {typed} (then {found.larger.total / GIB:.2f} GiB), or "
    return ""


def _ways_out(leanest: RunPlan, card: PlanSettings) -> str:
    """List what fits the card if the leanest settings do not: of each kind of change the smallest.

    Each is simulated.
    """
    run = leanest.run

    def fits(flags: dict) -> bool:
        changed, savings = run.changed(flags), leanest.update.savings
        if changed.qlora_rank != run.qlora_rank:
            if any(name in FULL_ONLY and value != getattr(Savings(), name) for name, value in held_by(card)):
                return False  # beside adapters, what was typed is refused
            savings = as_savings(entries_of(changed, held=held_by(card)))
        return _fewest_slots(changed.simulate(savings), card).fits(card.room)

    kinds = filter(None, run.smaller())
    ways = [as_flags(kind[bisect_left(kind[:-1], True, key=fits)]) for kind in kinds if fits(kind[-1])]
    sizes = (f"a card of {gb} GB" for gb in CARDS if leanest.fits(gb - card.desktop_gb))
    return ", or ".join([*ways, next(sizes, "a smaller --model")])


def for_less(found: RunPlan) -> Iterator[str]:
    """Yield lines to print: what lowers training's need, each with those above it. All are simulated."""
    before = found.update
    for name, value in [("recompute", True), *entries_of(found.run)]:  # others need recomputation
        if before.total < found.least_sampling.total:  # then sampling decides: see RunPlan.describe
            return
        savings = as_savings([*asdict(before.savings).items(), (name, value)])
        if savings == before.savings:
            continue
        smaller = found.run.simulate(savings).update
        if smaller.peak < before.peak:
            yield f"    {as_flags({name: value}):<24}{smaller.total / GIB:7.2f} GiB"
            before = smaller


def plan_recipe(
    config: Config, run: Run, work: Work, *, smoke: dict, presets: dict
) -> tuple[Config, RunPlan]:
    """Print a recipe's plan. Return (its settings, chosen for the card if gpu_gb is set; what they hold).

    smoke, presets: the recipe's.
    """
    savings = part_of(config, Savings) if isinstance(config, Savings) else Savings()
    found = plan_run(run, config, savings)
    if config.gpu_gib:
        chosen = found.switches()
        chosen |= {name: value for name, value in config.held.items() if name in chosen}
        config = replace(config, **chosen)
        print(f"for a card of {config.gpu_gib:.3g} GB: {as_flags(chosen)}")
    print(found.describe(config.desktop_gb))
    if not config.plan:
        return config, found

    if found.larger is found.update and not found.fits(CARDS[0] - config.desktop_gb):
        print("training for less, each with those above it (simulated):")
        for line in for_less(found):
            print(line, flush=True)

    estimate = estimate_run(found, work, card=config.card)
    fits = f"a card of {config.gpu_gib:.3g} GB is large enough; " if config.gpu_gib else ""
    print(f"in short    {fits}about {in_words(estimate.hours)} in all")
    print(estimate.describe(found.host))
    print(paper.describe(paper.deviations(config)))
    print(f"start       {full_command(config.to_start(), started_as(), smoke=smoke, presets=presets)}")
    if config.json:
        write_json(Path(config.json), found.as_json(config.desktop_gb) | {"estimate": asdict(estimate)})
    return config, found
