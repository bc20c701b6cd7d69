"""Settings that fit a card: which savings to switch on, what they bring along, and what to do where nothing fits.

The formula (kit.memory.closed_form) says which settings are worth a simulation; the simulation (kit.memory.simulate) decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

from transformers import PreTrainedConfig

from kit.config import as_flags
from kit.machine import GIB
from kit.memory.closed_form import formula, formula_total
from kit.memory.seconds import extra_seconds
from kit.memory.simulate import CARDS, Plan, card_bytes, plan
from kit.models.loading import load_config
from kit.train.savings import Savings

# In this order they are switched on, each besides the ones before it.
LADDER = (
    {"optimizer": "adamw8bit"},
    {"tile_tokens": 2048},
    {"update_in_backward": True},
    {"logit_rows": 512},
    {"offload_inputs": True},
    {"head_update": "blocked"},
    {"offload_optimizer": True},
)
NOT_FOR_ADAPTERS = {
    "head_update",
    "offload_optimizer",
    "update_in_backward",
}  # no head gradient, few states, few gradients
WORTH_A_TRY = 1.1  # of the card, by the formula, which is good to a tenth
WIDER_TILES = (
    8192,
    4096,
)  # tokens: a row of 16,384 in tiles of 2,048 launches 50,901 kernels in Gemma-3-1B, whole 10,612 (counted)
SHORTER = 1024  # tokens: shorter rows are looked for in steps of this many
QLORA_RANK = 16


def ladder_steps(config: PreTrainedConfig, qlora_rank: int = 0) -> list[Savings]:
    """The ladder for this model. An untied head has no blocks."""
    found, settings = [], {}
    for step in LADDER:
        if (qlora_rank and step.keys() & NOT_FOR_ADAPTERS) or (
            "head_update" in step and not config.tie_word_embeddings
        ):
            continue
        settings |= step
        found.append(Savings(**settings))
    return found


def rows_of(savings: Savings, rows: int) -> int:
    """Rows of a step: updating in the backward pass takes one."""
    return 1 if savings.update_in_backward else rows


def choose(model: str, *, row_tokens: int, gpu_gb: float, qlora_rank: int = 0, rows: int = 1) -> Plan:
    """The plan of settings that fit a card of gpu_gb GiB: the ladder's first step that fits, without what it
    turns out not to need, the most expensive in seconds (kit.memory.seconds) left out first. rows: of a step, where
    gradients can wait. Takes minutes where much must be tried.

    Raises ValueError if none fits, naming the three largest owners of the leanest and what would fit.
    """
    config = load_config(model)
    settings = ladder_steps(config, qlora_rank)
    for savings in settings:
        num_rows = rows_of(savings, rows)
        expected = formula_total(config, row_tokens, savings, qlora_rank, rows=num_rows)
        if expected <= WORTH_A_TRY * gpu_gb * GIB or savings is settings[-1]:
            found = plan(model, row_tokens=row_tokens, savings=savings, qlora_rank=qlora_rank, rows=num_rows)
            if found.fits(gpu_gb):
                return _with_wider_tiles(_without_the_needless(config, found, gpu_gb, rows), gpu_gb)
    raise ValueError(
        f"gpu_gb is {gpu_gb:g} but {model} at {row_tokens:,} tokens needs {found.total / GIB:.2f} GiB with every saving on; its "
        f"largest owners are {found.largest_owners()}; pass {', or '.join(_ways(config, found, gpu_gb, rows))}"
    )


def _without_the_needless(config: PreTrainedConfig, found: Plan, gpu_gb: float, rows: int) -> Plan:
    """A step keeps what the steps before it switched on; the most expensive one that is not needed is dropped, and so on."""
    tried = set()
    while True:
        seconds = extra_seconds(config, found.row_tokens, found.savings, found.qlora_rank)
        names = [name for name, _ in _switched_on(found.savings) if name not in tried | {"optimizer"}]
        if not names:
            return found
        name = max(names, key=lambda name: seconds.get(name, 0.0))
        tried.add(name)
        if name == "update_in_backward" and found.savings.head_update == "blocked":
            continue  # blocks are updated as they are made
        savings = replace(found.savings, **{name: getattr(Savings(), name)})
        num_rows = rows_of(savings, rows)
        now, without = (
            sum(formula(config, found.row_tokens, s, found.qlora_rank, rows=n).values())
            for s, n in ((found.savings, found.rows), (savings, num_rows))
        )
        if card_bytes(round(found.peak * without / now)) <= WORTH_A_TRY * gpu_gb * GIB:
            lighter = plan(
                found.model,
                row_tokens=found.row_tokens,
                savings=savings,
                qlora_rank=found.qlora_rank,
                rows=num_rows,
            )
            found = lighter if lighter.fits(gpu_gb) else found


def _with_wider_tiles(found: Plan, gpu_gb: float) -> Plan:
    """The widest tiles that fit: a tile's kernels are small, and launching them takes longer than they do on a fast card."""
    for tile_tokens in WIDER_TILES if found.savings.tile_tokens else ():
        if found.savings.tile_tokens < tile_tokens < found.row_tokens:
            savings = replace(found.savings, tile_tokens=tile_tokens)
            wider = plan(
                found.model,
                row_tokens=found.row_tokens,
                savings=savings,
                qlora_rank=found.qlora_rank,
                rows=found.rows,
            )
            if wider.fits(gpu_gb):
                return wider
    return found


def _switched_on(savings: Savings) -> list[tuple[str, object]]:
    return [(name, value) for name, value in asdict(savings).items() if value != getattr(Savings(), name)]


def _ways(config: PreTrainedConfig, found: Plan, gpu_gb: float, rows: int) -> Iterator[str]:
    """What fits where the leanest settings at this length do not, each simulated before it is promised."""
    what = {
        "model": found.model,
        "savings": found.savings,
        "qlora_rank": found.qlora_rank,
        "rows": found.rows,
    }
    fits, too_many = 0, -(-found.row_tokens // SHORTER)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        expected = formula_total(config, middle * SHORTER, found.savings, found.qlora_rank, rows=found.rows)
        if expected <= WORTH_A_TRY * gpu_gb * GIB and plan(**what, row_tokens=middle * SHORTER).fits(gpu_gb):
            fits = middle
        else:
            too_many = middle
    if fits:
        yield f"--row_tokens {fits * SHORTER}"
    if not found.qlora_rank:
        leanest = ladder_steps(config, QLORA_RANK)[-1]
        adapters = plan(
            found.model, row_tokens=found.row_tokens, savings=leanest, qlora_rank=QLORA_RANK, rows=rows
        )
        if adapters.fits(gpu_gb):
            yield f"--qlora_rank {QLORA_RANK}"
    yield next((f"a card of {gb} GB" for gb in CARDS if found.fits(gb)), "a smaller --model")


def suggest_savings(planned: Plan) -> str:
    """What to switch on where a plan does not fit, cheapest first, in lines to print; "" = it is all on."""
    config, savings = load_config(planned.model), planned.savings
    leanest = ladder_steps(config, planned.qlora_rank)[-1]
    seconds = extra_seconds(config, planned.row_tokens, leanest, planned.qlora_rank)
    is_off = {name: getattr(savings, name) == getattr(Savings(), name) for name, _ in _switched_on(leanest)}
    is_off["optimizer"] = savings.optimizer == "adamw"  # auto is adamw8bit for the bf16 weights of a card
    off = [(name, value) for name, value in _switched_on(leanest) if is_off[name]]
    off.sort(key=lambda switch: seconds.get(switch[0], 0.0))
    if not savings.recompute:  # what others need
        off.insert(0, ("recompute", True))
    lines = (
        ["  for less, cheapest first, each with those above it (by the formula; seconds estimated):"]
        if off
        else []
    )
    for name, value in off:
        savings = replace(savings, **{name: value})
        num_rows = rows_of(savings, planned.rows)
        total = formula_total(config, planned.row_tokens, savings, planned.qlora_rank, rows=num_rows)
        longer = (
            f"{seconds.get(name, 0.0):.2f} s per step" if name != "update_in_backward" else "one row per step"
        )
        lines.append(f"    {as_flags({name: value}):<24}{total / GIB:7.2f} GiB, {longer}")
    return "\n".join(lines)


def switches(chosen: Plan, max_grad_norm: float) -> dict:
    """The chosen savings as a recipe's settings, with what they bring along: updating in the backward pass takes one row per step
    and clips each parameter by itself instead of all by their common norm; blocks of the head's gradient cannot be clipped."""
    found = asdict(chosen.savings)
    if chosen.savings.update_in_backward:
        found |= {"batch_traces": 1, "max_grad_norm": 0.0, "max_tensor_norm": max_grad_norm}
    if chosen.savings.head_update == "blocked":
        found["max_tensor_norm"] = 0.0
    return found
