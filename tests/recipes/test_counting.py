"""Compare counts with counts by hand. The Triton part runs in a child process with TRITON_INTERPRET."""

import pytest
import torch
from children import pass_in_the_interpreter
from counting import Count
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_counting import Counter

from kit.kernels.backend import HAS_TRITON, INTERPRET, tl, triton
from kit.kernels.decode_attention import decode_attention
from kit.kernels.glu import glu
from kit.kernels.packed_attention import packed_attention
from kit.kernels.rms_norm import rms_norm
from kit.kernels.rope import rope
from kit.memory.live_bytes import LiveBytes


def counted(call) -> Count:
    with Counter() as counter:
        call()
    return counter.total


@triton.jit
def _masked_copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns, mask=columns < n, other=0.0)
    tl.store(y_ptr + columns, x + tl.load(y_ptr), mask=columns < n)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, lock_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :], mask=k[:, None] < 5, other=0.0)
    tl.atomic_add(
        c_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision="ieee"), mask=m[:, None] < 3
    )
    tl.atomic_cas(lock_ptr, 0, 1)


@torch.library.custom_op("kit_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape).copy_(x).mul_(2.0)


@twice.register_fake
def _(x):
    return torch.empty_like(x)


X, Y = torch.ones(3, 5), torch.ones(5, 7)  # 60 and 140 bytes


@pytest.mark.parametrize(
    ("call", "expected"),
    {
        "a matmul": (lambda: X @ Y, Count(1, 200, 84, 2 * 3 * 5 * 7)),
        "half the bytes in half precision": (lambda: X.half() @ Y.half(), Count(3, 200 + 100, 100 + 42, 210)),
        "into a given result": (lambda: torch.mm(X, Y, out=torch.empty(3, 7)), Count(1, 200, 84, 210)),
        "added to what was there": (lambda: torch.empty(3, 7).addmm_(X, Y), Count(1, 284, 84, 210)),
        "beta 0 does not read": (lambda: torch.empty(3, 7).addmm_(X, Y, beta=0), Count(1, 200, 84, 210)),
        "views are free": (lambda: X.T[3:].unsqueeze(0).expand(4, 2, 3)[:, 1:], Count()),
        "a reshape that must copy": (lambda: X.T.reshape(15), Count(1, 60, 60)),
        "allocations are free": (lambda: X.new_empty(9), Count()),
        "zeros are written": (lambda: torch.zeros_like(X), Count(1, 0, 60)),
        "an operand read twice is read once": (lambda: X * X, Count(1, 60, 60)),
        "an expanded operand exists once": (lambda: X * torch.ones(5).expand(3, 5), Count(2, 80, 60 + 20)),
        "in place": (lambda: X.mul_(1), Count(1, 60, 60)),
        "a cast": (lambda: X.half(), Count(1, 60, 30)),
        "a cast to what it is": (lambda: X.float().contiguous(), Count()),
        "a copy": (lambda: torch.empty(3, 5).copy_(X), Count(1, 60, 60)),
        "a broadcast copy": (lambda: torch.empty(3, 5).copy_(torch.ones(5)), Count(2, 20, 20 + 60)),
        "gathered rows": (lambda: X.index_select(0, torch.tensor([2])), Count(1, 20 + 8, 20)),
        "gathered elements": (lambda: X.gather(1, torch.tensor([[2], [1], [0]])), Count(1, 12 + 24, 12)),
        "scattered rows": (lambda: X.index_copy_(0, torch.tensor([2]), X.new_ones(1, 5)), Count(2, 28, 40)),
        "a reduction": (lambda: X.sum(), Count(1, 60, 4)),
        "an operator of torch.library": (lambda: twice(X), Count(2, 120, 120)),
    }.values(),
)  # fmt: skip
def test_torch_operators_count_as_by_hand(call, expected):
    assert counted(call) == expected


def test_an_operator_of_torch_library_is_opened_under_its_own_name_and_closed_on_fake_tensors():
    with Counter() as counter:
        twice(X)
        X.sum()
    assert dict(counter.by_operator) == {"kit_tests::twice": Count(2, 120, 120), "aten::sum": Count(1, 60, 4)}
    with FakeTensorMode():
        fake = torch.empty(3, 5)
        assert counted(lambda: twice(fake)) == Count(1, 60, 60)


def test_backward_is_counted_and_nothing_after_the_block():
    x = X.clone().requires_grad_()
    with Counter() as counter:
        (x @ Y).sum().backward()
    before = counter.total
    assert before.flops == 2 * 210 and (X + X).sum() and counter.total == before


def test_counts_add_and_subtract():
    assert Count(1, 2, 3, 4) + Count(2, 2, 2, 2) - Count(0, 1, 0, 0) == Count(3, 3, 5, 6)
    assert Count(1, 2, 3, 4).bytes == 5


def test_live_bytes_follow_storages_not_views():
    with LiveBytes() as memory:
        x = torch.zeros(100)
        view = x[10:].view(9, 10)
        y = x + 1
        assert memory.now == 800
        del x
        assert memory.now == 800  # the view keeps it alive
        del view, y
        assert memory.now == 0 and memory.peak == 800
        X.add(1)
    assert memory.peak == 800


def test_views_of_earlier_tensors_are_no_new_bytes():
    x = torch.zeros(100)
    with LiveBytes() as bytes_:
        kept = [x.view(10, 10).t(), x[3:], x.add_(1), x.unflatten(0, (2, 50))]
        assert (bytes_.now, bytes_.peak) == (0, 0)
        kept.append(x + 1)
        kept.append(kept[-1].view(4, 25))
        assert (bytes_.now, bytes_.peak) == (400, 400)


def test_live_bytes_of_fake_tensors_need_no_memory():
    with FakeTensorMode(), LiveBytes() as memory:
        a = torch.empty(2**40, dtype=torch.bfloat16)
        (a + 1).sum()
    assert memory.peak == 2 * 2**41 + 2


needs_interpreter = pytest.mark.interpreter


@needs_interpreter
def test_masked_out_elements_do_not_count():
    x, y = torch.ones(50), torch.zeros(50)
    with Counter() as counter:
        _masked_copy_kernel[(4,)](x, y, 50, BLOCK=16)
    # 50 of 64 elements each way, and a scalar per program; passing the arguments does not count
    assert dict(counter.by_operator) == {"triton": Count(1, 50 * 4 + 4 * 4, 50 * 4)}


@needs_interpreter
def test_dots_and_atomics_count():
    a, b, c, lock = (
        torch.ones(4, 8).half(),
        torch.ones(8, 16).half(),
        torch.zeros(4, 16),
        torch.zeros(1, dtype=torch.int32),
    )
    with Counter() as counter:
        _dot_kernel[(1,)](a, b, c, lock, 4, 16, 8)
    assert counter.total == Count(1, 4 * 8 * 2 + 5 * 16 * 2 + 3 * 16 * 4 + 4, 3 * 16 * 4 + 4, 2 * 4 * 8 * 16)
    assert (c[:3] == 5).all() and (c[3] == 0).all()  # the kernel still computes


def a_layers_kernels():
    """Run each kernel of a layer, forward and backward, and that of a token step."""
    x, weight = torch.ones(3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    y = rms_norm(x, weight, 1e-6)
    glu(y * 1, y * 1).sum().backward()
    heads, angles = torch.ones(5, 2, 16, requires_grad=True), torch.ones(5, 16)
    q, k = rope(heads, heads, angles, angles)
    packed_attention(q, k, heads, torch.tensor([0, 5]), 5).sum().backward()
    cache = torch.ones(5, 2, 4, 16)
    decode_attention(heads.detach(), cache, cache, torch.full((5,), 3))


@needs_interpreter
def test_on_fake_tensors_an_operator_has_as_many_launches_as_its_kernels():
    with Counter() as real:
        a_layers_kernels()
    with FakeTensorMode(), Counter() as fake:
        a_layers_kernels()
    launches, expected = (
        {name: count.launches for name, count in counter.by_operator.items() if name.startswith("kit::")}
        for counter in (fake, real)
    )
    assert launches == expected and len(launches) == 9


@needs_interpreter
def test_the_interpreter_is_as_before_after_the_block_even_after_an_error():
    import triton.runtime.interpreter as interpreter

    before = interpreter.interpreter_builder
    with pytest.raises(RuntimeError), Counter():
        assert interpreter.interpreter_builder is not before
        torch.ones(2) @ torch.ones(3)
    assert interpreter.interpreter_builder is interpreter.interpreter_semantic.builder is before


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is the child")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed (macOS): its kernels cannot be counted")
def test_this_file_passes_in_the_interpreter(record_property):
    pass_in_the_interpreter(__file__, record_property)
