"""What one training step moves and launches, against bars: a layer that falls apart into operators fails."""

import math

import pytest
from counting import Count
from step_traffic import Config, count_step, grouped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "tile_tokens", "most_gb", "most_launches"),
    [
        ("google/gemma-3-1b-it", 0, 175, 4_000),
        ("Qwen/Qwen2.5-1.5B-Instruct", 0, 200, 3_600),
        ("google/gemma-3-1b-it", 2_048, math.inf, 14_000),
        ("Qwen/Qwen2.5-1.5B-Instruct", 2_048, math.inf, 14_000),
    ],
)
def test_a_step_of_16384_tokens_stays_below_its_bars(model, tile_tokens, most_gb, most_launches):
    groups = count_step(Config(model=model, tile_tokens=tile_tokens))
    assert groups["elementwise"].bytes <= most_gb * 1e9
    assert sum(groups.values(), Count()).launches <= most_launches


def test_every_operator_is_in_one_group_and_unknown_ones_are_elementwise():
    one = Count(launches=1, bytes_loaded=1)
    names = ["aten::mm", "aten::add", "kit::glu", "kit::packed_attention", "aten::something_new"]
    groups = grouped(dict.fromkeys(names, one))
    launches = {name: count.launches for name, count in groups.items()}
    assert launches == {"matmuls": 1, "elementwise": 3, "attention, loss, optimizer": 1}
