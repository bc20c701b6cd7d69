"""Check the kit on your NVIDIA card: are the kernels right, how fast are they, does the memory plan hold?

    python recipes/check_card.py                       what fits into five minutes, the most important first
    python recipes/check_card.py --quick               the most important part, in 90 seconds
    python recipes/check_card.py --only fits --cap_gb 8    use a larger card as if it had 8 GB
    python recipes/check_card.py --only truth --as sm89    run the code that Triton generates for an RTX 40
    python recipes/check_card.py --device cpu          rehearse every check on a CPU, with tiny shapes

    truth    every kernel against float64: its error may be at most twice torch's own
    speed    kernels beside the peers that are installed, and beside the card's own limits
    steps    training steps at 16,384 tokens: tokens/s, launches, share of the time that the card is busy
    fits     training under a cap on memory: planned, allocated and reserved GiB
    sampler  tokens/s by the number of rows, beside transformers' generate
    rl       one rollout and one update of GRPO: the sampler's log-probs against the trainer's
    resume   the same bits after a checkpoint, with offloading and with updates in the backward pass
    tiles    attention's tiles beside others: is one faster on this card? only if time is left, for developers
    flex     attention with a window beside torch's flex_attention, which compiles long: only if time is left

Models are built from the shipped configs with random weights, so nothing is downloaded. Every result is
printed and appended to results.jsonl as soon as it is known. The exit status is 1 if a check failed. Recipes
read the tokens/s measured here to estimate their hours. Their `--attention auto` is torch's varlen where that
was right and faster here; --quick checks it for heads 64 wide alone. To have every memory access checked, run
this under `compute-sanitizer --tool memcheck` or `--tool racecheck`, with `--only truth --quick`.
Left out on purpose: several cards, and cards other than NVIDIA's. Never run on a GPU so far.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from kit.command import ONE_PROCESS, start, suggest
from kit.command_line import command_of, started_as
from kit.config import Checked
from kit.lock import hold
from kit.machine import describe_machine, require_gpu
from kit.run import make_next_folder, write_json

if TYPE_CHECKING:
    from kit.recipes.card.results import Results

STOPPED = "stopped with Ctrl-C"
# files of recipes/card
SECTIONS = ("truth", "speed", "steps", "fits", "sampler", "rl", "resume", "tiles", "flex")


@dataclass(frozen=True)
class Config(Checked):
    only: str = (
        ""  # sections; "" = all [truth | speed | steps | fits | sampler | rl | resume | tiles | flex, ...]
    )
    quick: bool = False  # fewer cases, in 90 seconds
    seconds: float = 290.0  # time budget; checks that do not fit are named; 0 = no limit [>= 0]
    models: str = ""  # of steps and fits, comma-separated names of shipped configs; "all"; "" = three of them
    cap_gb: float = 0.0  # GiB of the card to use, as if it were a smaller one; 0 = the whole card [>= 0]
    as_: str = ""  # compile for another architecture that this card runs, such as sm89; "" = the card's own
    device: str = "cuda"  # cpu: a rehearsal with tiny shapes [cuda | cpu]
    out: str = ""  # folder for results.jsonl; "" = the next free one under runs/check_card


QUICK = {"seconds": 90.0}


def main(config: Config) -> Results:
    """Run the sections. Raises ValueError for an unknown model, and if no card is here."""
    names = config.only.replace(" ", "").split(",") if config.only else SECTIONS
    rehearsal = {f"{started_as()} --device cpu": "a rehearsal of every check, with tiny shapes"}
    require_gpu(config.device, "check_card", rehearsal)

    import torch  # here, so that flags are read at once

    from kit.recipes.card.results import FAIL, Card, CardLost, Results
    from kit.recipes.card.steps import chosen_models

    models = tuple(chosen_models(config.models))
    folder = Path(config.out) if config.out else make_next_folder(Path("runs/check_card"))
    hold(folder)
    if config.as_:  # Triton reads both when it compiles
        os.environ["TRITON_OVERRIDE_ARCH"] = config.as_
        cache = folder / f"triton_{config.as_}"  # in the usual one, Triton would find the card's own code
        os.environ["TRITON_CACHE_DIR"] = str(cache.resolve())

    card = Card(torch.device(config.device), config.quick, config.cap_gb, config.as_, models)
    results = Results(card, folder / "results.jsonl", seconds=config.seconds or float("inf"))
    machine = describe_machine()
    write_json(folder / "config.json", asdict(config) | {"machine": machine})
    print(f"{machine['gpu']}; torch {machine['torch']}; results in {results.journal.path}")
    try:
        for name in (name for name in SECTIONS if name in names):
            results.section = name
            run_section(name, results)
        results.section = "bars"
        with results.case("bars"):
            from kit.recipes.card import bars  # which imports the sections, each of which may fail alone

            bars.report(results, card, names)
    except CardLost as error:
        text = f"a CUDA error in {error} made the card unusable; the checks after it did not run"
        results.add(FAIL, "card", text)
    except KeyboardInterrupt:
        results.not_run("the rest", STOPPED)
    print(f"\n{results.table()}\n\n{sentence(results, machine)}")
    flags = ("--plan", "--preset", "evening", "--gpu_gb", "auto" if card.is_cuda else "12")
    suggest("does training fit, and how long does it take?", command_of("finetune"), *flags)
    return results


def run_section(name: str, results: Results) -> None:
    """Run one section as a case of its own, so that errors between its cases are caught, too."""
    with results.case(name):
        import_module(f"kit.recipes.card.{name}").run(results, results.card)
    results.card.free()


def sentence(results: Results, machine: dict) -> str:
    """Return the results as one sentence to post."""
    from kit.recipes.card.results import FAIL, PASS

    truths = [row["status"] for row in results.rows if row["section"] == "truth"]
    right, wrong = truths.count(PASS), truths.count(FAIL)
    parts = [f"{right} of {right + wrong} kernel checks right"] if right + wrong else []
    parts += [row["headline"] for row in results.rows if row.get("headline")]
    parts = parts or ["nothing measured"]
    if failed := results.count(FAIL):
        parts.append(f"{failed} checks FAILED")

    gpu = f"{machine['gpu']}, {results.card.gib:.0f} GB"
    return f"{gpu if results.card.is_cuda else 'CPU rehearsal, tiny shapes'}: {'; '.join(parts)}"


def check(config: Config) -> None:
    """Run main. Exit with status 1 if a check failed, and raise KeyboardInterrupt again after Ctrl-C."""
    from kit.recipes.card.results import FAIL

    found = main(config)
    if any(row["text"] == STOPPED for row in found.rows):
        raise KeyboardInterrupt
    if found.count(FAIL):
        raise SystemExit(1)


if __name__ == "__main__":
    start(check, Config, alone=ONE_PROCESS, quick=QUICK)
