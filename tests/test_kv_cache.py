import pytest
import torch
from conftest import WINDOW, make_model

from kit.generate import SamplingParams, generate
from kit.kv_cache import SlotCache, cache_bytes


@pytest.mark.parametrize("capacity", [WINDOW - 2, WINDOW, WINDOW + 30])
def test_cache_bytes_counts_what_the_cache_holds_and_sliding_layers_hold_their_window(tiny_model, capacity):
    cache = SlotCache(tiny_model, 3, capacity)
    assert cache_bytes(tiny_model, 3, capacity) == sum(x.untyped_storage().nbytes() for x in (*cache.keys, *cache.values))
    kinds = getattr(tiny_model.config, "layer_types", None) or ["full_attention"] * 4
    expected = [min(capacity, WINDOW) if kind == "sliding_attention" else capacity for kind in kinds]
    assert [keys.shape[2] for keys in cache.keys] == [values.shape[2] for values in cache.values] == expected


@pytest.mark.parametrize("longest", [WINDOW, WINDOW + 1, 19])
def test_a_ring_sees_its_window_whatever_the_row_and_never_what_is_not_written(longest):
    """Against a plain list: write positions 0, 1, 2, ... and remember the last WINDOW of them."""
    model = make_model("gemma3")
    cache = SlotCache(model, 2, 40)
    starts = torch.tensor([3, longest])
    states = torch.arange(float(longest)).repeat(2, 1)[:, None, :, None].expand(2, 1, longest, 16)
    cache.at_prefill(torch.tensor([0, 1]), starts, torch.tensor([0, 1]))
    for layer in range(4):
        cache.update(states, -states, layer)
    for step in range(20):
        positions = starts + step
        masks = cache.at_decode(positions, 40)
        for layer, kind in enumerate(model.config.layer_types):
            new = positions.float()[:, None, None, None].expand(2, 1, 1, 16)
            keys, values = cache.update(new, -new, layer)
            for row in range(2):
                seen = masks[kind][row, 0, 0] == 0
                now = int(positions[row])
                first = max(0, now - WINDOW + 1) if kind == "sliding_attention" else 0
                assert sorted(keys[row, 0, seen, 0].tolist()) == list(range(first, now + 1))
                assert torch.equal(values, -keys)


def test_attention_looks_at_no_more_places_than_the_length_asked_for():
    cache = SlotCache(make_model("gemma3"), 2, 40)
    masks = cache.at_decode(torch.tensor([2, 4]), 5)
    assert masks["full_attention"].shape == masks["sliding_attention"].shape == (2, 1, 1, 5)
    state = torch.zeros(2, 1, 1, 16)
    assert cache.update(state, state, 0)[0].shape == (2, 1, 5, 16)
    masks = cache.at_decode(torch.tensor([2, 30]), 35)
    assert masks["full_attention"].shape[-1] == 35
    assert masks["sliding_attention"].shape[-1] == WINDOW


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_a_row_held_before_is_never_seen(family):
    """Rows are refilled and moved while the keys of others still lie there."""
    model = make_model(family)
    params = SamplingParams(temperature=0, max_new_tokens=25)
    torch.manual_seed(1)
    prompts = [torch.randint(3, 97, (n,)).tolist() for n in (30, 2, 17, 3, 1, 9)]
    alone = [generate(model, [p], params, num_slots=1, seed=0, eos_token_id=range(2, 20))[0].ids for p in prompts]
    assert len({len(ids) for ids in alone}) > 2  # rows end at different times
    together = generate(model, prompts, params, num_slots=2, seed=0, eos_token_id=range(2, 20))
    assert [completion.ids for completion in together] == alone
