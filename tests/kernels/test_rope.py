"""Test the torch path and, in a child process, the real Triton kernels in the interpreter.

A child process is needed because TRITON_INTERPRET is read at import.
"""

import pytest
import torch
from accuracy import check, far_memory, poisoned, run_as_program  # noqa: F401
from children import pass_in_the_interpreter
from counting import Counter
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kit.kernels.rope as kernels
from kit.kernels.backend import INTERPRET
from kit.kernels.rope import rope, rope_reference

DTYPES = [torch.float32, torch.float16] if INTERPRET else [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    (1, 1, 1, 2),
    (5, 3, 1, 10),
    (7, 6, 2, 16),
    (3, 5, 5, 6),
]  # T, Hq, Hkv, D; nothing is a power of two


def problem(T, Hq, Hkv, D):
    """Return q, k, cos and sin, whose halves differ: a kernel that takes one half for both is seen."""
    torch.manual_seed(0)
    angles = 10 * torch.rand(T, D)
    return torch.randn(T, Hq, D), torch.randn(T, Hkv, D), angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_as_good_as_torchs(shape, dtype, poisoned):  # noqa: F811
    q, k, cos, sin = problem(*shape)
    cos, sin = cos.to(dtype), sin.to(dtype)

    def in_its_dtype(function):
        return lambda q, k: function(q, k, cos.to(q.dtype), sin.to(q.dtype))

    check(in_its_dtype(rope), in_its_dtype(rope_reference), [q, k], [q.flip(0), k.flip(0)], dtype)


def test_gradients_pass_torchs_own_check_in_float64():
    q, k, cos, sin = (x.double() for x in problem(4, 3, 1, 6))
    assert torch.autograd.gradcheck(
        lambda q, k: rope(q, k, cos, sin), (q.requires_grad_(), k.requires_grad_())
    )


def test_it_is_the_rotation_of_transformers_models():
    q, k, cos, sin = problem(7, 6, 2, 16)
    cos, sin = (x[:, :8].repeat(1, 2) for x in (cos, sin))
    batched = (x.transpose(0, 1)[None] for x in (q, k))  # (1, H, T, D)
    theirs = (x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*batched, cos[None], sin[None]))
    for ours, expected in zip(rope(q, k, cos, sin), theirs, strict=True):
        torch.testing.assert_close(ours, expected)


def test_no_tokens_give_no_tokens():
    q, k = rope(torch.empty(0, 3, 4), torch.empty(0, 1, 4), torch.empty(0, 4), torch.empty(0, 4))
    assert q.shape == (0, 3, 4) and k.shape == (0, 1, 4)


def test_neither_inputs_nor_incoming_gradients_are_overwritten():
    """A gradient that arrives may be another operation's, too."""
    q, k, cos, sin = problem(5, 3, 1, 10)
    before = [x.clone() for x in (q, k)]
    leaves = [x.requires_grad_() for x in (q, k)]
    upstream = [torch.ones(5, 3, 10), torch.ones(5, 1, 10)]
    torch.autograd.backward(rope(*leaves, cos, sin), upstream)
    assert all(torch.equal(x, old) for x, old in zip(leaves, before, strict=True))
    assert all((dy == 1).all() for dy in upstream)


def test_a_gradient_of_q_alone_leaves_k_with_zeros():
    q, k, cos, sin = problem(5, 3, 1, 10)
    rope(q.requires_grad_(), k.requires_grad_(), cos, sin)[0].sum().backward()  # sum: a gradient of stride 0
    assert (k.grad == 0).all() and (q.grad != 0).any()


def test_transposed_inputs_count_as_their_values():
    q, k, cos, sin = problem(5, 3, 2, 10)
    views = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k))
    for ours, expected in zip(rope(*views, cos, sin), rope(q, k, cos, sin), strict=True):
        assert torch.equal(ours, expected)


def test_heads_of_one_projection_count_as_their_values_and_are_not_copied():
    q, k, cos, sin = problem(5, 3, 1, 10)
    projected = torch.cat([q, k, torch.full_like(k, torch.nan)], dim=1)
    for ours, expected in zip(
        rope(projected[:, :3], projected[:, 3:4], cos, sin), rope(q, k, cos, sin), strict=True
    ):
        assert torch.equal(ours, expected) and ours.is_contiguous()
    with FakeTensorMode(), Counter() as counter:
        heads = torch.empty(5, 5, 10)
        rope(heads[:, :3], heads[:, 3:4], torch.empty(5, 10), torch.empty(5, 10))
    assert counter.total.launches == 1


def test_the_operators_and_their_fake_implementations_agree():
    inputs = problem(5, 3, 1, 10)
    for operator in (kernels._forward, kernels._backward):
        torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_faketensor"))
    with FakeTensorMode():
        q = torch.empty(5, 3, 10, dtype=torch.bfloat16, requires_grad=True)
        rope(q, q[:, :1], torch.empty(5, 10), torch.empty(5, 10))[0].sum().backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize(
    ("match", "change"),
    [
        (r"q has shape \(5, 30\)", {"q": torch.ones(5, 30)}),
        (r"q has shape \(5, 3, 10\) and k \(4, 1, 10\)", {"k": torch.ones(4, 1, 10)}),
        ("an even D", {"q": torch.ones(5, 3, 9), "k": torch.ones(5, 1, 9)}),
        (r"cos has shape \(5, 5\).*needed is \(T, D\) = \(5, 10\)", {"cos": torch.ones(5, 5)}),
        ("q is torch.float32 and k torch.float16", {"k": torch.ones(5, 1, 10).half()}),
        ("are on cpu, cpu, meta, cpu", {"cos": torch.ones(5, 10, device="meta")}),
        ("pass them detached", {"sin": torch.ones(5, 10, requires_grad=True)}),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_both_values(match, change):
    names = ("q", "k", "cos", "sin")
    with pytest.raises(ValueError, match=match):
        rope(**dict(zip(names, problem(5, 3, 1, 10), strict=True)) | change)


@pytest.mark.interpreter
def test_tokens_past_2_to_the_31_elements_do_not_overflow(monkeypatch):
    T, Hq, D = 2**20 + 2, 32, 64
    run_as_program(T - 1, monkeypatch)
    q, k, cos, sin, q_out, k_out = (far_memory(T * heads * D) for heads in (Hq, 1, 1, 1, Hq, 1))
    for x, heads in ((q, Hq), (k, 1), (cos, 1), (sin, 1)):
        x[-heads * D :] = torch.randn(heads * D)
    last = [q[-Hq * D :].view(1, Hq, D), k[-D:].view(1, 1, D), cos[-D:].view(1, D), sin[-D:].view(1, D)]
    for kernel, operator in ((kernels._forward_kernel, rope), (kernels._backward_kernel, kernels._backward)):
        kernel[(1,)](q, k, cos, sin, q_out, k_out, Hq * D, D, Hq, 1, D, Hq, 1, D // 2)
        expected_q, expected_k = operator(*(x.double() for x in last))
        torch.testing.assert_close(q_out[-Hq * D :].double(), expected_q.flatten(), atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(k_out[-D:].double(), expected_k.flatten(), atol=1e-2, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is the child")
def test_the_kernels_pass_the_same_tests_in_the_interpreter(record_property):
    pass_in_the_interpreter(__file__, record_property)
