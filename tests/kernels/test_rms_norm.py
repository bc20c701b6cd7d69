"""Test the torch path and, in a child process, the real Triton kernels in the interpreter.

A child process is needed because TRITON_INTERPRET is read at import.
"""

import pytest
import torch
from accuracy import check, far_memory, poisoned, run_as_program  # noqa: F401
from children import pass_in_the_interpreter
from counting import Counter
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import kit.kernels.rms_norm as kernels
from kit.kernels import backend
from kit.kernels.backend import INTERPRET
from kit.kernels.rms_norm import rms_norm, rms_norm_reference

DTYPES = [torch.float32, torch.float16] if INTERPRET else [torch.float32, torch.float16, torch.bfloat16]
# one row; ragged rows and columns; more rows than the backward programs take in one step; heads
SHAPES = [(1, 7), (13, 77), (37, 5), (2, 3, 4, 16)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Two rows of 77 columns per block and per program, and four programs: small inputs cross every seam."""
    monkeypatch.setattr(backend, "CPU_BLOCK_BYTES", 700)
    monkeypatch.setattr(kernels, "TILE", 256)
    monkeypatch.setattr(kernels, "MAX_PROGRAMS", 4)


def problem(*shape):
    torch.manual_seed(0)
    return 3 * torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_as_good_as_torchs(shape, dtype, offset, poisoned):  # noqa: F811
    x, weight, dy = problem(*shape)
    options = {"eps": 1e-6, "offset": offset}
    check(
        lambda x, w: rms_norm(x, w, **options),
        lambda x, w: rms_norm_reference(x, w, **options),
        [x, weight],
        [dy],
        dtype,
    )


@pytest.mark.parametrize("shape", [(2, 1), (3, 2, 9)], ids=str)
def test_gradients_pass_torchs_own_check_in_float64(shape):
    x, weight, _ = problem(*shape)
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-2, offset=1.0), leaves)


@pytest.mark.parametrize(("norm", "offset"), [(LlamaRMSNorm, 0.0), (Gemma3RMSNorm, 1.0)])
def test_it_is_the_norm_of_transformers_models(norm, offset):
    x, weight, _ = problem(5, 77)
    module = norm(77, eps=1e-5)
    module.weight.data.copy_(weight)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, offset=offset), module(x))


def test_the_weight_may_have_another_dtype_than_the_rows():
    x, weight, dy = problem(13, 77)
    x, weight = x.half().requires_grad_(), weight.requires_grad_()
    y = rms_norm(x, weight, 1e-6)
    y.backward(dy.half())
    assert y.dtype == x.grad.dtype == torch.float16 and weight.grad.dtype == torch.float32
    expected = rms_norm_reference(x.detach().float(), weight.detach(), 1e-6)
    torch.testing.assert_close(y.float(), expected, rtol=1e-3, atol=1e-3)


def test_no_rows_give_no_rows_and_a_gradient_of_zero():
    x, weight = torch.empty(0, 5, requires_grad=True), torch.ones(5, requires_grad=True)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad.shape == (0, 5) and weight.grad.tolist() == [0.0] * 5


def test_rows_of_zeros_stay_zeros_and_have_a_finite_gradient():
    x = torch.zeros(3, 5, requires_grad=True)
    y = rms_norm(x, torch.ones(5), 1e-6)
    y.sum().backward()
    assert (y == 0).all() and x.grad.isfinite().all()


def test_strided_and_expanded_inputs_count_as_their_values():
    x, weight, _ = problem(4, 77)
    wide = torch.full((4, 100), torch.nan)
    wide[:, 10:87] = x
    for view in (wide[:, 10:87], x.T.contiguous().T):
        torch.testing.assert_close(rms_norm(view, weight, 1e-6), rms_norm(x, weight, 1e-6), rtol=0, atol=0)
    leaf = x[:1].clone().requires_grad_()
    rms_norm(leaf.expand(4, 77), weight, 1e-6).sum().backward()  # hands down a gradient of stride 0, too
    alone = x[:1].clone().requires_grad_()
    (4 * rms_norm(alone, weight, 1e-6)).sum().backward()
    torch.testing.assert_close(leaf.grad, alone.grad)


@pytest.mark.parametrize("heads", [slice(2, 5), slice(0, 1)], ids=["three", "one"])
def test_heads_of_a_wider_projection_count_as_their_values_and_are_not_copied(heads):
    x, weight, dy = problem(5, 7, 6)
    leaves = [x.clone().requires_grad_(), x[:, heads].clone().requires_grad_()]
    found, expected = (rms_norm(vectors, weight, 1e-6) for vectors in (leaves[0][:, heads], leaves[1]))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for y in (found, expected):
        y.backward(dy[:, heads])
    torch.testing.assert_close(leaves[0].grad[:, heads], leaves[1].grad, rtol=0, atol=0)
    with FakeTensorMode(), torch.no_grad(), Counter() as counter:
        rms_norm(torch.empty(5, 7, 6)[:, heads], torch.empty(6), 1e-6)
    assert counter.total.launches == 1


def test_a_frozen_weight_gets_no_gradient():
    x, weight, dy = problem(3, 7)
    rms_norm(x.requires_grad_(), weight, 1e-6).backward(dy)
    assert weight.grad is None and x.grad is not None


def test_the_operators_and_their_fake_implementations_agree():
    x, weight, dy = problem(13, 77)
    tests = ("test_schema", "test_faketensor")
    heads = torch.randn(5, 9, 77)[:, 3:7]  # of a projection that computes others beside them
    for vectors in (x[:, None], heads):
        torch.library.opcheck(kernels._forward, (vectors, weight, 1e-6, 1.0), test_utils=tests)
    torch.library.opcheck(kernels._backward, (dy, x, weight, torch.ones(13), 1.0), test_utils=tests)
    with FakeTensorMode():
        x = torch.empty(13, 77, dtype=torch.bfloat16, requires_grad=True)
        rms_norm(x, torch.empty(77, dtype=torch.bfloat16), 1e-6).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("match", "x", "weight"),
    [
        (r"\(2, 3\) but weight \(2,\).*reshape", torch.ones(2, 3), torch.ones(2)),
        ("int64 and weight", torch.ones(2, 3, dtype=torch.int64), torch.ones(3)),
        ("x is on cpu but weight on meta", torch.ones(2, 3), torch.ones(3, device="meta")),
        ("vectors of 0 elements", torch.ones(2, 0), torch.ones(0)),
        ("vectors of 20,000 elements", torch.ones(1, 20_000), torch.ones(20_000)),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_both_values(match, x, weight):
    with pytest.raises(ValueError, match=match):
        rms_norm(x, weight, 1e-6)


@pytest.mark.interpreter
def test_rows_past_2_to_the_31_elements_do_not_overflow(monkeypatch):
    H, row = 64, 2**25 + 3
    run_as_program(row, monkeypatch)
    x, y, dx = (far_memory((row + 1) * H) for _ in range(3))
    r, parts = far_memory(row + 1, torch.float32), far_memory((row + 1) * H, torch.float32)
    x[-H:] = torch.randn(H)
    values, ones = x[-H:].float().requires_grad_(), torch.ones(H)
    kernels._forward_kernel[(1,)](x, ones, y, r, row + 1, 1, H, H, 1e-6, 0.0, BLOCK_N=1, BLOCK_H=H)
    expected = rms_norm_reference(values, ones, 1e-6)
    torch.testing.assert_close(y[-H:].float(), expected.detach(), atol=2e-3, rtol=2e-3)

    kernels._backward_kernel[(1,)](x, x, ones, r, dx, parts, row + 1, H, 0.0, 1, BLOCK_N=1, BLOCK_H=H)
    expected.backward(x[-H:].float())
    torch.testing.assert_close(dx[-H:].float(), values.grad, atol=2e-3, rtol=2e-3)
    assert parts[-H:].isfinite().all() and (parts[-H:] != 0).any()


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is the child")
def test_the_kernels_pass_the_same_tests_in_the_interpreter(record_property):
    pass_in_the_interpreter(__file__, record_property)
