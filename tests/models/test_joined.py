"""Projections that lie side by side: one product, and otherwise a model like any other."""

import copy

import pytest
import torch
from conftest import ALL_FAMILIES, make_model
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from kit.models.joined import join, joined, siblings
from kit.models.nf4 import quantise_decoder

CPU = torch.device("cpu")


def all_joined(model):
    return [joined(group) for layer in model.model.layers for group in siblings(layer)]


def memory_of(model):
    return [parameter.data_ptr() for parameter in model.parameters()]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_joined_layers_compute_what_each_does(family, bias):
    model = make_model(family, torch.float64)
    for layers in siblings(model.model.layers[0]):
        for layer in layers:
            layer.bias = nn.Parameter(torch.randn(layer.out_features).double()) if bias else None
    groups, before = siblings(model.model.layers[0]), copy.deepcopy(model.state_dict())
    assert all_joined(model) == [None] * 2 * len(model.model.layers)
    join(model, CPU)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    for layers in groups:
        x = torch.randn(4, layers[0].in_features).double()
        for ours, layer in zip(joined(layers)(x), layers, strict=True):
            torch.testing.assert_close(ours, layer(x))


def test_training_changes_what_joined_layers_compute_and_leaves_them_joined():
    model = make_model("qwen2")
    join(model, CPU)
    layers = siblings(model.model.layers[1])[0]
    x, product = torch.randn(4, layers[0].in_features), joined(layers)
    before = product(x)
    sum(layer(x).sum() for layer in layers).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    for projection in (product, joined(layers)):
        for ours, layer, old in zip(projection(x), layers, before, strict=True):
            torch.testing.assert_close(ours, layer(x))
            assert (ours != old).all()


def test_a_copy_of_a_joined_model_and_one_that_was_cast_have_weights_of_their_own():
    model = make_model("llama")
    join(model, CPU)
    for other in (copy.deepcopy(model), copy.deepcopy(model).double()):
        assert all_joined(other) == [None] * 2 * len(model.model.layers)
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in other.parameters())


def test_layers_that_compute_more_or_differ_stay_apart(tiny_model):
    first, second = tiny_model.model.layers[:2]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["k_proj"]), first.self_attn)
    first.mlp.up_proj.register_forward_hook(lambda *_: None)
    second.self_attn.v_proj.half()
    before = [module.weight.data_ptr() for module in (first.self_attn.q_proj, first.mlp.gate_proj)]
    join(tiny_model, CPU)
    attention, mlp = (siblings(layer) for layer in (first, second))
    assert [joined(layers) is None for layers in (*attention, *mlp)] == [True, True, True, False]
    assert before == [module.weight.data_ptr() for module in (first.self_attn.q_proj, first.mlp.gate_proj)]
    mlp[1][1].bias = nn.Parameter(torch.zeros(mlp[1][1].out_features))
    assert joined(mlp[1]) is None
    quantise_decoder(tiny_model, "cpu")
    assert all_joined(tiny_model) == [None] * 2 * len(tiny_model.model.layers)
