"""Test the torch path and, in a child process, the real Triton kernels in the interpreter.

A child process is needed because TRITON_INTERPRET is read at import.
"""

import pytest
import torch
from accuracy import check, far_memory, poisoned, run_as_program  # noqa: F401
from children import pass_in_the_interpreter
from torch._subclasses.fake_tensor import FakeTensorMode

import kit.kernels.glu as kernels
from kit.kernels import backend
from kit.kernels.backend import INTERPRET
from kit.kernels.glu import ACTIVATIONS, glu, glu_reference

DTYPES = [torch.float32, torch.float16] if INTERPRET else [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (13, 77), (3, 2, 70), (5,)]

both = pytest.mark.parametrize("activation", ACTIVATIONS)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Two rows of 77 columns per block, programs of 64 columns: small inputs cross every seam."""
    monkeypatch.setattr(backend, "CPU_BLOCK_BYTES", 700)
    monkeypatch.setattr(kernels, "BLOCK", 64)


def problem(*shape):
    torch.manual_seed(0)
    return 3 * torch.randn(shape), torch.randn(shape), torch.randn(shape)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_as_good_as_torchs(shape, dtype, activation, poisoned):  # noqa: F811
    gate, up, dy = problem(*shape)
    check(
        lambda gate, up: glu(gate, up, activation=activation),
        lambda gate, up: glu_reference(gate, up, activation=activation),
        [gate, up],
        [dy],
        dtype,
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy remarks on it
@both
def test_gates_far_from_zero_saturate_and_never_give_nan(activation):
    gate = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4])
    leaf, up = (gate * 1).requires_grad_(), torch.ones(7, requires_grad=True)
    y = glu(leaf * 1, up * 1, activation=activation)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), glu_reference(gate, torch.ones(7), activation=activation))
    torch.testing.assert_close(leaf.grad, torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]))


def test_backward_writes_the_gradients_over_gate_and_up():
    gate, up, dy = problem(13, 77)
    leaf = torch.zeros(1, requires_grad=True)
    passed = [gate + leaf, up + leaf]
    y = glu(*passed)
    assert torch.equal(passed[0], gate) and torch.equal(passed[1], up)  # the forward pass leaves them alone
    y.backward(dy)
    leaves = [x.clone().requires_grad_() for x in (gate, up)]
    glu_reference(*leaves).backward(dy)
    for overwritten, expected in zip(passed, leaves, strict=True):
        torch.testing.assert_close(overwritten.detach(), expected.grad)


def test_another_use_of_the_overwritten_gate_raises_instead_of_going_wrong():
    gate, up, _ = problem(13, 77)
    passed = gate.requires_grad_() * 1
    squares = passed.square().sum()  # saves the gate
    glu(passed, up.clone()).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_a_second_backward_is_refused():
    gate, up, _ = problem(13, 77)
    y = glu(gate.requires_grad_() * 1, up).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_nothing_is_overwritten_if_no_gradient_is_asked_for():
    gate, up, _ = problem(13, 77)
    before = gate.clone()
    assert not glu(gate, up).requires_grad and torch.equal(gate, before)


def test_the_halves_of_one_projection_are_taken_as_they_are_and_get_their_own_gradients():
    gate, up, dy = problem(13, 77)
    joined = torch.cat([gate, up], 1).requires_grad_()
    glu(*(joined * 1).chunk(2, dim=1)).backward(dy)
    leaves = [x.requires_grad_() for x in (gate, up)]
    glu_reference(*leaves).backward(dy)
    torch.testing.assert_close(joined.grad, torch.cat([leaf.grad for leaf in leaves], 1))


def test_gate_and_up_may_lie_at_different_distances():
    gate, up, dy = problem(13, 77)
    wide = torch.full((13, 200), torch.nan)
    wide[:, 20:97] = up
    leaves = [(wide.requires_grad_() * 1)[:, 20:97], gate.clone().requires_grad_()]
    y = glu(leaves[1] * 1, leaves[0])
    y.backward(dy)
    expected = [x.requires_grad_() for x in (gate, up)]
    right = glu_reference(*expected)
    right.backward(dy)
    torch.testing.assert_close(y.detach(), right.detach())
    torch.testing.assert_close(leaves[1].grad, expected[0].grad)
    torch.testing.assert_close(wide.grad[:, 20:97], expected[1].grad)
    assert (wide.grad[:, :20] == 0).all() and (wide.grad[:, 97:] == 0).all()


def test_expanded_rows_are_copied_so_that_each_gets_its_own_gradient():
    gate, up, dy = problem(4, 77)
    leaf = gate[:1].clone().requires_grad_()
    glu(leaf.expand(4, 77), up.clone()).backward(dy)
    expected = gate[:1].clone().requires_grad_()
    glu_reference(expected.expand(4, 77), up).backward(dy)
    torch.testing.assert_close(leaf.grad, expected.grad)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_nothing_in_gives_nothing_out(shape):
    gate = torch.empty(shape, requires_grad=True)
    glu(gate * 1, torch.empty(shape)).sum().backward()
    assert gate.grad.shape == shape


def test_the_operators_and_their_fake_implementations_agree():
    gate, up, dy = problem(13, 77)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels._forward, (gate, up, "silu"), test_utils=tests)
    torch.library.opcheck(kernels._backward_, (gate, up, dy, "gelu_tanh"), test_utils=tests)
    with FakeTensorMode():
        gate = torch.empty(13, 77, dtype=torch.bfloat16, requires_grad=True)
        glu(gate, torch.empty(13, 77, dtype=torch.bfloat16)).sum().backward()
    assert gate.grad.shape == gate.shape


@pytest.mark.parametrize(
    ("match", "gate", "up", "activation"),
    [
        (r"\(2, 3\) but up \(2, 4\)", torch.ones(2, 3), torch.ones(2, 4), "silu"),
        ("float32 on cpu but up torch.float16", torch.ones(2, 3), torch.ones(2, 3).half(), "silu"),
        ("int64", torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64), "silu"),
        ("activation is 'relu'", torch.ones(2, 3), torch.ones(2, 3), "relu"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_both_values(match, gate, up, activation):
    with pytest.raises(ValueError, match=match):
        glu(gate, up, activation=activation)


@pytest.mark.parametrize(
    "views",
    [
        lambda h: (h, h),
        lambda h: (h[:, :8], h[:, 1:9]),  # columns that overlap
        lambda h: (h[:, 9:], h[:, :9]),  # that do not
        lambda h: (h[:6], h[6:]),
        lambda h: (h[:6], h[1:7]),
    ],
)
def test_views_of_one_tensor_get_their_gradients_added_whether_they_overlap_or_not(views):
    x, dy = problem(12, 18)[0], torch.randn(12, 18)
    gradients = []
    for function in (glu, glu_reference):
        leaf = x.clone().requires_grad_()
        gate, up = views(leaf * 1)
        function(gate, up).backward(dy[: gate.shape[0], : gate.shape[1]])
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_only_views_that_overlap_are_copied():
    h = torch.zeros(12, 18)
    overlaps = [
        kernels._overlap(*views) for views in ((h[:, :9], h[:, 9:]), (h[:6], h[6:]), (h[:, :8], h[:, 1:9]))
    ]
    assert overlaps == [False, False, True]


@pytest.mark.interpreter
def test_rows_past_2_to_the_31_elements_do_not_overflow(monkeypatch):
    N, width = 2**21 + 1, 1_024
    run_as_program(N - 1, monkeypatch)
    gate, up, y = (far_memory(N * width) for _ in range(3))
    for x in (gate, up):
        x[-width:] = torch.randn(width)
    last = [x[-width:].double().requires_grad_() for x in (gate, up)]
    expected = glu_reference(*last)
    sizes = (width, width, width, 1.0, 0.0)
    kernels._forward_kernel[(1, 1)](gate, up, y, *sizes, BLOCK=width)
    torch.testing.assert_close(y[-width:].double(), expected.detach(), atol=1e-2, rtol=1e-2)

    kernels._backward_kernel[(1, 1)](gate, up, y, *sizes, BLOCK=width)
    expected.backward(y[-width:].double())
    for x, leaf in zip((gate, up), last, strict=True):
        torch.testing.assert_close(x[-width:].double(), leaf.grad, atol=2e-2, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is the child")
def test_the_kernels_pass_the_same_tests_in_the_interpreter(record_property):
    pass_in_the_interpreter(__file__, record_property)
