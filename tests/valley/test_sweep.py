"""The table, the grid of cells and their names."""

import pytest

from kit.valley.sweep import (
    FIXED_BATCH,
    MODELS,
    PAPER,
    TABLE,
    Cell,
    Grid,
    parse_models,
    parse_numbers,
    read_sweep,
    rl_name,
    schedule,
    short_name,
    write_sweep,
)


def test_the_table_is_the_papers_and_gives_its_number_of_optimizer_steps():
    assert [(row.traces, row.epochs, row.batch_traces) for row in TABLE] == [
        (8_000, 4, 8), (16_000, 4, 16), (32_000, 4, 32), (64_000, 3, 64), (128_000, 3, 128), (220_000, 2, 128),
    ]  # fmt: skip
    assert [row.steps for row in TABLE] == [4_000, 4_000, 4_000, 3_000, 3_000, 3_437]


def test_a_size_outside_the_table_continues_its_rule_and_one_inside_is_its_row():
    assert all(schedule(row.traces) is row for row in TABLE)
    found = {
        size: (schedule(size).epochs, schedule(size).batch_traces)
        for size in (1, 500, 2_000, 100_000, 225_000)
    }
    assert found == {1: (4, 1), 500: (4, 1), 2_000: (4, 2), 100_000: (3, 100), 225_000: (2, 128)}
    for row in TABLE:  # so the rule is the table's
        assert row.batch_traces == min(row.traces // 1_000, 128)


def test_every_number_of_the_paper_is_of_a_model_and_size_that_a_sweep_can_have():
    names = {short_name(model).lower() for model in MODELS}
    assert {name for name, _ in PAPER} <= names
    assert {size for _, size in PAPER} <= {0, *(row.traces for row in TABLE)}
    assert {key: said for key, said in PAPER.items() if said.isdigit()} == {
        ("gemma-3-1b-it", 0): "24", ("gemma-3-1b-it", 220_000): "15",
        ("qwen2.5-0.5b-instruct", 0): "14", ("qwen2.5-0.5b-instruct", 220_000): "11",
    }  # fmt: skip


def test_the_grid_is_every_model_with_its_methods_and_sizes_seed_by_seed():
    cells = Grid((("a/x", ("full", "qlora")), ("b/y", ("qlora",))), (500, 8_000), seeds=2).cells()
    assert [cell.seed for cell in cells] == [0] * 6 + [1] * 6
    assert [cell.name for cell in cells[:6]] == [
        "x-full-500-seed0", "x-full-8000-seed0", "x-qlora-500-seed0", "x-qlora-8000-seed0",
        "y-qlora-500-seed0", "y-qlora-8000-seed0",
    ]  # fmt: skip
    assert len({cell.name for cell in cells}) == len(cells)
    assert len({cell.baseline for cell in cells}) == 4  # one a model and seed, whatever the method
    assert cells[1] == Cell("a/x", "full", 8_000, 0, epochs=4, batch_traces=8)


def test_the_control_arm_has_one_batch_at_every_size_and_repeats_no_cell_of_the_table():
    cells = Grid((("x", ("full",)),), tuple(row.traces for row in TABLE), fixed_batch=128).cells()
    fixed = [cell for cell in cells if cell.arm == FIXED_BATCH]
    assert [(cell.num_traces, cell.batch_traces, cell.epochs) for cell in fixed] == [
        (8_000, 128, 4), (16_000, 128, 4), (32_000, 128, 4), (64_000, 128, 3),
    ]  # fmt: skip
    assert fixed[0].name == "x-full-8000-batch128-seed0"
    assert len({cell.name for cell in cells}) == len(cells) == 10
    assert rl_name("x", "full", 8_000, 0) == cells[0].name  # the folder RL takes its start from


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": ()}, "models is .* one or more"),
        ({"models": (("a/x", ("full",)), ("b/x", ("full",)))}, r"a name of its own \(x\)"),
        ({"models": (("x", ("fool",)),)}, "methods of x are fool; pass full, qlora"),
        ({"models": (("x", ("full", "full")),)}, "each once"),
        ({"sizes": ()}, "sizes is"),
        ({"sizes": (500, 500)}, "larger than the one before"),
        ({"sizes": (0, 500)}, "larger than the one before"),
        ({"seeds": 0}, "seeds is 0"),
        ({"fixed_batch": -1}, "fixed_batch is -1"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Grid(**{"models": (("x", ("full",)),), "sizes": (500,)} | arguments)


def test_models_name_their_own_methods_or_take_the_common_ones():
    assert parse_models("a/x, b/y=qlora,/z/c=full+qlora,", "full") == (
        ("a/x", ("full",)), ("b/y", ("qlora",)), ("/z/c", ("full", "qlora")),
    )  # fmt: skip
    assert parse_numbers("sizes", "8, 16,") == (8, 16) and parse_numbers("sizes", "") == ()
    with pytest.raises(ValueError, match="sizes is '8k' but must be whole numbers"):
        parse_numbers("sizes", "8k")


def test_what_differs_from_the_papers_cells_is_told():
    told = "\n".join(Grid((("a/x", ("qlora",)),), (500, 8_000), fixed_batch=4).deviations(16))
    for text in (
        "500 traces, which the paper lacks",
        "without 16,000, 32,000,",
        "QLoRA of rank 16 for x",
        "4 traces per step",
    ):
        assert text in told
    assert Grid((("x", ("full",)),), tuple(row.traces for row in TABLE)).deviations(16) == []


def test_a_sweep_is_read_back_as_it_was_written(tmp_path):
    cells = Grid((("x", ("full",)),), (500, 8_000), fixed_batch=4).cells()
    write_sweep(tmp_path, cells, ["lr 1 (paper: 2)"], (0, 500))
    assert read_sweep(tmp_path) == (cells, ["lr 1 (paper: 2)"], [0, 500])
    with pytest.raises(ValueError, match="holds no sweep"):
        read_sweep(tmp_path / "other")
