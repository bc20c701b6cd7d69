import types

import pytest
import torch
import torch.nn.attention.varlen
from conftest import FAMILIES, make_model, random_documents

from kit.kernels.packed_attention import packed_attention_reference
from kit.models import attention, load
from kit.models.attention import CHOICES, attention_name
from kit.models.backbone import hidden_states
from kit.packing import PackedBatch

CPU = {"device": "cpu", "dtype": torch.float32}
LENGTHS = [9, 1, 23, 4]


def test_on_a_cpu_auto_is_ours_and_varlen_is_refused_with_the_reason():
    assert attention_name("auto", **CPU) == "kit"
    with pytest.raises(ValueError, match=r"attention is varlen but it .* is on cpu; pass --attention kit"):
        attention_name("varlen", **CPU)
    with pytest.raises(ValueError, match=r"attention is 'eager'; pass one of auto, kit, varlen, torch"):
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
    with pytest.raises(ValueError, match="attention is varlen"):
        load("tiny", device="cpu", attention="varlen")


def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """Compute what torch documents: query i sees key j if i - left <= j <= i + right, -1 = no limit."""
    left, right = window_size
    assert enable_gqa and right == 0 and torch.equal(cu_q, cu_k) and max_q == max_k == max(LENGTHS)
    assert cu_q.dtype == torch.int32
    return packed_attention_reference(
        q, k, v, cu_q, max_q, window=None if left == -1 else left + 1, scale=scale
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_varlen_is_called_with_means_the_same_as_ours(family, monkeypatch):
    """It needs a card, so a function with its documented meaning stands in for it."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    batch = PackedBatch.build(random_documents(LENGTHS))
    model = make_model(family, torch.float64)
    ours = hidden_states(model, batch)
    model.set_attn_implementation(attention.REGISTERED["varlen"])
    torch.testing.assert_close(hidden_states(model, batch), ours, rtol=1e-12, atol=1e-12)


@pytest.fixture
def card(monkeypatch):
    """A function that pretends a card of this capability is here."""

    def pretend(capability=(8, 9)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)

    return pretend


def older_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    """Have the parameters that torch 2.10 documents."""


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "reason"),
    [
        ((8, 9), torch.bfloat16, 256, ""),
        ((8, 9), torch.float32, 64, "float16 or bfloat16"),
        ((8, 9), torch.float16, 288, "up to 256 wide and the model's are 288"),
        ((8, 9), torch.float16, 100, "multiples of 8 .* the model's are 100"),
        ((7, 5), torch.float16, 64, "compute capability 8.0"),
    ],
)
def test_varlen_is_refused_with_the_reason_if_it_cannot_run_the_model(
    card, capability, dtype, head_dim, reason
):
    card(capability)
    where = {"device": "cuda", "dtype": dtype}
    config = types.SimpleNamespace(head_dim=head_dim)
    assert attention_name("auto", config, **where) == "kit"
    if not reason:
        assert attention_name("varlen", config, **where) == "kit_varlen"
        return
    with pytest.raises(ValueError, match=f"attention is varlen but .*{reason}"):
        attention_name("varlen", config, **where)


def test_varlen_of_an_older_torch_or_of_one_without_it_is_refused(card, monkeypatch):
    card()
    where = {"device": "cuda", "dtype": torch.bfloat16}
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.attention.varlen, "varlen_attn", older_varlen_attn)
        with pytest.raises(
            ValueError, match=r"lacks scale, window_size, enable_gqa \(pip install 'torch>=2.12'"
        ):
            attention_name("varlen", **where)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    with pytest.raises(ValueError, match="built without FlashAttention"):
        attention_name("varlen", **where)


def test_every_choice_is_explained_where_a_person_looks():
    assert all(f"\n    {choice} " in attention.__doc__ for choice in CHOICES)
