import math

import pytest
import torch
from conftest import WINDOW, make_model

from kit.generate.kv_cache import SlotCache, cache_bytes
from kit.generate.sampler import generate
from kit.generate.sampling import SamplingParams


@pytest.mark.parametrize("capacity", [WINDOW - 2, WINDOW, WINDOW + 30])
def test_cache_bytes_counts_what_the_cache_holds_and_sliding_layers_hold_their_window(tiny_model, capacity):
    cache = SlotCache(tiny_model, 3, capacity)
    assert cache_bytes(tiny_model, 3, capacity) == sum(
        x.untyped_storage().nbytes() for x in (*cache.keys, *cache.values)
    )
    kinds = getattr(tiny_model.config, "layer_types", None) or ["full_attention"] * 4
    expected = [min(capacity, WINDOW) if kind == "sliding_attention" else capacity for kind in kinds]
    assert [keys.shape[2] for keys in cache.keys] == [values.shape[2] for values in cache.values] == expected


def seen_by_row(cache, layer):
    """For each row the keys that its query sees, and their values."""
    for keys, values, mask in zip(*cache.rows(layer), strict=True):
        seen = mask[0, 0] == 0
        yield sorted(keys[0, seen, 0].tolist()), values[0, seen, 0].neg().sort().values.tolist()


@pytest.mark.parametrize("longest", [WINDOW, WINDOW + 1, 19])
def test_a_ring_sees_its_window_whatever_the_row_and_never_what_is_not_written(longest):
    """Against a plain list: write positions 0, 1, 2, ... and remember the last WINDOW of them."""
    model = make_model("gemma3")
    cache = SlotCache(model, 2, 40)
    starts = torch.tensor([3, longest])
    states = torch.cat([torch.arange(3.0), torch.arange(float(longest))])
    states = states[:, None, None].expand(-1, 1, 16)
    cache.at_prefill([0, 1], [0, 3], starts.tolist())
    for layer in range(4):
        cache.store(layer, states, -states)
    for step in range(20):
        positions = starts + step
        cache.at_decode(positions, max(positions.tolist()))
        for layer, kind in enumerate(model.config.layer_types):
            new = positions.float()[:, None, None].expand(2, 1, 16)
            cache.write(layer, new, -new)
            window = WINDOW if kind == "sliding_attention" else 100
            held = [list(range(max(0, now - window + 1), now + 1)) for now in positions.tolist()]
            assert list(seen_by_row(cache, layer)) == [(row, row) for row in held]


def test_attention_reads_no_further_than_the_longest_row_and_than_the_window_of_sliding_layers():
    model = make_model("gemma3")
    full, sliding = (model.config.layer_types.index(kind) for kind in ("full_attention", "sliding_attention"))
    cache = SlotCache(model, 3, 200)
    for positions, places in (([2, 170, 165], 176), ([15], 16), ([199], 200)):  # multiples of 16 in the cache
        cache.at_decode(torch.tensor(positions), max(positions))
        shapes = [[len(x), x.shape[2]] for x in cache.rows(full)[:2]]
        assert shapes == [[len(positions), places]] * 2
        assert cache.rows(sliding)[0].shape[2] == WINDOW


@pytest.fixture
def garbage():
    """New memory is NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_garbage_in_places_that_were_never_written_reaches_nothing(family, garbage):
    """Short prompts beside long ones, refilled rows, rings that are not full yet."""
    model = make_model(family)
    # 90: longer than any before, beside a row in progress
    prompts = [[5] * n for n in (2, 30, 1, WINDOW, 17, 90, 3)]
    params = SamplingParams(max_new_tokens=20)
    found = generate(model, prompts, params, num_slots=2, seed=0, eos_token_id=range(2, 12))
    torch.use_deterministic_algorithms(False)
    expected = generate(model, prompts, params, num_slots=2, seed=0, eos_token_id=range(2, 12))
    assert found == expected
    assert all(math.isfinite(logprob) for completion in found for logprob in completion.logprobs)


def test_places_beyond_the_longest_row_stay_as_they_were_and_so_take_no_memory_on_a_cpu(garbage):
    cache = SlotCache(make_model("llama"), 3, 500)
    cache.at_prefill([2], [0], [5])
    cache.store(0, torch.ones(5, 2, 8), torch.ones(5, 2, 8))
    cache.at_decode(torch.tensor([7, 40]), 40)
    cache.move(torch.tensor([2]), torch.tensor([0]), 45)
    for tensor in (*cache.keys, *cache.values):
        assert not tensor[:, :, :48].isnan().any() and tensor[:, :, 48:].isnan().all()
    assert (cache.keys[0][2, :, :5] == 1).all()  # what a row held when others grew

    cache.keys[0][2, :, 48:] = 1
    cache.move(torch.tensor([2]), torch.tensor([0]), 48)
    assert cache.keys[0][0, :, 48:].isnan().all()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_a_row_held_before_is_never_seen(family):
    """Rows are refilled and moved while the keys of others still lie there."""
    model = make_model(family)
    params = SamplingParams(temperature=0, max_new_tokens=25)
    torch.manual_seed(1)
    # 90: beside a shorter row in progress
    prompts = [torch.randint(3, 97, (n,)).tolist() for n in (30, 2, 17, 3, 1, 90, 9)]
    options = {"seed": 0, "eos_token_id": range(2, 20)}
    alone = [generate(model, [prompt], params, num_slots=1, **options)[0].ids for prompt in prompts]
    assert len({len(ids) for ids in alone}) > 2  # rows end at different times
    together = generate(model, prompts, params, num_slots=2, **options)
    assert [completion.ids for completion in together] == alone
