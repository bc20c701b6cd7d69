"""Choose memory settings that fit a card.

LADDER is one ordered list. choose() switches its entries on one after another until a simulated step fits,
then switches off those that turn out not to be needed, the last one first. So nothing that changes the update
is on while settings that only cost time would do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict
from functools import cache

from transformers import PreTrainedConfig

from kit.config import as_flags
from kit.machine import GIB
from kit.memory.simulate import CARDS, Plan, plan
from kit.models.loading import load_config
from kit.train.savings import Savings

Entry = tuple[str, object]  # a field of Savings, and its value

# Settings that compute the same update come before those that do not, and among them what costs least comes
# first. The order stands here and nowhere else.
LADDER: tuple[Entry, ...] = (
    ("optimizer", "adamw8bit"),
    ("tile_tokens", 8192),  # of a row of 16,384: narrow tiles launch many small kernels. Gemma-3-1B launches
    ("tile_tokens", 4096),  # 3,276 kernels without tiles and 12,740 with tiles of 2,048 (counted)
    ("tile_tokens", 2048),
    ("logit_rows", 512),
    ("offload_inputs", True),
    ("offload_optimizer", True),
    ("offload_gradients", True),
    ("logit_rows", 256),  # reads the head's weight twice as often
    # from here on the update is another one
    ("exact_weights", False),
    ("update_in_backward", True),
    ("head_update", "blocked"),
)
GIVES_UP = {  # settings that change the update -> what they give up
    "exact_weights": "bf16 weights are rounded stochastically",
    "update_in_backward": "one row per step and no global gradient norm",
    "head_update": "no clipping at all",
}
# Of no use to adapters, which have few gradients and optimizer states and no gradient of the head.
FULL_ONLY = {"offload_optimizer", "offload_gradients", *GIVES_UP}
SHORTER = 1024  # tokens: shorter rows are tried in multiples of this
QLORA_RANK = 16


def show_tried(found: Plan) -> Plan:
    """Print a plan's size and settings, so that a search of a minute shows where it is. Return the plan."""
    settings = as_flags(found.savings.switched_on) or "the defaults"
    print(f"  {found.total / GIB:6.2f} GiB with {settings}", flush=True)
    return found


def given_up(savings: Savings) -> str:
    """Say how the update differs from that of the defaults; "" if it is the same."""
    return "; ".join(words for name, words in GIVES_UP.items() if name in savings.switched_on)


def size_of(gpu_gb: float, desktop_gb: float) -> str:
    """Return how an error begins that names a card which is too small."""
    return f"gpu_gb is {gpu_gb:g}" + (f" and desktop_gb {desktop_gb:g}" if desktop_gb else "")


def entries_for(config: PreTrainedConfig, qlora_rank: int = 0, without: Collection[str] = ()) -> list[Entry]:
    """Return the entries of LADDER that this model can have. Only a tied head has blocks."""
    excluded = {*without, *(FULL_ONLY if qlora_rank else ())}
    if not config.tie_word_embeddings:
        excluded.add("head_update")
    return [entry for entry in LADDER if entry[0] not in excluded]


def ladder_steps(
    config: PreTrainedConfig, qlora_rank: int = 0, without: Collection[str] = ()
) -> list[Savings]:
    """Return the settings after each entry: the first has one switched on, the last all of them.

    without: settings that stay off.
    """
    entries = entries_for(config, qlora_rank, without)
    return [combined(entries[:count]) for count in range(1, len(entries) + 1)]


def combined(entries: list[Entry]) -> Savings:
    """Return the settings with these entries switched on; the last one counts for each field."""
    return _consistent(dict(entries))


def _consistent(settings: dict) -> Savings:
    """Return the settings. What is updated in the backward pass leaves no gradient to offload."""
    if settings.get("update_in_backward"):
        settings = settings | {"offload_gradients": False}
    return Savings(**settings)


def rows_of(savings: Savings, rows: int) -> int:
    """Return the rows of a step: updating in the backward pass takes one."""
    return 1 if savings.update_in_backward else rows


def choose(
    model: str,
    *,
    row_tokens: int,
    gpu_gb: float,
    qlora_rank: int = 0,
    rows: int = 1,
    desktop_gb: float = 0.0,
) -> Plan:
    """Return the plan of the first settings of LADDER that fit a card of gpu_gb GiB; takes up to a minute.

    rows: rows of a step, unless it updates in the backward pass. desktop_gb: GiB of the card that a desktop
    uses. A line is printed for each setting that is tried.
    Raises ValueError if none fits, naming the three largest owners and what would fit.
    """
    config = load_config(model)
    what = {"row_tokens": row_tokens, "qlora_rank": qlora_rank, "desktop_gb": desktop_gb}

    @cache
    def simulated(savings: Savings) -> Plan:
        return show_tried(plan(model, savings=savings, rows=rows_of(savings, rows), **what))

    def fits(entries: list[Entry]) -> bool:
        return simulated(combined(entries)).fits(gpu_gb)

    entries = entries_for(config, qlora_rank)
    for count in range(1, len(entries) + 1):
        if fits(entries[:count]):
            chosen = simulated(combined(_needed(entries[:count], fits)))
            if given_up(chosen.savings):
                kept = simulated(combined([entry for entry in entries if entry[0] not in GIVES_UP]))
                ways = ", or ".join(_ways_out(config, kept, gpu_gb))
                print(f"  to keep the update takes {kept.total / GIB:.2f} GiB: pass {ways}")
                print(f"  {chosen.total / GIB:.2f} GiB at this price: {given_up(chosen.savings)}", flush=True)
            return chosen

    leanest = simulated(combined(entries))
    raise ValueError(
        f"{size_of(gpu_gb, desktop_gb)} but {model} at {row_tokens:,} tokens needs "
        f"{leanest.total / GIB:.2f} GiB with every saving on; "
        f"its largest owners are {leanest.largest_owners()}; "
        f"pass {', or '.join(_ways_out(config, leanest, gpu_gb, rows))}"
    )


def _needed(entries: list[Entry], fits: Callable[[list[Entry]], bool]) -> list[Entry]:
    """Remove every entry without which the others still fit, the last one first. The optimizer stays."""
    for entry in reversed(entries[1:]):
        others = [other for other in entries if other != entry]
        if entry[0] == "update_in_backward" and "head_update" in dict(others):
            continue  # blocks of the head are updated in the backward pass
        if fits(others):
            entries = others
    return entries


def nearest(kinds: Iterable[list[dict]], fits: Callable[[dict], bool]) -> Iterator[str]:
    """Yield flags that fit: of each kind of change the smallest. kinds: from the smallest to the largest."""
    for kind in kinds:
        if kind and fits(kind[-1]):
            yield as_flags(kind[bisect_left(kind[:-1], True, key=fits)])


def _ways_out(config: PreTrainedConfig, leanest: Plan, gpu_gb: float, rows: int = 0) -> Iterator[str]:
    """Yield what fits if the leanest settings at this length do not. Each is simulated.

    rows: of a step with adapters; 0 = they are not offered.
    """

    def fits(flags: dict) -> bool:
        adapters = {"savings": ladder_steps(config, QLORA_RANK)[-1], "rows": rows}
        changes = flags | (adapters if "qlora_rank" in flags else {})
        return _simulate_again(leanest, **changes).fits(gpu_gb)

    shorter = range((leanest.row_tokens - 1) // SHORTER, 0, -1)
    rank = [{"qlora_rank": QLORA_RANK}] if rows and not leanest.qlora_rank else []
    yield from nearest([[{"row_tokens": count * SHORTER} for count in shorter], rank], fits)
    yield next((f"a card of {gb} GB" for gb in CARDS if leanest.fits(gb)), "a smaller --model")


def _simulate_again(planned: Plan, **changes) -> Plan:
    names = ("row_tokens", "savings", "qlora_rank", "rows", "desktop_gb")
    return plan(planned.model, **{name: getattr(planned, name) for name in names} | changes)


def suggest_savings(planned: Plan) -> Iterator[tuple[str, Plan]]:
    """Yield (flags, the plan with them and those before), as long as each needs less, in LADDER's order."""
    entries = entries_for(load_config(planned.model), planned.qlora_rank)
    for name, value in [("recompute", True), *entries]:  # others need recomputation
        if name == "head_update" and not planned.savings.update_in_backward:
            continue  # as in _needed
        savings = _consistent(asdict(planned.savings) | {name: value})
        if savings == planned.savings:
            continue
        smaller = _simulate_again(planned, savings=savings, rows=rows_of(savings, planned.rows))
        if smaller.peak < planned.peak:
            yield as_flags({name: value}), smaller
            planned = smaller


def switches(chosen: Plan, max_grad_norm: float) -> dict:
    """Return the chosen savings as a recipe's settings, with the settings that follow from them.

    Updating in the backward pass takes one row per step, and clips each parameter by its own norm instead of
    all by their common norm. Blocks of the head's gradient cannot be clipped.
    """
    found = asdict(chosen.savings)
    if chosen.savings.update_in_backward:
        found |= {"batch_traces": 1, "max_grad_norm": 0.0, "max_tensor_norm": max_grad_norm}
    if chosen.savings.head_update == "blocked":
        found["max_tensor_norm"] = 0.0
    return found
