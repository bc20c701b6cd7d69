"""Count what one training step moves and launches, on fake tensors: no GPU, no weights, no download.

    python recipes/bench/step_traffic.py                              Gemma-3-1B, full fine-tuning, no tiles
    python recipes/bench/step_traffic.py --tile_tokens 2048           the feed-forward in tiles
    python recipes/bench/step_traffic.py --model Qwen/Qwen2.5-1.5B-Instruct

"Elementwise" is everything but matmuls, attention, the loss and the optimizer: norms, rotations, gates, sums
and copies. counting.py says what a count is: no cache between two kernels, and no time.

Time: a minute on one core. Left out on purpose: what cuBLAS reads more than once.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from counting import Count, Counter

from kit.config import Checked, parse
from kit.memory.simulate import fake_batch, fake_model
from kit.models.loading import load_config
from kit.train.savings import Savings
from kit.train.step import TrainingStep

MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "kit::add_matmul_"}
LAYERS = {"kit::rms_norm", "kit::rms_norm_backward", "kit::rope", "kit::rope_backward"}
LAYERS |= {"kit::glu", "kit::glu_backward_"}  # our kernels that count as elementwise


@dataclass(frozen=True)
class Config(Checked):
    model: str = "google/gemma-3-1b-it"  # one whose config ships with the kit, or a folder
    row_tokens: int = 16_384  # tokens of the step's only row [>= 1]
    tile_tokens: int = 0  # tokens of the feed-forward at one time; 0 = all [>= 0]


def count_step(config: Config) -> dict[str, Count]:
    """Return group -> what it loads, stores, multiplies and launches in one step."""
    model, mode = fake_model(load_config(config.model), 0)
    with mode:
        step = TrainingStep(model, Savings(tile_tokens=config.tile_tokens), lr=1e-5)
        with Counter() as counter:
            step([fake_batch(config.row_tokens)], None)
        step.close()
    return grouped(counter.by_operator)


def grouped(by_operator: Mapping[str, Count]) -> dict[str, Count]:
    groups = {"matmuls": Count(), "elementwise": Count(), "attention, loss, optimizer": Count()}
    for name, count in by_operator.items():
        elementwise = name in LAYERS or not name.startswith("kit::")
        group = "matmuls" if name in MATMULS else "elementwise" if elementwise else [*groups][-1]
        groups[group] += count
    return groups


def main(config: Config) -> None:
    groups = count_step(config)
    print(f"{config.model}, {config.row_tokens:,} tokens, tiles of {config.tile_tokens:,} (counted)")
    for name, count in (groups | {"in all": sum(groups.values(), Count())}).items():
        print(f"  {name:<28}{count.bytes / 1e9:8.1f} GB {count.launches:8,} launches")


if __name__ == "__main__":
    main(parse(Config))
