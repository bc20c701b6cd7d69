import copy
import weakref
from functools import partial
from itertools import product

import pytest
import torch
from conftest import FAMILIES, make_model, random_documents
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kit.kernels.linear_cross_entropy import linear_cross_entropy
from kit.models.backbone import head_weight, hidden_states, softcap
from kit.models.nf4 import NF4Linear, quantise_decoder
from kit.packing import PackedBatch
from kit.train.offload import HostInputs
from kit.train.recompute import keep_activations, recompute_layers

LENGTHS = [9, 1, 23, 4]  # T = 37 is prime: no tile divides it
T = sum(LENGTHS)
INTERMEDIATE = 48
BATCH = PackedBatch.build(random_documents(LENGTHS))


def exact_model(model):
    """Return a model with the same weights in float64."""
    return copy.deepcopy(model).double()


def add_adapters(model):
    """Add LoRA to all linear layers. B starts random, not zero, so that A has a gradient."""
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear")).get_base_model()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def loss_of(model, batch=BATCH):
    hidden, weight = hidden_states(model, batch), head_weight(model)
    return linear_cross_entropy(hidden, weight, batch.targets, softcap=softcap(model))


def gradients_of(model, batches=(BATCH,)):
    model.train()
    model.zero_grad()
    for batch in batches:
        loss_of(model, batch).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def relative_error(gradients, truth):
    """Return the root mean square over parameters of |gradient - truth| / |truth|."""
    assert gradients.keys() == truth.keys()
    errors = [(gradients[name].double() - truth[name]).norm() / truth[name].norm() for name in truth]
    return torch.stack(errors).square().mean().sqrt().item()


def assert_same(gradients, plain):
    assert gradients.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize("offload", [False, True])
def test_without_tiles_every_bf16_gradient_is_the_plain_models_bit_for_bit(tiny_model, offload):
    """Not so in fp32, without the norm's cast: the three gradients of a layer's input differ in order."""
    tiny_model.bfloat16()
    plain = gradients_of(copy.deepcopy(tiny_model))
    recompute_layers(tiny_model, offload=offload)
    assert_same(gradients_of(tiny_model), plain)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    ("family", "tile_tokens"), [*product(FAMILIES, [1, 5, T - 1, T, T + 1]), ("qwen3", 5)]
)
def test_in_float64_tiles_change_no_gradient(family, tile_tokens, offload):
    exact = exact_model(make_model(family))
    truth = gradients_of(copy.deepcopy(exact))
    recompute_layers(exact, offload=offload, tile_tokens=tile_tokens)
    assert relative_error(gradients_of(exact), truth) < 1e-12


@pytest.mark.parametrize("tile_tokens", [0, 5])
def test_a_pack_of_one_token(tiny_model, tile_tokens):
    batch = PackedBatch.build(random_documents([1]))
    tiny_model.bfloat16()
    recomputed = copy.deepcopy(tiny_model)
    recompute_layers(recomputed, offload=True, tile_tokens=tile_tokens)
    for model in (tiny_model, recomputed):
        model.train()
        hidden_states(model, batch).pow(3).sum().backward()
    for plain, ours in zip(tiny_model.model.parameters(), recomputed.model.parameters(), strict=True):
        assert torch.equal(plain.grad, ours.grad)


@pytest.mark.parametrize("tile_tokens", [1, 8])
def test_in_fp32_the_error_against_float64_is_at_most_twice_the_plain_models(tiny_model, tile_tokens):
    truth = gradients_of(exact_model(tiny_model))
    plain = relative_error(gradients_of(copy.deepcopy(tiny_model)), truth)
    recompute_layers(tiny_model, tile_tokens=tile_tokens)
    assert relative_error(gradients_of(tiny_model), truth) <= 2 * plain


def test_in_bf16_the_sum_over_many_tiles_does_not_round_once_per_tile():
    """Check the feed-forward's weights: sums in bf16 would have 2.4 times the plain model's error here."""
    batch = PackedBatch.build(random_documents([150, 101, 49]))
    model = make_model("llama", torch.bfloat16)

    def feed_forward(gradients):
        return {name: gradient for name, gradient in gradients.items() if "_proj" in name and ".mlp." in name}

    truth = feed_forward(gradients_of(exact_model(model), [batch]))
    plain = relative_error(feed_forward(gradients_of(copy.deepcopy(model), [batch])), truth)
    recompute_layers(model, tile_tokens=1)
    assert relative_error(feed_forward(gradients_of(model, [batch])), truth) <= 2 * plain


class Shapes(TorchDispatchMode):
    """Record the shapes of all matrix products and of those alive.

    most: the most rows of (1, n, INTERMEDIATE) tensors alive at one time.
    """

    def __init__(self):
        super().__init__()
        self.products, self.alive_products, self.alive, self.most = set(), {}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            if func is torch.ops.aten.mm.default:
                self.products.add(tuple(out.shape))
                key = out.untyped_storage()._cdata
                self.alive_products[key] = set(out.shape)
                weakref.finalize(out.untyped_storage(), self.alive_products.pop, key)
            storage = out.untyped_storage()
            if out.dim() == 3 and out.shape[-1] == INTERMEDIATE and storage._cdata not in self.alive:
                self.alive[storage._cdata] = out.shape[1]
                weakref.finalize(storage, self.alive.pop, storage._cdata)
                self.most = max(self.most, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("adapters", [False, True])
def test_activations_of_one_tile_are_alive_at_a_time(tiny_model, adapters):
    model = add_adapters(tiny_model) if adapters else tiny_model
    one_tile = PackedBatch.build(random_documents([8]))
    most = []
    for tile_tokens, batch in [(0, one_tile), (8, BATCH), (0, BATCH)]:
        recompute_layers(model, tile_tokens=tile_tokens)
        with Shapes() as made:
            gradients_of(model, [batch])
        most.append(made.most)
    assert most[0] == most[1] > 0
    assert most[2] * 8 == most[0] * T  # the count shows what tiles save


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("tile_tokens", [0, 8])
def test_the_feed_forward_runs_exactly_twice_per_step_not_three_times(tiny_model, tile_tokens, adapters):
    model = add_adapters(tiny_model) if adapters else tiny_model
    tokens = [0] * len(model.model.layers)
    for index, layer in enumerate(model.model.layers):
        for module in (layer.mlp.down_proj, layer.self_attn.q_proj):

            def count(module, args, output, index=index):
                tokens[index] += args[0].shape[-2]

            module.register_forward_hook(count)
    recompute_layers(model, offload=True, tile_tokens=tile_tokens)
    gradients_of(model)
    assert tokens == [2 * T + 2 * T] * len(tokens)  # feed-forward and attention


@pytest.mark.parametrize("tile_tokens", [0, 8])
def test_a_gradient_reaches_its_hook_once_and_is_freed_before_the_next_layers_are_complete(
    tiny_model, tile_tokens
):
    recompute_layers(tiny_model, offload=True, tile_tokens=tile_tokens)
    calls, made = [], Shapes()

    def step_at_once(parameter, name, index):
        alive = sum(shape == {32, INTERMEDIATE} for shape in made.alive_products.values())
        assert alive <= 3, f"at layer {index} {alive} gradients of feed-forward weights, but a layer has 3"
        calls.append((index, name))
        parameter.grad = None

    names = []
    for index, layer in enumerate(tiny_model.model.layers):
        for name, parameter in layer.named_parameters():
            names.append((index, name))
            parameter.register_post_accumulate_grad_hook(partial(step_at_once, name=name, index=index))
    with made:
        gradients_of(tiny_model)
    indices = [index for index, _ in calls]
    assert indices == sorted(indices, reverse=True)
    assert sorted(calls) == sorted(names)


@pytest.mark.parametrize("tile_tokens", [0, 8])
def test_a_parameters_own_hook_sees_one_gradient(tiny_model, tile_tokens):
    recompute_layers(tiny_model, tile_tokens=tile_tokens)
    seen = []
    for parameter in tiny_model.model.layers.parameters():
        parameter.register_hook(seen.append)
    gradients_of(tiny_model)
    assert len(seen) == len(list(tiny_model.model.layers.parameters()))


@pytest.mark.parametrize("tile_tokens", [0, 5])
def test_adapters_get_their_gradients_and_frozen_weights_none(tiny_model, tile_tokens):
    model = add_adapters(exact_model(tiny_model))
    truth = gradients_of(copy.deepcopy(model))
    assert all("lora" in name for name in truth)
    recompute_layers(model, offload=True, tile_tokens=tile_tokens)
    with Shapes() as made:
        gradients = gradients_of(model)
    assert relative_error(gradients, truth) < 1e-12
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    weight = tuple(model.model.layers[0].mlp.down_proj.weight.shape)
    assert not made.products & {weight, weight[::-1]}  # nothing was even computed for it

    full = exact_model(tiny_model)
    recompute_layers(full, tile_tokens=tile_tokens)
    with Shapes() as made:
        gradients_of(full)
    assert made.products & {weight, weight[::-1]}


def dequantised(model):
    """Return a copy whose frozen layers in NF4 are written out."""
    model = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, NF4Linear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            linear.weight.data, linear.bias = layer.dequantise(), layer.bias
            model.set_submodule(path, linear.requires_grad_(False))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_real_nf4_weights(family):
    model = make_model(family)
    quantise_decoder(model, "cpu")
    model = add_adapters(model)
    assert model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.uint8
    plain = gradients_of(copy.deepcopy(model))
    assert all("lora" in name for name in plain)
    truth = gradients_of(exact_model(dequantised(model)))
    recompute_layers(model, offload=True, tile_tokens=5)
    assert relative_error(gradients_of(model), truth) <= 2 * relative_error(plain, truth)
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


TRAINABLE = {
    "no layer": ["model.norm"],
    "the embedding alone": ["embed_tokens"],
    "the norms before attention": ["input_layernorm"],
    "the norms after attention": ["post_attention_layernorm"],
    "the first layer's norm after attention": ["layers.0.post_attention_layernorm"],
    "the queries": ["q_proj"],
    "one layer's feed-forward": ["layers.1.mlp"],
    "the first layer's norm before attention": ["layers.0.input_layernorm"],
}


@pytest.mark.parametrize("trainable", TRAINABLE.values(), ids=TRAINABLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_is_trainable_gets_its_gradient(family, trainable):
    model = exact_model(make_model(family))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trainable))
    truth = gradients_of(copy.deepcopy(model))
    assert truth
    recompute_layers(model, offload=True, tile_tokens=5)
    assert relative_error(gradients_of(model), truth) < 1e-12
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def test_a_trainable_parameter_that_is_not_used_gets_no_gradient_as_in_the_plain_model():
    model = make_model("llama")
    model.model.layers[2].mlp.register_parameter("spare", nn.Parameter(torch.ones(3)))
    recompute_layers(model, tile_tokens=5)
    unused = [name for name, gradient in gradients_of(model).items() if gradient is None]
    assert unused == ["model.layers.2.mlp.spare"]


def test_a_parameter_in_two_parts_of_a_layer_gets_the_sum(tiny_model):
    model = exact_model(tiny_model)
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight = layer.input_layernorm.weight
    truth = gradients_of(copy.deepcopy(model))
    recompute_layers(model, tile_tokens=5)
    assert relative_error(gradients_of(model), truth) < 1e-12


@pytest.mark.parametrize("offload", [False, True])
def test_rows_of_a_step_accumulate_whatever_their_lengths(tiny_model, offload):
    rows = [random_documents(lengths, seed=i) for i, lengths in enumerate([[5, 3], [40, 2], [9], [60]])]
    batches = [PackedBatch.build(row) for row in rows]
    tiny_model.bfloat16()
    plain = gradients_of(copy.deepcopy(tiny_model), batches)
    recompute_layers(tiny_model, offload=offload)
    assert_same(gradients_of(tiny_model, batches), plain)


@pytest.mark.parametrize("offload", [False, True])
def test_two_rows_may_run_forward_before_either_runs_backward(tiny_model, offload):
    def joint(model):
        model.train()
        rows = [PackedBatch.build(random_documents(lengths, seed=9)) for lengths in ([5, 3], [20])]
        sum(loss_of(model, row) for row in rows).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    tiny_model.bfloat16()
    plain = joint(copy.deepcopy(tiny_model))
    recompute_layers(tiny_model, offload=offload)
    assert_same(joint(tiny_model), plain)


def test_a_backward_pass_that_stopped_half_way_leaves_nothing_stale(tiny_model):
    """It has staged inputs that were never fetched. The next row of the same length must not use them."""
    tiny_model.bfloat16()
    plain = gradients_of(copy.deepcopy(tiny_model))
    recompute_layers(tiny_model, offload=True)
    inputs = []
    handle = tiny_model.model.layers[2].register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    stopped = hidden_states(tiny_model.train(), PackedBatch.build(random_documents(LENGTHS, seed=5)))
    handle.remove()
    torch.autograd.grad(stopped.sum(), inputs)
    assert_same(gradients_of(tiny_model), plain)


def test_all_offloaded_inputs_but_the_last_leave_the_device_in_the_forward_pass(tiny_model):
    recompute_layers(tiny_model, offload=True, tile_tokens=5)
    tiny_model.train()
    inputs = []
    for layer in tiny_model.model.layers:
        layer.register_forward_pre_hook(lambda layer, args: inputs.append(storage_of(args[0])))
    loss = loss_of(tiny_model)
    assert [storage() is not None for storage in inputs] == [False, False, False, True]
    loss.backward()
    assert all(storage() is None for storage in inputs)


def storage_of(x: torch.Tensor) -> weakref.ref:
    """Return a weak reference to the memory of x."""
    return weakref.ref(x.untyped_storage())


def host_of(model) -> HostInputs:
    return model.model.layers[0]._gradient_checkpointing_func.host


def test_cpu_memory_is_allocated_once_and_staging_is_freed(tiny_model):
    recompute_layers(tiny_model, offload=True)
    host = host_of(tiny_model)
    gradients_of(tiny_model)
    first = {buffer.data_ptr() for buffer in host.buffers}
    assert len(host.buffers) == len(tiny_model.model.layers) - 1
    gradients_of(tiny_model, [PackedBatch.build(random_documents([length])) for length in (3, T)])
    assert {buffer.data_ptr() for buffer in host.buffers} == first
    gradients_of(tiny_model, [PackedBatch.build(random_documents([3 * T]))])  # these are too small now
    assert len(host.buffers) == len(tiny_model.model.layers) - 1
    assert not host.staged
    assert not host.leaving


def test_inputs_are_offloaded_by_the_object_that_is_passed(tiny_model):
    host = HostInputs()
    recompute_layers(tiny_model, offload=host)
    gradients_of(tiny_model)
    assert len(host.buffers) == len(tiny_model.model.layers) - 1


def test_the_backward_pass_reads_what_the_cpu_memory_holds(tiny_model):
    recompute_layers(tiny_model, offload=True)
    host = host_of(tiny_model)
    gradients_of(tiny_model)
    taken = list(host.buffers)
    loss = loss_of(tiny_model)
    for buffer in taken:
        buffer.fill_(255)  # NaN in fp32
    tiny_model.zero_grad()
    loss.backward()
    finite = [all(p.grad.isfinite().all() for p in layer.parameters()) for layer in tiny_model.model.layers]
    assert finite == [False, False, False, True]


def test_the_input_of_the_attention_is_freed_while_the_tiles_run(tiny_model):
    recompute_layers(tiny_model, tile_tokens=8)
    loss = loss_of(tiny_model.train())
    read, held = [], []

    for layer in tiny_model.model.layers:
        layer.self_attn.q_proj.register_forward_pre_hook(lambda _, args: read.append(storage_of(args[0])))
        layer.mlp.down_proj.register_forward_hook(lambda *_: held.append(read[-1]() is not None))
    loss.backward()
    assert len(read) == len(tiny_model.model.layers) and held and not any(held)


@pytest.mark.parametrize("prefetch", [True, False])
def test_an_input_that_is_copied_before_it_is_fetched_is_the_one_that_was_kept(prefetch):
    host = HostInputs()
    inputs = [torch.full((2, 3), float(index)) for index in range(4)]
    kept = [host.keep(x, index, on_device=index == 3) for index, x in enumerate(inputs)]
    host.flush()
    for index in (3, 2, 1, 0):
        before = list(host.staged)
        assert before == ([kept[index]] if prefetch and index < 3 else [])
        assert torch.equal(host.fetch(kept[index]), inputs[index])
        assert host.staged == ([kept[index]] if index < 3 else [])
        if prefetch:
            host.prefetch(kept[index])
        host.done(kept[index])
    assert not host.staged


def test_the_next_input_is_copied_after_the_tiles_and_before_the_attentions_backward_pass(tiny_model):
    """Memory peaks during the tiles: one input is staged then, and none during the last layer's."""
    recompute_layers(tiny_model, offload=True, tile_tokens=T - 1)
    staged, host = [], host_of(tiny_model)
    loss = loss_of(tiny_model.train())
    for layer in tiny_model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda *_: staged.append(("tile", len(host.staged))))
        query = layer.self_attn.q_proj
        query.register_full_backward_hook(lambda *_: staged.append(("attention", len(host.staged))))
    loss.backward()
    seen = [staged[i : i + 3] for i in range(0, len(staged), 3)]
    assert [count for layer in seen for what, count in layer if what == "tile"] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert [count for layer in seen for what, count in layer if what == "attention"] == [1, 2, 2, 1]


def test_without_gradients_nothing_is_kept(tiny_model, monkeypatch):
    recompute_layers(tiny_model, offload=True)
    tiny_model.train()
    monkeypatch.setattr(host_of(tiny_model), "keep", lambda *_, **__: pytest.fail("an input was kept"))
    with torch.no_grad():
        loss_of(tiny_model)
    for parameter in tiny_model.parameters():
        parameter.requires_grad_(False)
    hidden_states(tiny_model, BATCH)


def test_a_second_backward_pass_repeats_the_first_or_is_refused_with_offload(tiny_model):
    tiny_model.train()
    recompute_layers(tiny_model, tile_tokens=5)
    loss = hidden_states(tiny_model, BATCH).square().sum()
    once = torch.autograd.grad(loss, list(tiny_model.model.parameters()), retain_graph=True)
    twice = torch.autograd.grad(loss, list(tiny_model.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    recompute_layers(tiny_model, offload=True)
    loss = hidden_states(tiny_model, BATCH).square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs backward once"):
        loss.backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backward_pass_keeps_the_inputs_of_the_layers_and_of_the_last_norm(family):
    model = make_model(family).train()
    recompute_layers(model)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(weakref.ref(x)) or x, lambda x: x):
        hidden = hidden_states(model, BATCH)
    references = (reference() for reference in kept)
    alive = [x for x in references if x is not None]  # only the graph of `hidden` keeps them
    wide = [x for x in alive if x.is_floating_point() and x.numel() >= T * model.config.hidden_size]
    assert len({x.data_ptr() for x in wide}) == len(model.model.layers) + 1
    assert hidden.requires_grad


def test_names_stay_and_keep_activations_ends_it(tiny_model):
    names = list(tiny_model.state_dict())
    modules = [name for name, _ in tiny_model.named_modules()]
    plain = gradients_of(copy.deepcopy(tiny_model))
    recompute_layers(tiny_model, offload=True, tile_tokens=5)
    assert tiny_model.is_activation_checkpointing
    assert list(tiny_model.state_dict()) == names
    assert [name for name, _ in tiny_model.named_modules()] == modules
    keep_activations(tiny_model)
    assert not tiny_model.is_activation_checkpointing
    calls = []
    tiny_model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    assert_same(gradients_of(tiny_model), plain)
    assert len(calls) == 1


def test_only_training_mode_recomputes(tiny_model):
    recompute_layers(tiny_model, offload=True, tile_tokens=5)
    tiny_model.eval()
    loss_of(tiny_model).backward()
    assert host_of(tiny_model).latest() is None
    loss = loss_of(tiny_model.train())
    assert loss.requires_grad and host_of(tiny_model).latest() is not None
    assert all(parameter.grad is not None for parameter in tiny_model.parameters())


def test_a_module_without_layers_is_refused():
    with pytest.raises(ValueError, match="Linear has no decoder layer"):
        recompute_layers(nn.Linear(1, 1))


def test_settings_that_cannot_work_are_refused(tiny_model):
    with pytest.raises(ValueError, match="tile_tokens is -1"):
        recompute_layers(tiny_model, tile_tokens=-1)
    recompute_layers(tiny_model)
    tiny_model.train()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        loss_of(tiny_model)
    dropout = LoraConfig(r=2, lora_dropout=0.1, target_modules=["up_proj"])
    adapted = get_peft_model(tiny_model, dropout).get_base_model()
    adapted.train()
    with pytest.raises(ValueError, match=r"mlp.up_proj.lora_dropout.default drops out 0.1"):
        loss_of(adapted)


def test_a_batch_that_is_no_pack_is_refused_while_layers_are_recomputed(tiny_model):
    tiny_model.set_attn_implementation("sdpa")
    recompute_layers(tiny_model)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    with pytest.raises(ValueError, match=r"packed rows only; .*or call kit.train.recompute.keep_activations"):
        tiny_model.train()(ids)
    keep_activations(tiny_model)
    tiny_model(ids).logits.sum().backward()
