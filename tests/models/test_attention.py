import sys
import types

import pytest
import torch
from conftest import FAMILIES, make_model, random_documents

from kit.kernels.packed_attention import packed_attention_reference
from kit.models import attention, load
from kit.models.attention import CHOICES, attention_name
from kit.models.backbone import hidden_states
from kit.packing import PackedBatch

CPU = {"device": "cpu", "dtype": torch.float32}
LENGTHS = [9, 1, 23, 4]


def test_on_a_cpu_auto_is_ours_and_flash_attn_is_refused_with_the_reason():
    assert attention_name("auto", **CPU) == "kit"
    with pytest.raises(ValueError, match=r"attention is flash-attn but it .* pass --attention kit"):
        attention_name("flash-attn", **CPU)
    with pytest.raises(ValueError, match=r"attention is 'eager'; pass one of auto, kit, flash-attn, torch"):
        attention_name("eager", **CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_that_runs_here_gives_a_pack_the_same_hidden_states(family):
    batch = PackedBatch.build(random_documents(LENGTHS))
    model = make_model(family, torch.float64)
    states = []
    for choice in ("kit", "torch"):
        model.set_attn_implementation(attention_name(choice, **CPU))
        states.append(hidden_states(model, batch))
    torch.testing.assert_close(*states, rtol=1e-12, atol=1e-12)


def test_load_switches_the_model_to_the_attention_it_was_asked_for():
    loaded = [load("tiny", device="cpu", attention=choice)[0] for choice in ("kit", "torch")]
    assert [model.config._attn_implementation for model in loaded] == ["kit", "kit_torch"]
    with pytest.raises(ValueError, match="flash-attn"):
        load("tiny", device="cpu", attention="flash-attn")


def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size):
    """Compute what flash-attn documents: query i sees key j if i - left <= j <= i + right, -1 = no limit."""
    left, right = window_size
    assert causal and right in (-1, 0) and torch.equal(cu_q, cu_k) and max_q == max_k == max(LENGTHS)
    return packed_attention_reference(
        q, k, v, cu_q, max_q, window=None if left == -1 else left + 1, scale=softmax_scale
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_flash_attn_is_called_with_means_the_same_as_ours(family, monkeypatch):
    """The package needs a card, so a function with its documented meaning stands in for it."""
    package = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    batch = PackedBatch.build(random_documents(LENGTHS))
    model = make_model(family, torch.float64)
    ours = hidden_states(model, batch)
    model.set_attn_implementation(attention.REGISTERED["flash-attn"])
    torch.testing.assert_close(hidden_states(model, batch), ours, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "reason"),
    [
        ((8, 9), torch.bfloat16, 256, ""),
        ((8, 9), torch.float32, 64, "float16 or bfloat16"),
        ((8, 9), torch.float16, 288, "at most 256 wide and the model's are 288"),
        ((7, 5), torch.float16, 64, "compute capability 8.0"),
    ],
)
def test_flash_attn_is_chosen_only_if_it_can_run_the_model(capability, dtype, head_dim, reason, monkeypatch):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = types.SimpleNamespace(head_dim=head_dim)
    assert attention_name("auto", config, device="cuda", dtype=dtype) == ("kit" if reason else "kit_varlen")
    if reason:
        with pytest.raises(ValueError, match=reason):
            attention_name("flash-attn", config, device="cuda", dtype=dtype)


def test_every_choice_is_explained_where_a_person_looks():
    assert all(f"\n    {choice} " in attention.__doc__ for choice in CHOICES)
