"""Test the torch path, and in a child process the Triton kernels in the interpreter.

TRITON_INTERPRET is read when Triton is imported.
"""

import mmap

import pytest
import torch
from children import pass_in_the_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import kit.kernels.cross_entropy as ce
from kit.kernels import backend
from kit.kernels.backend import INTERPRET
from kit.kernels.cross_entropy import cross_entropy, cross_entropy_reference

DTYPES = [torch.float32, torch.float16] if INTERPRET else [torch.float32, torch.float16, torch.bfloat16]
# the kernels are the same for "mean" and "sum"
REDUCTIONS = ["mean", "none"] if INTERPRET else ["mean", "sum", "none"]
# (N, V): one of each; nothing divides anything; several column steps with a ragged end
SHAPES = [(1, 1), (1, 7), (13, 77), (11, 301)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Use blocks of two rows of 77 fp32 columns and steps of 64 columns: small inputs then need several."""
    monkeypatch.setattr(backend, "CPU_BLOCK_BYTES", 700)
    monkeypatch.setattr(ce, "BLOCK_V", 64)


def problem(N, V, dtype, *, ignore=True):
    torch.manual_seed(0)
    logits, targets = (3 * torch.randn(N, V)).to(dtype), torch.randint(V, (N,))
    if N > 2:
        targets[0], targets[1] = 0, V - 1
    if ignore:
        targets[2::5] = -100
    return logits, targets


def reference(logits, targets, *, reduction):
    """Return 0 instead of nan if every target is ignored."""
    losses = cross_entropy_reference(logits, targets, reduction="none")
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / (targets != -100).sum().clamp(min=1)}[
        reduction
    ]


def run(function, logits, targets, dtype, *, upstream=1.0, reduction="mean"):
    leaf = logits.detach().to(dtype).clone().requires_grad_()
    loss = function(leaf, targets, reduction=reduction)
    loss.backward(torch.as_tensor(upstream, dtype=loss.dtype).expand_as(loss))
    return {"loss": loss.detach(), "dlogits": leaf.grad}


def rms(x):
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def check(logits, targets, dtype, **options):
    """Check that the error is at most twice torch's own.

    The floor is one unit in the last place, in case torch is exact by luck: of the gradient; of the logits,
    near 3, whose difference a loss is.
    """
    truth = run(reference, logits, targets, torch.float64, **options)
    torchs, ours = (run(f, logits, targets, dtype, **options) for f in (reference, cross_entropy))
    assert ours["loss"].dtype == torchs["loss"].dtype and ours["dlogits"].dtype == dtype
    for name in truth:
        error, allowed = rms(ours[name] - truth[name]), rms(torchs[name] - truth[name])
        eps = torch.finfo(ours[name].dtype).eps
        assert not ours[name].isnan().any(), name
        assert error <= 2 * allowed + eps * max(rms(truth[name]), 3.0 * (name == "loss")), (
            f"{name}: {error:.1e}, torch {allowed:.1e}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_are_as_good_as_torchs(shape, reduction, dtype):
    logits, targets = problem(*shape, dtype)
    check(
        logits,
        targets,
        dtype,
        reduction=reduction,
        upstream=torch.linspace(-2, 3, shape[0]) if reduction == "none" else 1 / 3,
    )


@settings(max_examples=10 if INTERPRET else 60, deadline=None, database=None)
@given(st.data())
def test_every_shape_agrees_with_float64(data):
    N, V = data.draw(st.integers(0, 14)), data.draw(st.integers(1, 140))
    logits, _ = problem(N, V, torch.float32)
    targets = torch.tensor(
        data.draw(st.lists(st.sampled_from([-100, 0, V // 2, V - 1]), min_size=N, max_size=N))
    ).long()
    truth, ours = (
        run(reference, logits, targets, torch.float64),
        run(cross_entropy, logits, targets, torch.float32),
    )
    # a single number has no typical error to compare with: allow some last places of logits near 10
    for name in truth:
        torch.testing.assert_close(
            ours[name].double(), truth[name], rtol=0, atol=8 * 10 * torch.finfo(torch.float32).eps
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("N", [0, 6])
def test_without_a_single_target_loss_and_gradient_are_zero_not_nan(N, reduction):
    out = run(cross_entropy, torch.randn(N, 70), torch.full((N,), -100), torch.float32, reduction=reduction)
    assert all((x == 0).all() for x in out.values())


def test_adding_200_to_every_logit_changes_nothing():
    logits, targets = problem(13, 77, torch.float32)
    low, high = (run(cross_entropy, logits + x, targets, torch.float32) for x in (0.0, 200.0))
    for name in low:  # fp32 near 200 resolves 1.5e-5
        torch.testing.assert_close(low[name], high[name], atol=1e-4, rtol=0)


def test_masked_logits_of_minus_infinity_are_fine_even_in_a_whole_first_step():
    logits, targets = problem(13, 301, torch.float32)
    logits[:, :200] = -torch.inf
    targets = targets.where(targets == -100, 250)
    check(logits, targets, torch.float32)


@pytest.mark.filterwarnings("ignore:All-NaN")  # numpy in the interpreter warns about it
def test_ignored_rows_may_hold_anything():
    logits, targets = problem(13, 77, torch.float32)
    logits[targets == -100] = torch.nan
    out = run(cross_entropy, logits, targets, torch.float32)
    assert (
        out["loss"].isfinite()
        and (out["dlogits"][targets == -100] == 0).all()
        and out["dlogits"].isfinite().all()
    )


def test_memory_that_is_not_written_is_not_read(monkeypatch):
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **options):
        x = new_empty(*args, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    check(*problem(13, 77, torch.float32), torch.float32)


def test_backward_writes_the_gradient_over_the_logits():
    logits, targets = problem(13, 77, torch.float32)
    expected = run(reference, logits, targets, torch.float32)["dlogits"]
    leaf = torch.zeros(1, requires_grad=True)
    passed = logits + leaf
    loss = cross_entropy(passed, targets)
    assert torch.equal(passed, logits)  # the forward pass leaves them alone
    loss.backward()
    torch.testing.assert_close(passed.detach(), expected)


def test_another_use_of_the_overwritten_logits_raises_instead_of_going_wrong():
    logits, targets = problem(13, 77, torch.float32)
    passed = logits.requires_grad_() * 1
    entropy = passed.exp()  # saves its result, not the logits: unharmed
    squares = passed.square().sum()  # saves the logits
    cross_entropy(passed, targets).backward(retain_graph=True)
    entropy.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_a_second_backward_is_refused():
    logits, targets = problem(13, 77, torch.float32)
    loss = cross_entropy(logits.requires_grad_() * 1, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_nothing_is_overwritten_if_no_gradient_is_needed():
    logits, targets = problem(13, 77, torch.float32)
    before = logits.clone()
    assert not cross_entropy(logits, targets).requires_grad
    assert torch.equal(logits, before)


def test_strided_broadcast_and_transposed_logits_get_the_right_gradient():
    logits, targets = problem(12, 77, torch.float32)
    wide = torch.full((12, 200), torch.nan)
    wide[:, 20:97] = logits
    shifted = torch.cat([logits.view(3, 4, 77), torch.full((3, 1, 77), torch.nan)], 1)
    for view in (wide[:, 20:97], logits.T.contiguous().T, shifted[:, :-1], logits[:1].expand(12, 77)):
        target = targets.view(view.shape[:-1])
        truth = run(reference, view.reshape(12, 77), targets, torch.float64)
        (gradient,) = torch.autograd.grad(cross_entropy(view.requires_grad_(), target), view)
        torch.testing.assert_close(gradient.reshape(12, 77).double(), truth["dlogits"], rtol=1e-5, atol=1e-6)
    assert wide[:, :20].isnan().all() and wide[:, 97:].isnan().all()


def test_fake_tensors_run_forward_and_backward():
    with FakeTensorMode():
        logits = torch.empty(13, 77, dtype=torch.bfloat16, requires_grad=True)
        loss = cross_entropy(logits, torch.empty(13, dtype=torch.int64))
        loss.backward()
    assert logits.grad.shape == logits.shape and loss.dtype == torch.float32


def test_the_operators_and_their_fake_implementations_agree():
    logits, targets = problem(6, 77, torch.float32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ce._forward, (logits, targets, -100), test_utils=tests)
    lse = logits.logsumexp(1)
    torch.library.opcheck(
        ce._backward_, (logits.clone(), targets, lse, torch.ones(6), -100), test_utils=tests
    )


def test_arguments_that_do_not_fit_are_refused_with_both_values():
    logits, targets = problem(6, 70, torch.float32, ignore=False)
    for match, call in {
        r"\(5, 70\).*\(6,\).*shift": lambda: cross_entropy(logits[:-1], targets),
        "float32 and targets torch.float32": lambda: cross_entropy(logits, targets.float()),
        "contains 70 but logits has 70": lambda: cross_entropy(logits, torch.tensor([0, 1, 2, 3, 4, 70])),
        "contains -1": lambda: cross_entropy(logits, torch.tensor([0, 1, 2, 3, 4, -1])),
        "reduction is 'max'": lambda: cross_entropy(logits, targets, reduction="max"),
        "cpu but targets on meta": lambda: cross_entropy(logits, targets.to("meta")),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is the child")
def test_the_triton_kernels_pass_this_file_in_the_interpreter(record_property):
    pass_in_the_interpreter(__file__, record_property, "-W", "error::RuntimeWarning")


FAR_ROW, FAR_STRIDE = 16_383, 262_144  # the last row of 16,384: its offset is 2^32 - 262,144


@pytest.mark.interpreter
def test_the_offset_of_row_16383_of_262144_logits_does_not_overflow(monkeypatch):
    import triton.runtime.interpreter as interpreter

    def create_get_program_id(axis, _get=interpreter.interpreter_builder.create_get_program_id):
        handle = _get(axis)
        handle.data = handle.data + handle.data.dtype.type(FAR_ROW if axis == 0 else 0)
        return handle

    monkeypatch.setattr(
        interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True)
    )
    monkeypatch.setattr(interpreter.interpreter_builder, "create_get_program_id", create_get_program_id)
    # 8 GiB of addresses, of which one page is touched: MAP_NORESERVE (0x4000) commits nothing
    space = mmap.mmap(
        -1, 2 * (FAR_ROW + 1) * FAR_STRIDE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    )
    base = torch.frombuffer(space, dtype=torch.float16)
    logits, values = base[FAR_ROW * FAR_STRIDE :][:60], torch.randn(60).half()
    logits.copy_(values)
    targets = torch.full((FAR_ROW + 1,), 59)
    loss, lse, dloss = torch.empty(FAR_ROW + 1), torch.empty(FAR_ROW + 1), torch.full((FAR_ROW + 1,), 2.0)
    ce._forward_kernel[(1,)](base, targets, loss, lse, FAR_STRIDE, 60, -100, BLOCK_V=64)
    torch.testing.assert_close(loss[-1], -values.float().log_softmax(0)[59])
    ce._backward_kernel[(1, 1)](base, targets, lse, dloss, FAR_STRIDE, 60, -100, BLOCK_V=64)
    expected = 2 * (values.float().softmax(0) - torch.nn.functional.one_hot(torch.tensor(59), 60))
    torch.testing.assert_close(logits, expected.half(), atol=1e-3, rtol=1e-3)
