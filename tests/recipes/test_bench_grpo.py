"""The start of the race against TRL."""

from pathlib import Path

import pytest
import torch

from kit.models import load
from kit.models.backbone import head_weight, hidden_states
from kit.packing import Document, PackedBatch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import grpo

    return grpo


def logits(model):
    torch.manual_seed(3)
    batch = PackedBatch.build([Document(torch.randint(3, 67, (n,)), 1) for n in (11, 1, 40)])
    return hidden_states(model, batch) @ head_weight(model).T


@pytest.mark.parametrize(
    ("hidden_size", "num_layers", "parameters"), [(96, 3, 366_528), (120, 4, 757_920), (264, 5, 4_550_832)]
)
def test_a_grown_model_computes_the_same_and_learns_everywhere(bench, hidden_size, num_layers, parameters):
    model, _ = load("tiny", device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * parameter.std() * torch.randn_like(parameter)
    grown = bench.grown(model, hidden_size, num_layers)
    assert sum(p.numel() for p in grown.parameters()) == parameters
    torch.testing.assert_close(logits(grown), logits(model), rtol=1e-4, atol=1e-4)
    for _ in range(3):  # behind a zero nothing moves before the zero does
        logits(grown).logsumexp(-1).sum().backward()
        with torch.no_grad():
            for parameter in grown.parameters():
                parameter -= 1e-3 * parameter.grad.sign()
    assert all(
        (p.grad != 0).float().mean() > 0.9 for name, p in grown.named_parameters() if "embed" not in name
    )


@pytest.mark.parametrize(
    ("hidden_size", "num_layers", "fitting"), [(72, 4, "96.*4"), (100, 3, "120.*3"), (96, 2, "96.*3")]
)
def test_a_model_does_not_grow_smaller_or_by_parts_of_a_head(bench, hidden_size, num_layers, fitting):
    asked = f"hidden_size is {hidden_size} and num_layers {num_layers}"
    message = f"{asked} but the model has 96 and 3, and grows.*{fitting}$"
    with pytest.raises(ValueError, match=message):
        bench.grown(load("tiny", device="cpu")[0], hidden_size, num_layers)
