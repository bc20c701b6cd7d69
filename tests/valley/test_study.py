"""The table, the arms, the grid of cells and their names."""

from dataclasses import replace

import pytest

from kit.paper import ACCURACY, MODELS, TABLE, Row, stars
from kit.recipes import valley_demo, valley_sweep
from kit.valley.study import (
    ARMS,
    BASE,
    FIXED_BATCH,
    Cell,
    Study,
    parse_models,
    parse_numbers,
    ranks_of,
    short_name,
)

SIZES = tuple(row.traces for row in TABLE)
ONE = (("x", ("full",)),)
TOY = Study(
    (("tiny", ("full",)), ("tinier", ("full",))),
    (16, 64, 256, 1_024, 4_096),
    seeds=2,
    arms=("long", "short", "growing"),
    control_sizes=(64, 1_024, 4_096),
    control_models=1,
    epochs=4,
    grows=False,
    batch_traces=16,
    min_batch=4,
    steps_per_epoch=256,
)


def test_the_table_is_the_papers_and_gives_its_number_of_optimizer_steps():
    assert [(row.traces, row.epochs, row.batch_traces) for row in TABLE] == [
        (8_000, 4, 8),
        (16_000, 4, 16),
        (32_000, 4, 32),
        (64_000, 3, 64),
        (128_000, 3, 128),
        (220_000, 2, 128),
    ]
    assert [row.steps for row in TABLE] == [4_000, 4_000, 4_000, 3_000, 3_000, 3_437]


def test_a_size_outside_the_table_continues_its_rule_and_one_inside_is_its_row():
    study = Study(ONE, SIZES)
    for row in TABLE:
        assert (Row.of(row.traces).epochs, study.batch_of("long", row.traces)) == (
            row.epochs,
            row.batch_traces,
        )
    found = {
        size: (Row.of(size).epochs, study.batch_of("long", size))
        for size in (1, 500, 2_000, 100_000, 225_000)
    }
    assert found == {1: (4, 1), 500: (4, 1), 2_000: (4, 2), 100_000: (3, 100), 225_000: (2, 128)}


def test_every_number_of_the_paper_is_of_a_model_and_size_that_a_sweep_can_have():
    names = {short_name(model).lower() for model in MODELS}
    assert {name for name, _ in ACCURACY} <= names
    assert {size for _, size in ACCURACY} <= {0, *(row.traces for row in TABLE)}
    assert {name: found for name in names if (found := stars(name))} == {
        "gemma-3-1b-it": {0: 24.0, 220_000: 15.0},
        "qwen2.5-0.5b-instruct": {0: 14.0, 220_000: 11.0},
    }


def test_the_cells_are_every_model_with_its_methods_and_sizes_seed_by_seed():
    study = Study((("a/x", ("full", "qlora")), ("b/y", ("qlora",))), (500, 8_000), seeds=2)
    cells = study.cells()
    assert [cell.seed for cell in cells] == [0] * 6 + [1] * 6
    assert [cell.name for cell in cells[:6]] == [
        "x-full-500-seed0",
        "x-full-8000-seed0",
        "x-qlora-500-seed0",
        "x-qlora-8000-seed0",
        "y-qlora-500-seed0",
        "y-qlora-8000-seed0",
    ]
    assert len({cell.name for cell in cells}) == len(cells)
    assert len({cell.baseline for cell in cells}) == 4  # one per model and seed, whatever the method
    assert cells[1] == Cell("a/x", "full", 8_000, 0, epochs=4, batch_traces=8)
    base = Cell.of_base("a/x", 0)
    assert base.name == cells[1].baseline == "x-full-0-seed0" and base.arm == BASE


def test_the_control_arm_has_one_batch_at_every_size_and_repeats_no_cell_of_the_table():
    cells = Study(ONE, SIZES, arms=("long", FIXED_BATCH), batch_traces=128).cells()
    fixed = [cell for cell in cells if cell.arm == FIXED_BATCH]
    assert [(cell.num_traces, cell.batch_traces, cell.epochs) for cell in fixed] == [
        (8_000, 128, 4),
        (16_000, 128, 4),
        (32_000, 128, 4),
        (64_000, 128, 3),
    ]
    assert fixed[0].name == "x-full-8000-fixed-seed0"
    assert len({cell.name for cell in cells}) == len(cells) == 10


def test_the_batch_is_the_same_at_every_size_or_grows_with_the_data_so_that_the_steps_stay():
    sizes = (16, 64, 256, 1_024, 4_096, 16_384)
    assert {TOY.batch_of("long", size) for size in sizes} == {16}
    assert [TOY.batch_of("growing", size) for size in sizes] == [4, 4, 4, 4, 16, 64]
    assert {4 * size // TOY.batch_of("growing", size) for size in sizes[3:]} == {4 * 256}
    paper = replace(TOY, grows=True)
    assert paper.batch_of("long", 16_384) == paper.batch_of("short", 16_384) == 64
    assert paper.batch_of("fixed", 16_384) == 16


def test_the_growing_batch_repeats_no_cell_of_the_long_arm_and_other_models_have_the_first_arm_alone():
    cells = TOY.cells()
    growing = [cell for cell in cells if cell.arm == "growing" and cell.seed == 1]
    assert [(cell.num_traces, cell.batch_traces) for cell in growing] == [(64, 4), (1_024, 4)]
    assert growing[0].name == "tiny-full-64-growing-seed1" and len({cell.name for cell in cells}) == len(
        cells
    )
    # one seed's picture is whole first
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert [cell.num_traces for cell in cells if (cell.arm, cell.seed) == ("short", 0)] == [64, 1_024, 4_096]
    assert {cell.arm for cell in cells if cell.model == "tinier"} == {"long"} and TOY.compared == ["tiny"]


def test_every_arm_can_be_had_with_the_papers_batch():
    cells = Study(ONE, (8_000, 220_000), arms=tuple(ARMS), batch_traces=16).cells()
    assert {cell.arm for cell in cells} == {*ARMS} - {"growing"}  # which is what the paper's long arm does
    assert {cell.batch_traces for cell in cells if cell.num_traces == 220_000 and cell.arm != "fixed"} == {
        128
    }
    assert all(cell.epochs == (4 if cell.num_traces == 8_000 else 2) for cell in cells)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": ()}, "models is .* one or more"),
        ({"models": (("a/x", ("full",)), ("b/x", ("full",)))}, "models is .* each with a name of its own"),
        ({"models": (("x", ("fool",)),)}, "methods of x are fool; pass full, qlora"),
        ({"models": (("x", ("full", "full")),)}, "each once"),
        ({"arms": ("long", "shrot")}, "there is no arm 'shrot'; the arms are long, short"),
        ({"arms": ()}, "arms is .* one or more"),
        ({"arms": ("long", "long")}, "arms is .* each once"),
        ({"sizes": ()}, "sizes is"),
        ({"sizes": (500, 500)}, "sizes is .* larger than the one before"),
        ({"sizes": (0, 500)}, "larger than the one before"),
        ({"control_sizes": (64, 16)}, "control_sizes is .* larger than the one before"),
        ({"seeds": 0}, "seeds is 0"),
        ({"batch_traces": -1}, "batch_traces is -1"),
    ],
)
def test_a_study_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Study(**{"models": ONE, "sizes": (500,)} | arguments)


def test_models_name_their_own_methods_or_take_the_common_ones():
    assert parse_models("a/x, b/y=qlora,/z/c=full+qlora,", "full") == (
        ("a/x", ("full",)),
        ("b/y", ("qlora",)),
        ("/z/c", ("full", "qlora")),
    )
    assert parse_numbers("8, 16,") == (8, 16) and parse_numbers("") == ()
    for recipe in (valley_demo, valley_sweep):
        for settings in ({"sizes": "8,8k"}, {"control_sizes": "8k"}, {"workers": -1}):
            with pytest.raises(ValueError, match=f"{next(iter(settings))} is .*must be .*"):
                recipe.Config(**settings)


def test_what_differs_from_the_papers_cells_is_listed():
    study = Study((("a/x", ("qlora",)),), (500, 8_000), arms=("long", "mixed", FIXED_BATCH), batch_traces=4)
    listed = "\n".join(study.deviations(16))
    for text in (
        "500 traces, which the paper lacks",
        "without 16,000, 32,000,",
        "4 traces per step",
        "training sets of its own: half short, half long",
    ):
        assert text in listed
    assert Study(ONE, SIZES).deviations(16) == []
    both = Study((("a/x", ("full",)), ("b/y", ("qlora",))), SIZES)
    assert both.deviations(16) == ["QLoRA of rank 16 for y (paper: all parameters)"]


def test_lora_beside_qlora_separates_low_rank_from_four_bits():
    study = Study((("a/x", ("full", "lora", "qlora")),), (500,))
    assert [cell.name for cell in study.cells()] == [
        "x-full-500-seed0",
        "x-lora-500-seed0",
        "x-qlora-500-seed0",
    ]
    assert [cell.curve for cell in study.cells()] == [
        "long traces",
        "long traces, LoRA",
        "long traces, QLoRA",
    ]
    assert {cell.baseline for cell in study.cells()} == {"x-full-0-seed0"}
    assert ranks_of("lora", 16) == {"qlora_rank": 0, "lora_rank": 16}
    assert ranks_of("qlora", 16) == {"qlora_rank": 16, "lora_rank": 0}
    assert not any(ranks_of("full", 16).values())
    for title in ("LoRA", "QLoRA"):
        assert f"{title} of rank 16 for x (paper: all parameters)" in study.deviations(16)
