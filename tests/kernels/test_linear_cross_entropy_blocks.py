import pytest
import torch
from children import pass_in_the_interpreter

import kit.kernels.linear_cross_entropy_chunks as head
import kit.kernels.linear_cross_entropy_rows as logit_rows
from kit.kernels import backend
from kit.kernels.backend import INTERPRET
from kit.kernels.cross_entropy import IGNORE_INDEX
from kit.kernels.linear_cross_entropy import linear_cross_entropy
from kit.kernels.linear_cross_entropy_blocks import VOCABULARY_UNIT, dweight_blocks, loss_without_dweight
from kit.kernels.linear_cross_entropy_rows import block_gradients_


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Use chunks of at most 5 rows and steps of 64 columns."""
    monkeypatch.setattr(head, "MIN_ROWS", 5)
    monkeypatch.setattr(head, "MAX_CHUNK_BYTES", 1)
    monkeypatch.setattr(backend, "CPU_BLOCK_BYTES", 700)
    monkeypatch.setattr(logit_rows, "BLOCK_V", 64)


def problem(N, V, H, dtype):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(N, H).to(dtype), torch.randn(V, H).to(dtype), torch.randint(V, (N,))
    targets[2::5] = IGNORE_INDEX
    if N > 1:
        targets[0], targets[1] = 0, V - 1
    return hidden, weight, targets


def blocked(hidden, weight, targets, scale, softcap, block_bytes=1):
    loss, dhidden, kept, logsumexp = loss_without_dweight(hidden, weight, targets, scale, softcap=softcap)
    settings = {"softcap": softcap, "block_bytes": block_bytes}
    blocks = list(dweight_blocks(hidden, weight, targets, kept, logsumexp, scale, **settings))
    return loss, dhidden, torch.cat([dweight for _, dweight in blocks]), [first for first, _ in blocks]


def whole(hidden, weight, targets, scale, softcap):
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets, reduction="sum", softcap=softcap) * scale
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def rms(x):
    return x.double().square().mean().sqrt()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("N", [1, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_blocks_put_together_are_the_gradient_of_the_whole(dtype, N, softcap):
    tensors = problem(N, 2 * VOCABULARY_UNIT + 77, 19, dtype)
    truth = whole(*(x.double() if x.is_floating_point() else x for x in tensors), 0.3, softcap)
    loss, dhidden, dweight, firsts = blocked(*tensors, 0.3, softcap)
    assert firsts == [0, VOCABULARY_UNIT, 2 * VOCABULARY_UNIT] and dweight.dtype == torch.float32
    for ours, plain, exact in zip(
        (loss, dhidden, dweight), whole(*tensors, 0.3, softcap), truth, strict=True
    ):
        assert not ours.isnan().any()
        assert rms(ours - exact) <= 2 * rms(plain - exact) + torch.finfo(dtype).eps * rms(exact)


@pytest.mark.parametrize("N", [0, 6])
def test_without_a_target_every_block_is_zero(N):
    hidden, weight, _ = problem(N, 300, 19, torch.float32)
    loss, dhidden, dweight, _ = blocked(hidden, weight, torch.full((N,), IGNORE_INDEX), 1.0, None)
    assert loss == 0 and (dhidden == 0).all() and (dweight == 0).all() and len(dweight) == 300


def test_a_block_may_be_updated_before_the_next_is_computed():
    hidden, weight, targets = problem(13, 3 * VOCABULARY_UNIT, 19, torch.float32)
    expected = blocked(hidden, weight, targets, 1.0, None)[2]
    _, _, kept, logsumexp = loss_without_dweight(hidden, weight, targets, 1.0)
    for first, dweight in dweight_blocks(hidden, weight, targets, kept, logsumexp, 1.0, block_bytes=1):
        assert torch.equal(dweight, expected[first : first + len(dweight)])
        weight[first : first + len(dweight)] = torch.nan


def test_block_bytes_decides_how_many_columns_are_computed_at_once():
    hidden, weight, targets = problem(16, 5 * VOCABULARY_UNIT, 19, torch.float32)
    num_targets = int((targets != IGNORE_INDEX).sum())
    two_units = 2 * VOCABULARY_UNIT * (num_targets + 19) * 4
    assert blocked(hidden, weight, targets, 1.0, None, two_units)[3] == [
        0,
        2 * VOCABULARY_UNIT,
        4 * VOCABULARY_UNIT,
    ]
    assert blocked(hidden, weight, targets, 1.0, None, two_units - 1)[3] == [
        i * VOCABULARY_UNIT for i in range(5)
    ]


def test_the_operator_and_its_fake_implementation_agree():
    logits, targets = torch.randn(6, 70), torch.tensor([0, 3, 69, 70, 99, 100])
    arguments = logits, targets, logits.logsumexp(1), 30, 0.5, 3.0
    torch.library.opcheck(block_gradients_, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is the child")
def test_the_triton_kernel_passes_this_file_in_the_interpreter(record_property):
    pass_in_the_interpreter(__file__, record_property)
