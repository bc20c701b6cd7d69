"""Test the torch path, and in a child process the Triton kernels in the interpreter.

TRITON_INTERPRET is read when Triton is imported.
"""

import contextlib
import mmap
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from children import pass_in_the_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kit.kernels.linear_cross_entropy as lce
import kit.kernels.linear_cross_entropy_chunks as head
import kit.kernels.linear_cross_entropy_rows as logit_rows
from kit.kernels import backend
from kit.kernels.backend import INTERPRET
from kit.kernels.cross_entropy import IGNORE_INDEX
from kit.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    token_logprobs,
)
from kit.kernels.linear_cross_entropy_rows import row_gradients_, row_logprobs
from kit.memory.live_bytes import LiveBytes

DTYPES = [torch.float32, torch.float16] if INTERPRET else [torch.float32, torch.float16, torch.bfloat16]
# the kernels are the same for "mean" and "sum"
REDUCTIONS = ["mean", "none"] if INTERPRET else ["mean", "sum", "none"]
NAMES = ("loss", "dhidden", "dweight")
# (N, V, H): one row; nothing divides anything; several column steps with a ragged end
SHAPES = [(1, 7, 3), (13, 77, 19), (11, 301, 24)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Use chunks of 5 rows at most, blocks of 2 rows of 77 fp32 columns and steps of 64 columns.

    Small inputs then need several of each.
    """
    monkeypatch.setattr(head, "MIN_ROWS", 5)
    monkeypatch.setattr(head, "MAX_CHUNK_BYTES", 1)
    monkeypatch.setattr(head, "PRODUCT_BYTES", {"cpu": 32 * 19 * 4})
    monkeypatch.setattr(backend, "CPU_BLOCK_BYTES", 700)
    monkeypatch.setattr(logit_rows, "BLOCK_V", 64)


def problem(N, V, H, dtype, *, ignore=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator).to(dtype)
    weight = torch.randn(V, H, generator=generator).to(dtype)
    targets = torch.randint(V, (N,), generator=generator)
    if N > 2:
        targets[0], targets[1] = 0, V - 1
    if ignore:
        targets[2::5] = IGNORE_INDEX
    return hidden, weight, targets


def plain(
    hidden,
    weight,
    targets,
    *,
    reduction="mean",
    token_weight=None,
    objective=None,
    softcap=None,
    temperature=1.0,
    max_rows=0,
):
    """Compute what linear_cross_entropy promises, in plain autograd."""
    logits = hidden @ weight.T if hidden.dtype == torch.float64 else (hidden @ weight.T).float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    kept = targets != IGNORE_INDEX
    logprobs = (logits / temperature).log_softmax(-1).gather(-1, targets.masked_fill(~kept, 0)[:, None])[:, 0]
    losses = -logprobs if objective is None else objective(logprobs, torch.arange(len(targets)))
    losses = losses if token_weight is None else losses * token_weight
    losses = losses.masked_fill(~kept, 0)
    return (
        losses
        if reduction == "none"
        else losses.sum() / (kept.sum().clamp(min=1) if reduction == "mean" else 1)
    )


def run(function, hidden, weight, targets, dtype, upstream=1.0, **options):
    h, w = (x.detach().to(dtype).clone().requires_grad_() for x in (hidden, weight))
    loss = function(h, w, targets, **options)
    loss.backward(torch.as_tensor(upstream, dtype=loss.dtype).expand_as(loss))
    return dict(zip(NAMES, (loss.detach(), h.grad, w.grad), strict=True))


def rms(x):
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def assert_as_good_as_torch(ours, torchs, truth, dtype, unit=0.0):
    """Check that the error is at most twice torch's own.

    The floor is one unit in the last place, in case torch is exact by luck: of the result; for a log-prob, of
    the numbers near 1 whose difference it is; of `unit`, if a result has few elements.
    """
    for name in truth:
        error, allowed = rms(ours[name] - truth[name]), rms(torchs[name] - truth[name])
        size = max(rms(truth[name]), unit, 0.0 if name.startswith("d") else 1.0)
        assert not ours[name].isnan().any(), name
        assert error <= 2 * allowed + torch.finfo(dtype).eps * size, (
            f"{name}: {error:.2e} off, torch {allowed:.2e}"
        )


def check(hidden, weight, targets, dtype, unit=0.0, **options):
    truth = run(plain, hidden, weight, targets, torch.float64, **options)
    torchs, ours = (run(f, hidden, weight, targets, dtype, **options) for f in (plain, linear_cross_entropy))
    assert_as_good_as_torch(ours, torchs, truth, dtype, unit)


def grpo(old, advantage, eps=0.2):
    def objective(logprobs, rows):
        ratio = (logprobs - old[rows]).exp()
        return -torch.minimum(ratio * advantage[rows], ratio.clamp(1 - eps, 1 + eps) * advantage[rows])

    return objective


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_are_as_good_as_torchs(shape, reduction, dtype):
    hidden, weight, targets = problem(*shape, dtype)
    upstream = torch.linspace(-2, 3, shape[0], dtype=torch.float64) if reduction == "none" else 1 / 3
    check(hidden, weight, targets, dtype, unit=float(shape[0] == 1), reduction=reduction, upstream=upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_softcap_temperature_and_token_weights_are_as_good_as_torchs(reduction, dtype):
    hidden, weight, targets = problem(13, 77, 19, dtype)
    token_weight = torch.linspace(-1, 2, 13)
    check(hidden, weight, targets, dtype, reduction=reduction, softcap=3.0)
    # tanh of small numbers must keep their digits
    check(hidden, weight, targets, dtype, reduction=reduction, softcap=1000.0)
    check(hidden, weight, targets, dtype, reduction=reduction, softcap=30.0, temperature=0.6)
    check(hidden, weight, targets, dtype, reduction=reduction, temperature=1.7, token_weight=token_weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS[:-1])
def test_an_objective_of_the_log_prob_is_as_good_as_autograd(reduction, dtype):
    hidden, weight, targets = problem(23, 77, 19, dtype)
    noise, advantage = (
        torch.linspace(-0.5, 0.5, 23, dtype=torch.float64),
        torch.linspace(2, -1, 23, dtype=torch.float64),
    )
    # ratios on both sides of both clips
    old = -plain(hidden.double(), weight.double(), targets, reduction="none") + noise
    check(hidden, weight, targets, dtype, reduction=reduction, objective=grpo(old, advantage))
    check(
        hidden,
        weight,
        targets,
        dtype,
        objective=grpo(old, advantage),
        token_weight=torch.rand(23),
        temperature=0.9,
    )


def test_an_objective_is_given_the_indices_of_its_own_tokens():
    hidden, weight, targets = problem(23, 77, 19, torch.float32)
    seen = []

    def objective(logprobs, rows):
        seen.append(rows)
        torch.testing.assert_close(logprobs.detach(), -plain(hidden, weight, targets, reduction="none")[rows])
        return -logprobs

    linear_cross_entropy(hidden.view(1, 23, 19), weight, targets.view(1, 23), objective=objective)
    assert torch.equal(torch.cat(seen), (targets != IGNORE_INDEX).nonzero()[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_and_entropy_are_as_good_as_torchs(temperature, dtype):
    hidden, weight, targets = problem(13, 301, 19, dtype)

    def expected(hidden, weight):
        logits = hidden @ weight.T / temperature
        logp = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
        kept = targets != IGNORE_INDEX
        return {
            "logprobs": logp.gather(1, targets.clamp(min=0)[:, None])[:, 0] * kept,
            "entropy": -(logp.exp() * logp).sum(1) * kept,
        }

    ours = dict(
        zip(
            ("logprobs", "entropy"),
            token_logprobs(hidden, weight, targets, temperature=temperature),
            strict=True,
        )
    )
    assert_as_good_as_torch(ours, expected(hidden, weight), expected(hidden.double(), weight.double()), dtype)
    assert all(x.dtype == torch.float32 and (x[targets == IGNORE_INDEX] == 0).all() for x in ours.values())


def test_log_probs_carry_a_gradient_and_the_entropy_does_not():
    hidden, weight, targets = problem(6, 70, 8, torch.float32)
    logprobs, entropy = token_logprobs(hidden.requires_grad_(), weight, targets)
    assert not entropy.requires_grad
    logprobs.sum().backward()
    torch.testing.assert_close(
        hidden.grad, -run(plain, hidden, weight, targets, torch.float32, reduction="sum")["dhidden"]
    )


@settings(max_examples=10 if INTERPRET else 60, deadline=None, database=None)
@given(st.data())
def test_every_shape_agrees_with_float64(data):
    N, V, H = data.draw(st.integers(0, 14)), data.draw(st.integers(1, 140)), data.draw(st.integers(1, 9))
    hidden, weight, _ = problem(N, V, H, torch.float32)
    targets = torch.tensor(
        data.draw(st.lists(st.sampled_from([IGNORE_INDEX, 0, V // 2, V - 1]), min_size=N, max_size=N))
    )
    options = {
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
        "softcap": data.draw(st.sampled_from([None, 4.0])),
    }
    # A sum of n products, in whatever order a matmul adds them, is off by about sqrt(n) units in the last
    # place of the sum of their sizes. dhidden sums V of p * w; the others N of the largest loss or |h|.
    unit = 1.0
    if N:
        logits = hidden @ weight.T
        losses = logits.logsumexp(-1) + logits.abs().amax(-1)
        largest = max(losses.max().item(), hidden.abs().max().item())
        unit = max(2 * V**0.5 * weight.abs().max().item(), N**1.5 * largest)
    check(hidden, weight, targets.long(), torch.float32, unit, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("N", [0, 6])
def test_without_a_single_target_loss_and_gradients_are_zero_not_nan(N, reduction):
    hidden, weight, _ = problem(N, 70, 8, torch.float32)
    out = run(
        linear_cross_entropy,
        hidden,
        weight,
        torch.full((N,), IGNORE_INDEX),
        torch.float32,
        reduction=reduction,
    )
    assert all((x == 0).all() for x in out.values())
    assert all(
        (x == 0).all() and len(x) == N for x in token_logprobs(hidden, weight, torch.full((N,), IGNORE_INDEX))
    )


def test_adding_200_to_every_logit_changes_nothing():
    hidden, weight, targets = problem(13, 77, 8, torch.float32)
    hidden, low, high = (
        torch.cat([hidden, torch.ones(13, 1)], 1),
        torch.zeros(77, 1),
        torch.full((77, 1), 200.0),
    )
    a, b = (
        run(linear_cross_entropy, hidden, torch.cat([weight, x], 1), targets, torch.float32)
        for x in (low, high)
    )
    for name in ("loss", "dweight"):  # fp32 near 200 resolves 1.5e-5
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=0)
    entropy = [token_logprobs(hidden, torch.cat([weight, x], 1), targets)[1] for x in (low, high)]
    torch.testing.assert_close(*entropy, atol=1e-4, rtol=0)


def test_ignored_rows_may_hold_anything():
    hidden, weight, targets = problem(13, 77, 19, torch.float32)
    clean = run(linear_cross_entropy, hidden, weight, targets, torch.float32)
    hidden[targets == IGNORE_INDEX] = torch.nan
    dirty = run(linear_cross_entropy, hidden, weight, targets, torch.float32)
    assert all(torch.equal(clean[name], dirty[name]) for name in NAMES)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strided_transposed_and_broadcast_inputs_are_read_right(reduction):
    hidden, weight, targets = problem(12, 77, 10, torch.float32)
    truth = run(plain, hidden, weight, targets, torch.float64, reduction=reduction)
    wide_hidden, wide_weight = torch.full((12, 25), torch.nan), torch.full((77, 31), torch.nan)
    wide_hidden[:, 3:13], wide_weight[:, 5:15] = hidden, weight
    for h, w in (
        (wide_hidden[:, 3:13], wide_weight[:, 5:15]),
        (hidden.T.contiguous().T, weight.T.contiguous().T),
    ):
        h, w = h.requires_grad_(), w.requires_grad_()
        loss = linear_cross_entropy(
            h.view(12, 10).unflatten(0, (3, 4)), w, targets.view(3, 4), reduction=reduction
        )
        dh, dw = torch.autograd.grad(loss.sum(), (h, w))
        torch.testing.assert_close(dh.double(), truth["dhidden"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dw.double(), truth["dweight"], rtol=1e-5, atol=1e-6)
    one = hidden[:1].expand(12, 10)
    assert_as_good_as_torch(
        *(run(f, one, weight, targets, torch.float32) for f in (linear_cross_entropy, plain)),
        run(plain, one, weight, targets, torch.float64), torch.float32,
    )  # fmt: skip


def test_the_kernels_honour_a_row_stride_and_touch_nothing_beside_their_rows():
    _, logits, targets = problem(6, 6, 150, torch.float32, ignore=False)
    wide = torch.full((6, 200), torch.nan)
    wide[:, 20:170] = logits
    for row_op in (row_gradients_, lambda *a: row_logprobs(*a)[0]):
        buffer = wide.clone()
        logprobs = row_op(buffer[:, 20:170], targets, 1.0, 0.0)
        torch.testing.assert_close(logprobs, logits.log_softmax(1).gather(1, targets[:, None])[:, 0])
        assert buffer[:, :20].isnan().all() and buffer[:, 170:].isnan().all()
    buffer = wide.clone()
    row_gradients_(buffer[:, 20:170], targets, 1.0, 0.0)
    one_hot = torch.nn.functional.one_hot(targets, 150)
    torch.testing.assert_close(buffer[:, 20:170], logits.softmax(1) - one_hot, atol=1e-6, rtol=1e-5)


def test_memory_that_is_not_written_is_not_read(monkeypatch):
    """Memory that is allocated uninitialised starts as nan."""

    def poison(x):
        return x.fill_(torch.nan) if x.is_floating_point() else x

    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **options: poison(new_empty(*args, **options))
    )
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poison(empty_like(*args, **options)))
    hidden, weight, targets = problem(13, 77, 19, torch.float32)
    for reduction in ("mean", "none"):
        check(hidden, weight, targets, torch.float32, reduction=reduction)
    assert not any(x.isnan().any() for x in token_logprobs(hidden, weight, targets))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needs", list(product([False, True], repeat=2)), ids=str)
def test_only_the_gradients_that_autograd_asks_for_are_computed(needs, reduction, monkeypatch):
    hidden, weight, targets = problem(13, 77, 19, torch.float32)
    truth = run(plain, hidden, weight, targets, torch.float64)
    made = []
    monkeypatch.setattr(
        head.HeadGradients,
        "finish",
        lambda self, _finish=head.HeadGradients.finish: made.append(self) or _finish(self),
    )
    hidden.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    assert loss.requires_grad == any(needs)
    if any(needs):
        (loss.sum() / (targets != IGNORE_INDEX).sum() if reduction == "none" else loss).backward()
    assert len(made) == any(needs)
    for x, name, needed in ((hidden, "dhidden", needs[0]), (weight, "dweight", needs[1])):
        assert (x.grad is not None) == needed
        assert not made or (getattr(made[0], name) is not None) == needed
        if needed:
            torch.testing.assert_close(x.grad.double(), truth[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_rows", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_hidden_can_be_written_over_hidden(dtype, max_rows):
    """The bits are the same, and rows without a target become zeros, whatever they were."""
    leaf, weight, targets = problem(13, 77, 19, dtype)
    leaf[targets == IGNORE_INDEX] = torch.nan
    grads, places = [], []
    for overwrite in (False, True):
        x, w = leaf.clone().requires_grad_(), weight.clone().requires_grad_()
        hidden = x.view_as(x) * 1  # which no graph reads again
        hidden.register_hook(lambda gradient: places.append(gradient.data_ptr()))
        linear_cross_entropy(hidden, w, targets, max_rows=max_rows, overwrite_hidden=overwrite).backward()
        grads.append((x.grad, w.grad))
        assert (places[-1] == hidden.data_ptr()) == (overwrite and dtype != torch.float16)
    assert all(torch.equal(plain, ours) for plain, ours in zip(*grads, strict=True))
    assert (grads[1][0][targets == IGNORE_INDEX] == 0).all()


def test_hidden_that_a_graph_reads_again_or_whose_rows_share_memory_is_not_overwritten_unseen():
    hidden, weight, targets = problem(13, 77, 19, torch.float32)
    kept = hidden.clone().requires_grad_()
    loss = linear_cross_entropy(kept.exp(), weight, targets, overwrite_hidden=True)  # exp saves its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    row = hidden[:1].clone().requires_grad_()
    linear_cross_entropy(row.expand(13, -1), weight, targets, overwrite_hidden=True).backward()
    again = hidden[:1].clone().requires_grad_()
    linear_cross_entropy(again.expand(13, -1), weight, targets).backward()
    assert torch.equal(row.grad, again.grad)
    frozen, trained = hidden.clone(), weight.clone().requires_grad_()
    linear_cross_entropy(frozen, trained, targets, overwrite_hidden=True).backward()
    assert torch.equal(frozen, hidden)


def test_no_gradient_is_computed_under_no_grad(monkeypatch):
    hidden, weight, targets = problem(13, 77, 19, torch.float32)
    monkeypatch.setattr(head.HeadGradients, "add", None)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
    torch.testing.assert_close(loss, plain(hidden, weight, targets).detach())


def test_tied_embedding_and_head_get_one_summed_gradient():
    hidden, weight, targets = problem(13, 77, 19, torch.float32)
    ids = torch.arange(13)

    def tied(function, dtype):
        w = weight.to(dtype).clone().requires_grad_()
        function(hidden.to(dtype) * w[ids], w, targets).backward()
        return {"dweight": w.grad}

    assert_as_good_as_torch(
        tied(linear_cross_entropy, torch.float32),
        tied(plain, torch.float32),
        tied(plain, torch.float64),
        torch.float32,
    )


def test_a_second_backward_is_refused_and_none_may_run_again():
    hidden, weight, targets = problem(13, 77, 19, torch.float32)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    losses = linear_cross_entropy(hidden, weight, targets, reduction="none")
    first, second = (torch.autograd.grad(losses.sum(), hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.skipif(INTERPRET, reason="about sums, not kernels, and slow")
def test_sixteen_bit_gradients_of_many_chunks_are_summed_in_fp32():
    """1,024 equal rows in chunks of 5: bf16 sums of 205 equal terms stop growing at 2^8 of them."""
    dtype = torch.bfloat16
    hidden, weight = torch.ones(1024, 1, dtype=dtype), torch.zeros(2, 1, dtype=dtype)
    out = run(linear_cross_entropy, hidden, weight, torch.zeros(1024).long(), dtype, reduction="sum")
    assert out["dweight"].tolist() == [[-512.0], [512.0]]


@pytest.mark.skipif(INTERPRET, reason="about sums, not kernels, and slow")
def test_small_fp16_gradients_survive_until_the_loss_scale_arrives():
    """A mean over 2,048 targets divides gradients down to 1e-7, where fp16 has three digits or none."""
    hidden, weight, targets = problem(2048, 7, 3, torch.float16)
    check(hidden * 2**-6, weight * 2**-6, targets, torch.float16, upstream=2.0**16)


def test_autocast_decides_the_matmul_dtype_and_an_fp32_weight_gets_fp32_sums():
    dtype = torch.float16 if INTERPRET else torch.bfloat16
    hidden, weight, targets = problem(13, 77, 19, torch.float32)
    with torch.autocast("cpu", dtype):
        ours = run(linear_cross_entropy, hidden, weight, targets, torch.float32)
        torchs = run(plain, hidden, weight, targets, torch.float32)
    assert ours["loss"].dtype == ours["dweight"].dtype == torch.float32
    assert_as_good_as_torch(ours, torchs, run(plain, hidden, weight, targets, torch.float64), dtype)
    assert torch.equal(ours["loss"], linear_cross_entropy(hidden.to(dtype), weight.to(dtype), targets))
    h = hidden.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        linear_cross_entropy(h, weight, targets).backward()
    assert h.grad.dtype == dtype


@pytest.mark.skipif(INTERPRET, reason="float64 never reaches the kernels")
def test_float64_is_float64_throughout():
    hidden, weight, targets = problem(7, 11, 3, torch.float64)
    for options in (
        {},
        {"softcap": 2.0, "temperature": 0.7},
        {"objective": lambda logprobs, rows: logprobs.exp()},
    ):
        ours, truth = (
            run(f, hidden, weight, targets, torch.float64, **options) for f in (linear_cross_entropy, plain)
        )
        for name in NAMES:
            torch.testing.assert_close(ours[name], truth[name], rtol=1e-12, atol=1e-14)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, reduction="none", softcap=2.0), (hidden, weight)
    )


def compiled_and_eager(call, *tensors):
    """Return value and gradients of both, through one graph without a break."""
    torch.compiler.reset()
    results = []
    for function in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in tensors]
        value = function(*inputs)
        value.backward()
        results.append([value.detach(), *(x.grad for x in inputs)])
    return results


about_graphs = pytest.mark.skipif(INTERPRET, reason="the graph holds operators, whatever these run")


@about_graphs
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum", "softcap": 3.0, "max_rows": 2},
        {"reduction": "none", "temperature": 0.7, "max_rows": 5},
    ],
    ids=str,
)
def test_torch_compile_puts_the_loss_into_one_graph_and_changes_nothing(options, needs, monkeypatch):
    hidden, weight, targets = problem(13, 77, 19, torch.float32)
    token_weight = torch.linspace(-1, 2, 13)
    hidden.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])

    def call(hidden, weight):
        losses = linear_cross_entropy(hidden * 2, weight, targets, token_weight=token_weight, **options)
        return (losses * torch.arange(13)).sum() if options.get("reduction") == "none" else losses * 3

    made, finish = [], head.HeadGradients.finish
    wanted = lambda self: made.append((self.dhidden is not None, self.dweight is not None)) or finish(self)  # noqa: E731
    monkeypatch.setattr(head.HeadGradients, "finish", wanted)
    compiled, eager = compiled_and_eager(call, hidden, weight)
    assert set(made) == {needs} and len(made) == 2  # a gradient that is not needed would cost a matmul
    assert [x is None for x in compiled] == [False, not needs[0], not needs[1]]
    for x, y in zip(compiled, eager, strict=True):
        assert x is y is None or torch.equal(x, y)


@about_graphs
def test_torch_compile_accepts_scoring_too_and_an_objective_with_a_break():
    hidden, weight, targets = problem(13, 77, 19, torch.float32)

    def score(hidden, weight):
        logprobs, entropy = token_logprobs(hidden, weight, targets, temperature=0.7)
        return (logprobs * entropy.detach()).sum()

    compiled, eager = compiled_and_eager(score, hidden.requires_grad_(), weight.requires_grad_())
    assert all(torch.equal(x, y) for x, y in zip(compiled, eager, strict=True))
    torch.compiler.reset()
    objective = grpo(torch.zeros(13), torch.ones(13))
    loss = torch.compile(
        lambda h: linear_cross_entropy(h, weight, targets, objective=objective), backend="aot_eager"
    )(hidden)
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, targets, objective=objective))


@about_graphs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_a_compiled_call_have_the_dtypes_of_their_inputs(dtype):
    hidden, weight, targets = problem(13, 77, 19, dtype)

    def call(hidden, weight):
        return linear_cross_entropy(hidden, weight, targets) * 2

    compiled, eager = compiled_and_eager(call, hidden.requires_grad_(), weight.requires_grad_())
    assert compiled[1].dtype == compiled[2].dtype == dtype
    assert all(torch.equal(x, y) for x, y in zip(compiled, eager, strict=True))


@about_graphs
def test_a_target_outside_the_vocabulary_is_refused_in_a_compiled_call_too():
    hidden, weight, targets = problem(6, 70, 8, torch.float32)
    torch.compiler.reset()
    call = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="70 rows"):
        call(hidden, weight, targets.fill_(70))


@pytest.mark.skipif(INTERPRET, reason="runs no kernel")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_fake_tensors_make_the_same_calls_and_allocations(frozen, reduction):
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            if isinstance(out, torch.Tensor):
                calls.append((str(func), tuple(out.shape), out.dtype))
            return out

    recorded = []
    for mode in (contextlib.nullcontext(), FakeTensorMode()):
        calls = []
        with mode:
            hidden = torch.ones(13, 19, dtype=torch.bfloat16).requires_grad_()
            weight = torch.ones(77, 19, dtype=torch.bfloat16).requires_grad_(not frozen)
            targets = torch.ones(13, dtype=torch.int64)
            with Record():
                linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum().backward()
        assert hidden.grad.shape == hidden.shape and (weight.grad is None) == frozen
        recorded.append(calls)
    assert recorded[0] == recorded[1] and len(recorded[0]) > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_card_the_sum_over_the_vocabulary_is_never_rounded_on_its_way(dtype):
    with FakeTensorMode():
        dlogits, weight = (torch.empty(*shape, dtype=dtype, device="cuda") for shape in ((5, 77), (77, 19)))
        assert head._product(dlogits, weight).dtype == torch.float32
        hidden, x = (torch.empty(n, 19, dtype=dtype, device="cuda") for n in (9, 5))
        gradients = head.HeadGradients(hidden, weight, (True, False))
        rows = torch.empty(5, dtype=torch.int64, device="cuda")
        gradients.add(rows, x, dlogits, weight, None, 0.5)
        assert gradients.finish()[0].dtype == (torch.float32 if dtype == torch.float16 else dtype)


def test_if_a_card_cannot_add_to_an_fp32_sum_in_one_call_the_products_fit_its_cache(monkeypatch):
    monkeypatch.undo()  # the real sizes
    with FakeTensorMode():
        total = torch.empty(262_144, 1_152, device="cuda")
        a, b = (
            torch.empty(*shape, dtype=torch.bfloat16, device="cuda")
            for shape in ((262_144, 700), (700, 1_152))
        )
        for beta in (0.0, 1.0):
            with LiveBytes() as held:
                head._add_matmul_in_pieces_(total, a, b, 0.5, beta)
            assert 0 < held.peak <= 2 * 2 * 2**20


@pytest.mark.parametrize("error", [RuntimeError("self must be bf16"), TypeError("no argument out_dtype")])
def test_a_torch_that_refuses_to_add_to_an_fp32_sum_is_asked_once_and_named_in_a_warning(error, monkeypatch):
    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr(torch, "addmm", refuse)
    with (
        FakeTensorMode(),
        pytest.warns(UserWarning, match=rf"cannot add torch.bfloat16 products .*\({error}\)"),
    ):
        assert not head._cuda_adds_in_fp32.__wrapped__(torch.bfloat16)


def test_the_operators_and_their_fake_implementations_agree():
    hidden, weight, targets = problem(6, 77, 19, torch.float32, ignore=False)
    logits = hidden @ weight.T
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(row_gradients_, (logits.clone(), targets, 1.0, 0.0), test_utils=tests)
    torch.library.opcheck(row_logprobs, (logits.clone(), targets, 0.5, 3.0), test_utils=tests)
    torch.library.opcheck(
        head.add_matmul_, (torch.zeros(77, 19), logits.T, hidden, 0.5, 1.0), test_utils=tests
    )
    torch.library.opcheck(head._scale_, (hidden.clone(), torch.tensor(2.0)), test_utils=tests)
    torch.library.opcheck(lce.kept_rows, (targets, 77, IGNORE_INDEX), test_utils=tests)
    loss, logprobs = torch.ops.kit.linear_cross_entropy, torch.ops.kit.linear_logprobs
    gradients = torch.ops.kit.linear_logprobs_backward
    for dtype, wanted in product(DTYPES, ([True, True], [True, False], [False, False])):
        x, w, settings = hidden.to(dtype), weight.to(dtype), (dtype, [0.5, 3.0], IGNORE_INDEX)
        for operator, arguments in (
            (loss, (x, w, targets, None, *settings, True, 2, wanted)),
            (logprobs, (x, w, targets, *settings, 2)),
            (gradients, (x, w, targets, torch.ones(6), *settings, 2, wanted)),
        ):
            torch.library.opcheck(operator, arguments, test_utils=tests)


def test_chunks_have_512_rows_or_512_mib_and_equal_sizes(monkeypatch):
    monkeypatch.undo()
    assert head.rows_per_chunk(16384, 262144, 0, 2) == 1024
    # 17 chunks: three matrices of 1,152 columns count too
    assert head.rows_per_chunk(16384, 262144, 1152, 2) == 964
    assert head.rows_per_chunk(16384, 262144, 1152, 4) == 512
    assert head.rows_per_chunk(16384, 2**20, 640, 4) == 512  # the chunk is 2 GiB then
    assert head.rows_per_chunk(513, 262144, 640, 4) == 257  # not 512 and 1
    assert head.rows_per_chunk(0, 262144, 640, 4) == 0
    assert head.rows_per_chunk(16384, 262144, 1152, 2, max_rows=512) == 512
    assert (
        head.rows_per_chunk(13, 77, 19, 2, max_rows=5) == 5
        and head.rows_per_chunk(11, 77, 19, 2, max_rows=5) == 4
    )


@pytest.mark.parametrize("max_rows", [1, 5, 13, 14])
def test_a_caller_may_ask_for_fewer_rows_at_once(max_rows, monkeypatch):
    monkeypatch.undo()
    hidden, weight, targets = problem(13, 77, 19, torch.float32)
    check(hidden, weight, targets, torch.float32, reduction="sum", max_rows=max_rows)
    with monkeypatch.context() as patch:
        sizes = []
        patch.setattr(
            lce, "row_gradients_", lambda logits, *_: sizes.append(len(logits)) or row_gradients_(logits, *_)
        )
        linear_cross_entropy(hidden.requires_grad_(), weight, targets, max_rows=max_rows)
        forward, backward = sizes.copy(), []
        patch.setattr(
            lce,
            "row_gradients_",
            lambda logits, *_: backward.append(len(logits)) or row_gradients_(logits, *_),
        )
        patch.setattr(
            lce, "row_logprobs", lambda logits, *_: read.append(len(logits)) or row_logprobs(logits, *_)
        )
        for losses in (
            lambda: linear_cross_entropy(hidden, weight, targets, reduction="none", max_rows=max_rows),
            lambda: token_logprobs(hidden, weight, targets, max_rows=max_rows)[0],
        ):
            read, backward[:] = [], []
            losses().sum().backward()
            assert read == backward == forward  # if logits are computed twice, both times
    kept = int((targets != IGNORE_INDEX).sum())
    assert max(forward) <= max_rows and sum(forward) == kept and len(forward) == -(-kept // max_rows)


@pytest.mark.parametrize(
    ("V", "H", "copied"), [(1, 1, 4), (2, 3, 1), (7, 5, 3), (150, 19, 8), (33, 64, 10_000)]
)
def test_two_fp32_halves_become_one_bf16_tensor_in_the_memory_of_the_first(V, H, copied, monkeypatch):
    monkeypatch.setattr(head, "COPIED_ELEMENTS", copied)
    whole = torch.randn(V, H)
    first, second = (x.clone() for x in whole.split(head.halves(V)))
    joined = head.join_narrowed(first, second)
    assert torch.equal(joined, whole.bfloat16()) and joined.is_contiguous()
    assert joined.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()


def test_arguments_that_do_not_fit_are_refused_with_both_values():
    hidden, weight, targets = problem(6, 70, 8, torch.float32)
    module = torch.nn.Linear(8, 70, bias=False)
    for match, call in {
        r"\(5,\).*\(6,\).*shift": lambda: linear_cross_entropy(hidden[:-1], weight, targets),
        r"\(6, 8\).*\(8, 70\)": lambda: linear_cross_entropy(hidden, weight.T, targets),
        "float32.*targets.long": lambda: linear_cross_entropy(hidden, weight, targets.float()),
        "0 to 70.*70 rows": lambda: linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2, 3, 4, 70])),
        "-1 to 4": lambda: linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2, 3, 4, -1])),
        "-100 to": lambda: linear_cross_entropy(hidden, weight, targets, ignore_index=-1),
        "float32.*float16": lambda: linear_cross_entropy(hidden, weight.half(), targets),
        "cpu.*meta": lambda: linear_cross_entropy(hidden, weight.to("meta"), targets),
        "uint8": lambda: linear_cross_entropy(hidden, weight.byte(), targets),
        "reduction is 'max'": lambda: linear_cross_entropy(hidden, weight, targets, reduction="max"),
        r"\(5,\).*\(6,\)": lambda: linear_cross_entropy(hidden, weight, targets, token_weight=torch.ones(5)),
        "detach": lambda: linear_cross_entropy(
            hidden, weight, targets, token_weight=torch.ones(6, requires_grad=True)
        ),
        "objective is given": lambda: linear_cross_entropy(
            hidden, weight, targets, reduction="none", objective=lambda p, r: p
        ),
        "objective returned": lambda: linear_cross_entropy(
            hidden, weight, targets, objective=lambda p, r: p.mean()
        ),
        "requires_grad=False": lambda: linear_cross_entropy(
            hidden, weight, targets, objective=lambda p, r: p.detach()
        ),
        "softcap is 0": lambda: linear_cross_entropy(hidden, weight, targets, softcap=0.0),
        "max_rows is -1": lambda: token_logprobs(hidden, weight, targets, max_rows=-1),
        "temperature is 0": lambda: token_logprobs(hidden, weight, targets, temperature=0.0),
        "Linear.*lm_head": lambda: linear_cross_entropy(hidden, module, targets),
    }.items():
        with pytest.raises(ValueError, match=f"(?s){match}"):
            call()


def test_the_reference_agrees_with_the_definition_of_this_file():
    hidden, weight, targets = problem(13, 77, 19, torch.float64)
    for options in ({}, {"reduction": "none", "softcap": 3.0}, {"reduction": "sum", "temperature": 0.5}):
        reference, ours = (
            f(hidden, weight, targets, **options) for f in (linear_cross_entropy_reference, plain)
        )
        torch.testing.assert_close(reference, ours)


def in_a_child(code_or_args, **environment):
    child = subprocess.run(
        [sys.executable, *code_or_args], env=os.environ | environment, capture_output=True, text=True
    )
    assert child.returncode == 0, f"\n{child.stdout[-6000:]}\n{child.stderr[-3000:]}"
    return child.stdout


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is the child")
def test_the_triton_kernels_pass_this_file_in_the_interpreter(record_property):
    pass_in_the_interpreter(__file__, record_property, "-W", "error::RuntimeWarning")


@pytest.mark.skipif(INTERPRET, reason="says nothing about kernels")
def test_without_triton_the_module_imports_and_uses_the_torch_path():
    in_a_child(["-c", """
import sys
sys.modules["triton"] = None  # import triton now raises ImportError, as on macOS
import torch
from kit.kernels.cross_entropy import cross_entropy
from kit.kernels.linear_cross_entropy import linear_cross_entropy
hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(70, 8, requires_grad=True)
linear_cross_entropy(hidden, weight, torch.arange(6), softcap=3.0).backward()
cross_entropy(hidden @ weight.T, torch.arange(6)).backward()
assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
"""])  # fmt: skip


FAR_ROW, FAR_STRIDE = 16_383, 262_144  # the last row of 16,384: its offset is 2^32 - 262,144


@pytest.fixture
def far_row(monkeypatch):
    """Run a kernel's only program as if it were number 16,383; the interpreter raises on int32 overflow."""
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
    logits = torch.frombuffer(space, dtype=torch.float16)[FAR_ROW * FAR_STRIDE :][:150]
    return torch.frombuffer(space, dtype=torch.float16), logits


@pytest.mark.interpreter
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_the_offset_of_row_16383_of_262144_logits_does_not_overflow(far_row, softcap):
    base, logits = far_row
    values = torch.randn(150).half()
    targets, logprobs, entropy = (
        torch.full((FAR_ROW + 1,), 149),
        torch.empty(FAR_ROW + 1),
        torch.empty(FAR_ROW + 1),
    )
    expected = values.float() if softcap == 0 else softcap * torch.tanh(values.float() / softcap)
    logits.copy_(values)
    logit_rows._logprob_kernel[(1,)](
        base, targets, logprobs, entropy, FAR_STRIDE, 150, 1.0, SOFTCAP=softcap, BLOCK_V=64
    )
    torch.testing.assert_close(logprobs[-1], expected.log_softmax(0)[149])
    logit_rows._gradient_kernel[(1,)](
        base, targets, logprobs, FAR_STRIDE, 150, 1.0, SOFTCAP=softcap, BLOCK_V=64
    )
    torch.testing.assert_close(logprobs[-1], expected.log_softmax(0)[149])
    assert logits[149] < 0 and (logits[:149] > 0).all()
