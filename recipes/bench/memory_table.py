"""Simulate what six models need at 16,384 tokens, in full and with QLoRA. No GPU, no weights, no download.

    python recipes/bench/memory_table.py                                   all six, in minutes
    python recipes/bench/memory_table.py --models google/gemma-3-1b-it     one of them, or any other
    python recipes/bench/memory_table.py --json memory.json                keep the figures, for posting

Each figure is one real training step on fake tensors with every live byte counted, and what
kit/memory/simulate.py assumes for slack and for CUDA itself. Full fine-tuning has the paper's batch, a global
norm and exact weights. "One row per step" gives that up: it updates in the backward pass, and rounds
stochastically.

Time: minutes on two cores. Left out on purpose: speed. Offloaded bytes cross the bus, and a blocked head
costs one more matmul.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from contest import table

from kit.config import Checked, parse
from kit.machine import GIB
from kit.memory import Plan, plan
from kit.models.families import OTHER, family_of
from kit.models.loading import load_config
from kit.paper import MODELS
from kit.run import write_json
from kit.train import Savings

LEAN = Savings(optimizer="adamw8bit", tile_tokens=2048, offload_inputs=True, logit_rows=256)
IN_CPU_MEMORY = replace(LEAN, offload_optimizer=True, offload_gradients=True)
ONE_ROW = replace(LEAN, update_in_backward=True, exact_weights=False)
ROWS = {  # name -> (savings, rank of the adapters)
    "QLoRA r = 16": (LEAN, 16),
    "full": (LEAN, 0),
    "full, states on CPU": (replace(LEAN, offload_optimizer=True), 0),
    "full, gradients too": (IN_CPU_MEMORY, 0),
    "full, head blocked": (replace(IN_CPU_MEMORY, head_update="blocked"), 0),
    "one row per step": (ONE_ROW, 0),
    "one row, states on CPU": (replace(ONE_ROW, offload_optimizer=True), 0),
}


@dataclass(frozen=True)
class Config(Checked):
    models: str = ""  # hub ids, comma-separated; "" = the paper's six
    row_tokens: int = 16_384  # tokens per row [>= 1]
    json: str = ""  # file for the figures; "" = none
    smoke: bool = False  # the tiny model that ships, in seconds


SMOKE = {"models": "tiny", "row_tokens": 1_024}


def simulate(model: str, name: str, row_tokens: int) -> Plan:
    torch.set_num_threads(1)
    savings, rank = ROWS[name]
    if family_of(load_config(model)) is OTHER:  # its layers have no tiles
        savings = replace(savings, tile_tokens=0)
    rows = 1 if savings.update_in_backward else 2
    return plan(model, row_tokens=row_tokens, savings=savings, qlora_rank=rank, rows=rows)


def main(config: Config) -> list[dict]:
    models = config.models.split(",") if config.models else list(MODELS)
    print(f"GiB that a card needs for rows of {config.row_tokens:,} tokens, simulated")

    rows = []
    with ProcessPoolExecutor() as pool:
        jobs = {
            (model, name): pool.submit(simulate, model, name, config.row_tokens)
            for model in models
            for name in ROWS
        }
        for model in models:
            print(model)
            for name in ROWS:
                found = jobs[model, name].result()
                owners = ", ".join(f"{owner} {n / GIB:.2f}" for owner, n in found.largest()[:4])
                on_cpu = f"; in CPU memory {found.host / GIB:.2f}"
                print(
                    f"    {name:<24}{found.total / GIB:7.2f}  in {found.when}: {owners}{on_cpu}", flush=True
                )
                rows.append({"row": name, **found.as_json()})

    gib = {name: [f"{row['total'] / GIB:.2f}" for row in rows if row["row"] == name] for name in ROWS}
    print(table(f"| | {' | '.join(model.split('/')[-1] for model in models)}", gib))  # as the README has it
    if config.json:
        write_json(Path(config.json), rows)
    return rows


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE))
