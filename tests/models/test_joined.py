"""Projections joined into one product, and separated again."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from kit.models.joined import join
from kit.models.nf4 import quantise_decoder

WIDTHS = (5, 3, 2)


def layers_of(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Linear(7, width, bias=bias, dtype=dtype) for width in WIDTHS]


def memory_of(layers):
    return [parameter.untyped_storage().data_ptr() for layer in layers for parameter in layer.parameters()]


@pytest.mark.parametrize("bias", [True, False])
def test_joined_layers_compute_what_each_does_from_one_tensor(bias):
    layers, x = layers_of(bias, torch.float64), torch.randn(4, 7, dtype=torch.float64)
    expected = [layer(x) for layer in layers]
    joined = join(layers)
    assert len(set(memory_of(layers))) == 1 + bias
    for found in (joined(x), [layer(x) for layer in layers]):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        layers[1].weight.mul_(2)
    torch.testing.assert_close(joined(x)[1], layers[1](x))
    assert (joined(x)[1] != expected[1]).all()


def test_after_separation_all_have_the_same_bits_in_memory_of_their_own_and_can_be_trained():
    layers = layers_of()
    before = [parameter.clone() for layer in layers for parameter in layer.parameters()]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    with torch.inference_mode():  # as the sampler runs
        join(layers).separate()
    assert len(set(memory_of(layers))) == len(parameters)
    for parameter, old in zip(parameters, before, strict=True):
        assert torch.equal(parameter, old) and parameter.untyped_storage().nbytes() == parameter.nbytes
    sum(layer(torch.ones(4, 7)).sum() for layer in layers).backward()
    torch.optim.SGD(parameters, lr=1.0).step()
    assert all((parameter != old).all() for parameter, old in zip(parameters, before, strict=True))


def test_two_that_join_the_same_layers_compute_the_same_and_separate_in_any_order():
    layers, x = layers_of(), torch.randn(4, 7)
    expected = [layer(x) for layer in layers]
    first, second = join(layers), join(layers)
    first.separate()
    for ours, theirs in zip(second(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    second.separate()
    assert len(set(memory_of(layers))) == 2 * len(layers)


def test_layers_that_compute_more_or_differ_stay_apart(tiny_model):
    hooked, half, biased = layers_of(), layers_of(), layers_of()
    hooked[1].register_forward_hook(lambda *_: None)
    half[2].half()
    biased[0].bias = None
    attention = tiny_model.model.layers[0].self_attn
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["k_proj"]), attention)
    for layers in (hooked, half, biased, [adapted.q_proj, adapted.k_proj, adapted.v_proj]):
        before = memory_of(layers)
        assert join(layers) is None and memory_of(layers) == before
    quantise_decoder(tiny_model, "cpu")
    mlp = tiny_model.model.layers[1].mlp
    assert join([mlp.gate_proj, mlp.up_proj]) is None
