import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit, Params4bit
from conftest import make_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_iter

from kit.memory.live_bytes import LiveBytes
from kit.models.nf4 import (
    BLOCK,
    FUSED_ROWS,
    SCALE_BLOCK,
    NF4Linear,
    quantise_decoder,
    simulate_quantised_decoder,
)

# rows shorter and longer than a block, no multiple of it, odd, and more than one scale of scales (390 blocks)
SHAPES = [(64, 64), (16, 32), (96, 96), (48, 48), (5, 33), (7, 3), (1, 1), (3, 66), (130, 192)]  # out, in
QLORA_APPENDIX_E = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
TABLE = torch.tensor(QLORA_APPENDIX_E, dtype=torch.float64)


def make_linear(shape, dtype=torch.float32, bias=True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(shape[1], shape[0], bias=bias).to(dtype)


def codes_and_scales(layer: NF4Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's 4-bit codes and the scale of each, by the definition, in float64."""
    num_weights = layer.in_features * layer.out_features
    packed = layer.weight.view(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:num_weights].long()
    coarse = layer.scale_scales.double().repeat_interleave(SCALE_BLOCK)[: len(layer.scale_bytes)]
    scales = layer.scale_table.double()[layer.scale_bytes.long()] * coarse + layer.scale_offset.double()
    return codes, scales.repeat_interleave(BLOCK)[:num_weights]


def worst(got, truth) -> float:
    return (got.double() - truth).abs().max().item() if truth.numel() else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_weight_is_the_nearest_entry_of_the_table_and_comes_back_as_entry_times_scale(shape, dtype):
    linear = make_linear(shape, dtype)
    layer = NF4Linear.quantise(linear, "cpu")
    codes, scales = codes_and_scales(layer)
    flat = linear.weight.detach().double().view(-1)
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1).repeat_interleave(BLOCK)[: len(flat)]
    distance = (flat / largest)[:, None].sub(TABLE).abs()
    eps = torch.finfo(torch.float32).eps
    assert (distance.gather(1, codes[:, None])[:, 0] - distance.amin(1)).max() < eps
    gaps = layer.scale_table.double().diff() * layer.scale_scales.double().max()
    assert (scales - largest).abs().max() <= gaps.max() / 2 + eps * largest.max()
    truth = (TABLE[codes] * scales).view(shape)
    torchs = (TABLE[codes].float() * scales.float()).to(dtype).view(shape)
    assert layer.dequantise().dtype == dtype
    assert worst(layer.dequantise(), truth) <= 2 * worst(torchs, truth)


@pytest.mark.parametrize("rows", ["few", "many", "none", "stride 0", "not contiguous"])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(96, 64), (16, 32), (5, 33)], ids=str)
def test_the_layer_is_a_linear_layer_of_its_dequantised_weight(shape, dtype, gradient, rows):
    layer = NF4Linear.quantise(make_linear(shape, dtype), "cpu")
    torch.manual_seed(1)
    x = torch.randn(2, {"many": FUSED_ROWS, "none": 0}.get(rows, 7), shape[1]).to(dtype)
    if rows == "stride 0":
        x = x[:, :1].expand(-1, 7, -1)
    if rows == "not contiguous":
        x = x.transpose(0, 1)
    x = x.detach().requires_grad_(gradient)
    d_out = torch.randn(*x.shape[:-1], shape[0]).to(dtype)
    codes, scales = codes_and_scales(layer)
    weight = (TABLE[codes] * scales).view(shape)
    truth, d_truth = F.linear(x.detach().double(), weight, layer.bias.double()), d_out.double() @ weight
    torchs, d_torchs = F.linear(x.detach(), weight.to(dtype), layer.bias), d_out @ weight.to(dtype)
    out = layer(x)
    assert out.dtype == dtype
    assert worst(out, truth) <= 2 * worst(torchs, truth)
    assert out.requires_grad == gradient
    if gradient:
        out.backward(d_out)
        assert worst(x.grad, d_truth) <= 2 * worst(d_torchs, d_truth)


def make_bitsandbytes_linear(linear: nn.Linear) -> Linear4bit:
    theirs = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=True,
        compute_dtype=linear.weight.dtype,
        quant_type="nf4",
    )
    theirs.weight = Params4bit(
        linear.weight.detach().clone(), quant_type="nf4", compress_statistics=True, module=theirs
    )
    theirs.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return theirs.to("cpu").train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_bitsandbytes_own_layer_is_right_the_two_are_bit_equal(dtype):
    linear = make_linear((130, 192), dtype)
    ours, theirs = NF4Linear.quantise(linear, "cpu"), make_bitsandbytes_linear(linear)
    x = torch.randn(2, 7, 192).to(dtype)
    d_out = torch.randn(2, 7, 130).to(dtype)
    seen = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        out.backward(d_out)
        seen.append((out, leaf.grad, layer(x)))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def allocated(run) -> tuple[int, int]:
    """Return (peak, what is left) in bytes of the CPU allocator over run(), with the insides of operators.

    The result of run() is kept alive.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        kept = run()  # noqa: F841
        torch.empty(0)
    now = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]" and abs(event.nbytes()) != 8:  # 8: a Python number inside an operator
            now += event.nbytes()
            peak = max(peak, now)
    return peak, now


def held_tensors(layer) -> list[tuple]:
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return [(name, tuple(x.shape), x.dtype, x.untyped_storage().nbytes()) for name, x in tensors]


def forward_backward(layer, x, d_out):
    def run():
        out = layer(x)
        return out, torch.autograd.grad(out, x, d_out)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_on_fake_tensors_holds_and_allocates_what_the_real_one_and_bitsandbytes_own_do(
    dtype, monkeypatch
):
    # oneDNN packs bf16 operands into extra memory, whose size depends on the CPU and on their strides;
    # torch's own matmul needs none, so every byte seen is the layer's
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    shape, T = (160, 320), 33
    linear = make_linear(shape, dtype)
    real, theirs = NF4Linear.quantise(linear, "cpu"), make_bitsandbytes_linear(linear)
    with FakeTensorMode():
        fake = NF4Linear(nn.Linear(shape[1], shape[0], dtype=dtype))
        x = torch.empty(1, T, shape[1], dtype=dtype, requires_grad=True)
        d_out = torch.empty(1, T, shape[0], dtype=dtype)
        with LiveBytes() as counted:
            kept = forward_backward(fake, x, d_out)()
        assert counted.now == sum(t.untyped_storage().nbytes() for t in tree_iter(kept))
    x = torch.randn(1, T, shape[1], dtype=dtype, requires_grad=True)
    d_out = torch.randn(1, T, shape[0], dtype=dtype)
    for layer in (real, theirs):  # the first run allocates what a process allocates once
        forward_backward(layer, x, d_out)()
    peak, left = allocated(forward_backward(real, x, d_out))
    assert (counted.peak, counted.now) == (peak, left)
    assert (peak, left) == allocated(forward_backward(theirs, x, d_out))
    peak_tensors = (real.dequantise(), d_out, x)  # weight; of the size of the result and of the gradient
    assert counted.peak == sum(tensor.untyped_storage().nbytes() for tensor in peak_tensors)
    assert held_tensors(fake) == held_tensors(real)
    state = theirs.weight.quant_state
    held = [theirs.weight, theirs.bias, state.absmax, state.offset, state.state2.absmax, state.state2.code]
    assert sum(x.untyped_storage().nbytes() for x in held) == sum(n for *_, n in held_tensors(real))


def test_sampling_changes_nothing_that_is_held():
    layer = NF4Linear.quantise(make_linear((64, 64)), "cpu")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with torch.no_grad():
        layer.eval()(torch.randn(1, 64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    x = torch.randn(3, 64, requires_grad=True)
    layer.train()(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantise().sum(0).expand(3, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_all_linear_layers_of_the_decoder_are_quantised_and_nothing_else_is_touched(family, dtype):
    model, plain = make_model(family, dtype), make_model(family, dtype)
    first = model.model.layers[0].mlp.up_proj
    gone = weakref.ref(first)
    del first
    quantise_decoder(model, "cpu")
    gc.collect()
    assert gone() is None
    linears = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    quantised = {name for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert quantised == linears - {"lm_head"}
    assert len(quantised) == 4 * 7
    weights = {f"{name}.weight" for name in quantised}
    left = dict(plain.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in weights:
            assert torch.equal(parameter, left[name])
            assert parameter.dtype == dtype
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (family == "gemma3")


def test_a_simulated_model_holds_the_same_tensors(tiny_model):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = type(tiny_model)(tiny_model.config)
        simulate_quantised_decoder(fake)
        assert all(tensor.fake_mode is mode for tensor in fake.state_dict().values())
    quantise_decoder(tiny_model, "cpu")
    shapes = [
        [(name, x.shape, x.dtype) for name, x in model.state_dict().items()] for model in (tiny_model, fake)
    ]
    assert shapes[0] == shapes[1]
