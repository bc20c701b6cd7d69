import math
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kit.packing import IGNORE_INDEX, Document, PackedBatch, fill, plan_packs, plan_steps

LENGTHS = st.lists(st.integers(1, 300) | st.integers(1, 4), max_size=60)  # short documents fill the last gaps


@settings(deadline=None)
@given(LENGTHS, st.integers(300, 700), st.integers(0, 3))
def test_every_document_is_packed_once_and_no_pack_is_over_capacity(lengths, capacity, seed):
    packs = plan_packs(lengths, capacity, seed=seed)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in pack) <= capacity for pack in packs)


def best_fit_decreasing(lengths, capacity):
    """Return the number of rows that the textbook's loop over all open rows needs."""
    free = []
    for length in sorted(lengths, reverse=True):
        room = [space for space in free if space >= length]
        if room:
            free.remove(min(room))
            free.append(min(room) - length)
        else:
            free.append(capacity - length)
    return len(free)


@settings(deadline=None)
@given(LENGTHS, st.integers(300, 700))
@example([299, 1], 300)
def test_uses_as_many_rows_as_the_textbook_best_fit_decreasing(lengths, capacity):
    assert len(plan_packs(lengths, capacity)) == best_fit_decreasing(lengths, capacity)


def test_the_benchmark_lengths_fill_at_least_99_5_percent():
    rng = random.Random(0)
    lengths = [min(16_384, max(1, round(rng.lognormvariate(math.log(4096), 0.8)))) for _ in range(100_000)]
    assert fill(plan_packs(lengths, 16_384), lengths, 16_384) >= 0.995


def test_a_plan_depends_on_lengths_and_seed_only():
    lengths = [random.Random(1).randint(1, 50) for _ in range(40)]
    assert plan_packs(lengths, 60, seed=3) == plan_packs(torch.tensor(lengths), 60, seed=3)
    assert plan_packs(lengths, 60, seed=3) != plan_packs(lengths, 60, seed=4)


@pytest.mark.parametrize("length", [0, 61])
def test_a_length_outside_the_row_is_refused_with_both_numbers(length):
    with pytest.raises(ValueError, match=f"document 1 has {length} tokens but a row holds 1 to 60"):
        plan_packs([3, length], 60)


def test_no_documents_make_no_packs():
    assert plan_packs([], 10) == []
    assert fill([], [], 10) == 1.0


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), max_size=50), st.integers(1, 12))
def test_steps_keep_every_row_in_order_and_the_papers_number_of_steps(sizes, batch_traces):
    packs = [[0] * size for size in sizes]
    steps = plan_steps(packs, batch_traces)
    assert [row for step in steps for row in step] == list(range(len(packs)))
    assert all(steps)
    assert len(steps) <= math.ceil(sum(sizes) / batch_traces)
    # the last step may end early; each other one is at most one row late
    if sizes and max(sizes) <= batch_traces:
        assert len(steps) >= sum(sizes) // batch_traces


def test_eight_thousand_traces_in_batches_of_eight_are_a_thousand_steps():
    packs = [[0] * (2 + i % 3) for i in range(2667)]
    assert sum(map(len, packs)) == 8001
    assert len(plan_steps(packs, 8)) == 1000


def test_targets_are_the_next_token_of_the_same_document_and_only_of_the_response():
    batch = PackedBatch.build(
        [
            Document(torch.tensor([5, 6, 7, 8]), 2),
            Document(torch.tensor([9]), 0),
            Document(torch.tensor([3, 4]), 0),
        ]
    )
    i = IGNORE_INDEX
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 3, 4]
    assert batch.targets.tolist() == [i, 7, 8, i, i, 4, i]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 7]
    dtypes = [getattr(batch, name).dtype for name in PackedBatch.TENSORS]
    assert dtypes == [torch.int32, torch.int64, torch.int32, torch.int32]
    assert (batch.max_seqlen, batch.num_documents, batch.num_targets, len(batch)) == (4, 3, 3, 7)
    moved = batch.to("cpu")
    assert torch.equal(moved.targets, batch.targets)
    assert moved.max_seqlen == 4


@pytest.mark.parametrize("documents", [[], [Document(torch.tensor([], dtype=torch.int64), 0)]])
def test_a_pack_of_nothing_is_refused(documents):
    with pytest.raises(ValueError, match="at least one token"):
        PackedBatch.build(documents)
