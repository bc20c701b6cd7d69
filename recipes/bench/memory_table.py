"""What fits: the six models at 16,384 tokens, full fine-tuning and QLoRA, simulated. No GPU, no weights, no download.

    python recipes/bench/memory_table.py                                   all six: about half an hour on one core
    python recipes/bench/memory_table.py --models google/gemma-3-1b-it     one
    python recipes/bench/memory_table.py --json memory.json                for posting

Each figure is one real training step on fake tensors, every live byte counted, plus what
kit/memory/simulate.py assumes for slack and for CUDA itself. The rows switch savings on one after another;
the full rows update in the backward pass, one row of packed traces per step. Left out on purpose: speed.
Offloaded bytes cross the bus, a blocked head costs a matmul more: not timed on a GPU."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from kit.config import parse
from kit.machine import GIB
from kit.memory import Plan, plan
from kit.memory.closed_form import formula_total
from kit.models.loading import CONFIGS, load_config
from kit.run import write_json
from kit.train import Savings

FULL = {
    "optimizer": "adamw8bit",
    "tile_tokens": 2048,
    "update_in_backward": True,
    "offload_inputs": True,
    "logit_rows": 256,
}
ROWS = {  # name -> savings, rank of the adapters
    "full": (Savings(**FULL), 0),
    "full, head blocked": (Savings(**FULL, head_update="blocked"), 0),
    "full, optimizer on CPU": (Savings(**FULL, offload_optimizer=True), 0),
    "full, both": (Savings(**FULL, head_update="blocked", offload_optimizer=True), 0),
    "QLoRA r = 16": (
        Savings(optimizer="adamw8bit", tile_tokens=2048, offload_inputs=True, logit_rows=256),
        16,
    ),
}


@dataclass(frozen=True)
class Config:
    models: str = ""  # hub ids, comma-separated; "" = the six whose configs ship with the kit
    row_tokens: int = 16_384  # tokens of the one row in a step
    json: str = ""  # file for the figures; "" = none
    smoke: bool = False  # the shipped tiny model, in seconds


SMOKE = {"models": "tiny", "row_tokens": 1_024}


def simulate(model: str, name: str, row_tokens: int) -> Plan:
    torch.set_num_threads(1)
    savings, rank = ROWS[name]
    return plan(model, row_tokens=row_tokens, savings=savings, qlora_rank=rank)


def table(rows: list[dict]) -> str:
    """The figures as README has them: a column a model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [f"| | {' | '.join(model.split('/')[-1] for model in models)} |", f"|---|{'---:|' * len(models)}"]
    for name in ROWS:
        totals = {row["model"]: row["total"] / GIB for row in rows if row["row"] == name}
        lines.append(f"| {name} | {' | '.join(f'{totals[model]:.2f}' for model in models)} |")
    return "\n".join(lines)


def main(config: Config) -> list[dict]:
    shipped = sorted(
        (path.stem.replace("--", "/", 1) for path in CONFIGS.glob("*.json")), key=lambda name: name.lower()
    )
    models = config.models.split(",") if config.models else shipped
    rows = []
    print(
        f"GiB a card needs, simulated, {config.row_tokens:,} tokens in one row; in brackets the second opinion, a formula"
    )
    with ProcessPoolExecutor() as pool:
        jobs = {
            (model, name): pool.submit(simulate, model, name, config.row_tokens)
            for model in models
            for name in ROWS
        }
        for model in models:
            print(f"{model}")
            for name, (savings, rank) in ROWS.items():
                found = jobs[model, name].result()
                opinion = formula_total(load_config(model), config.row_tokens, savings, rank)
                owners = ", ".join(f"{owner} {n / GIB:.2f}" for owner, n in found.largest()[:4])
                print(
                    f"    {name:<24}{found.total / GIB:7.2f} ({opinion / GIB:.2f})  in {found.when}: {owners}",
                    flush=True,
                )
                rows.append({"row": name, "formula": opinion, **found.as_json()})
    print(table(rows))
    if config.json:
        write_json(Path(config.json), rows)
    return rows


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE))
