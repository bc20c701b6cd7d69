"""Test the torch path and, in a child process, the real Triton kernels in the interpreter.

A child process is needed because TRITON_INTERPRET is read at import.
"""

import pytest
import torch
from accuracy import far_memory, poisoned, rms, run_as_program  # noqa: F401
from children import pass_in_the_interpreter
from torch._subclasses.fake_tensor import FakeTensorMode

import kit.kernels.decode_attention as kernels
from kit.kernels.backend import INTERPRET
from kit.kernels.decode_attention import decode_attention, decode_attention_reference

DTYPES = [torch.float32, torch.float16] if INTERPRET else [torch.float32, torch.float16, torch.bfloat16]
# with blocks of 16 keys and splits of 32: one key, a block and one more, a split and one more, a full cache
# of 70 places and one more, and rings that have wrapped, one of them to its beginning; one row is empty
LENGTHS = [1, 16, 17, 0, 32, 33, 70, 71, 140, 203]
W = 70


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Short rows cross every seam: blocks, splits, and the splits that are joined at once."""
    monkeypatch.setattr(kernels, "TILES", dict.fromkeys(kernels.TILES, (16, 4, 1)))
    monkeypatch.setattr(kernels, "MIN_SPLIT", 32)
    monkeypatch.setattr(kernels, "JOINED", 2)


def problem(lengths, Hq=2, Hkv=1, places=W, D=16, dtype=torch.float32):
    """Return q, caches and lengths. Places that no position was written to hold NaN."""
    torch.manual_seed(0)
    q = torch.randn(len(lengths), Hq, D).to(dtype)
    k, v = (torch.randn(len(lengths), Hkv, places, D).to(dtype) for _ in range(2))
    for row, length in enumerate(lengths):
        k[row, :, max(length, 0) :] = v[row, :, max(length, 0) :] = torch.nan
    return q, k, v, torch.tensor(lengths, dtype=torch.int64)


def check(q, k, v, lengths, **options):
    """Check that the error is at most twice torch's own, up to the rounding of D products in fp32."""
    held = [x.double().nan_to_num(0) for x in (q, k, v)]
    truth = decode_attention_reference(*held, lengths, **options)
    theirs = decode_attention_reference(q, k.nan_to_num(0), v.nan_to_num(0), lengths, **options)
    ours = decode_attention(q, k, v, lengths, **options)
    assert ours.dtype == q.dtype and ours.shape == q.shape and not ours.isnan().any()
    floor = q.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps * rms(truth)
    error, allowed = rms(ours - truth), rms(theirs - truth)
    assert error <= 2 * allowed + floor, f"{error:.2e}, torch {allowed:.2e}"


@pytest.mark.parametrize("window", [None, 1, 20, 32, W, 10**6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_all_lengths_are_as_good_as_torchs_in_every_window(dtype, window, poisoned):  # noqa: F811
    check(*problem(LENGTHS, dtype=dtype), window=window)


@pytest.mark.parametrize(("Hq", "Hkv"), [(1, 1), (3, 3), (2, 1), (7, 1), (14, 2), (20, 1)])
def test_groups_of_all_sizes_are_as_good_as_torchs(Hq, Hkv, poisoned):  # noqa: F811
    check(*problem([33, 5, 90], Hq, Hkv), scale=0.7)


@pytest.mark.parametrize("D", [1, 16, 40, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_all_widths_are_as_good_as_torchs(D, dtype, poisoned):  # noqa: F811
    check(*problem([35, 3], D=D, dtype=dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tiles_and_splits_of_a_card_are_as_good_as_torch(D, dtype, monkeypatch):
    monkeypatch.undo()
    lengths = [kernels.MIN_SPLIT + 65, 64]
    check(*problem(lengths, 7, 1, 400, D, dtype))


@pytest.mark.parametrize("length", [1, 16, 17, 71])
def test_a_single_row_is_as_good_as_torchs(length):
    check(*problem([length]))


@pytest.mark.parametrize("rising", [True, False])
def test_the_largest_scores_may_come_first_or_last(rising):
    q, k, v, lengths = problem([W, 2 * W])
    factors = torch.linspace(0, 8, W)[:, None]
    check(q, k * (factors if rising else factors.flip(0)), v, lengths)


def test_no_rows_give_no_rows():
    assert decode_attention(*problem([])).shape == (0, 2, 16)


@pytest.mark.parametrize("function", [decode_attention, decode_attention_reference])
@pytest.mark.parametrize("window", [None, 3])
def test_against_a_plain_list_a_ring_holds_its_last_positions(function, window):
    """Write positions 0, 1, 2, ... into a ring of 5 places, and attend to the end of a list of them."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 13, 1, 8)
    k, v = torch.zeros(2, 1, 1, 5, 8)
    for position in range(13):
        k[:, :, position % 5], v[:, :, position % 5] = keys[position], values[position]
        q = torch.randn(1, 1, 8)
        found = function(q, k, v, torch.tensor([position + 1]), window=window, scale=1.0)
        seen = slice(max(0, position + 1 - (window or 5)), position + 1)
        p = (keys[seen, 0] @ q[0, 0]).softmax(0)
        torch.testing.assert_close(found[0, 0], p @ values[seen, 0])


def test_other_rows_change_no_bit_of_a_row_and_a_second_run_gives_the_same():
    q, k, v, lengths = problem([17, 90, 3, 70])
    before, again = (decode_attention(q, k, v, lengths) for _ in range(2))
    assert torch.equal(before, again)
    order = [3, 0]
    some = decode_attention(q[order], k[order], v[order], lengths[order])
    assert torch.equal(some, before[order])
    k[2:], v[2:] = torch.nan, torch.nan
    after = decode_attention(q, k, v, lengths)
    assert torch.equal(after[:2], before[:2]) and after[2:].isnan().all()


def test_views_are_read_in_place_and_both_kinds_of_lengths_are_taken():
    q, k, v, lengths = problem([17, 90, 3], 4, 2)
    expected = decode_attention(q, k, v, lengths)
    spread = torch.stack([q, q], -1)[..., 0]  # stride 2
    between = torch.full((len(q), 9, 20), torch.nan)
    between[:, 3:7, 2:18] = q
    larger = torch.full((len(q) + 5, 3, W, 24), torch.nan)
    larger[:-5, 1:, :, 4:20] = k
    places_first = v.transpose(1, 2).contiguous().transpose(1, 2)
    found = [
        decode_attention(spread, k, v, lengths),
        decode_attention(between[:, 3:7, 2:18], larger[:-5, 1:, :, 4:20], places_first, lengths.int()),
        decode_attention(q, k, v, torch.stack([lengths, lengths], -1)[:, 0]),
    ]
    assert all(torch.equal(each, expected) for each in found)


@pytest.mark.parametrize("wild", [-1, -(2**31), 5 - 2**32, -(2**63), 2**31 + 3, 2**40, 2**63 - 1])
@pytest.mark.parametrize("window", [None, 3])
def test_whatever_the_lengths_are_nothing_outside_the_cache_is_read(wild, window):
    q, k, v, _ = problem([W, W])
    whole = torch.full((2, 4, 1, W, 16), torch.nan)
    whole[0, 1:3], whole[1, 1:3] = k, v
    out = decode_attention(q, whole[0, 1:3], whole[1, 1:3], torch.tensor([wild, 9]), window=window)
    assert out.isfinite().all() and bool((out[0] == 0).all()) == (wild < 0)
    assert torch.equal(out[1:], decode_attention(q[1:], k[1:], v[1:], torch.tensor([9]), window=window))


@pytest.mark.interpreter
def test_the_host_reads_no_length_and_launches_the_same_whatever_they_are(monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    def refuse(self, *_):
        raise AssertionError("the host waits for the device")

    grids, set_grid_dim = [], interpreter_builder.set_grid_dim
    problems = [problem(lengths, 4, 2) for lengths in ([3, 70, 150], [1, 1, 1], [0, 0, 0])]
    monkeypatch.setattr(
        interpreter_builder, "set_grid_dim", lambda *grid: grids.append(grid) or set_grid_dim(*grid)
    )
    for name in ("tolist", "item", "__int__", "__bool__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for inputs in problems:
        decode_attention(*inputs)
    assert grids == [(3, 2, 3), (3, 4, 1)] * 3


def test_a_long_cache_is_cut_into_a_bounded_number_of_splits(monkeypatch):
    monkeypatch.undo()
    assert kernels.splits(1) == kernels.splits(256) == (256, 1)
    assert kernels.splits(257) == (256, 2) and kernels.splits(16_384) == (256, 64)
    assert kernels.splits(16_385) == (512, 33) and kernels.splits(131_072) == (2_048, 64)


def test_the_operator_and_its_fake_implementation_agree():
    q, k, v, lengths = problem([5, 71])
    inputs = q, k, v, lengths, 20, 0.5
    torch.library.opcheck(kernels._attention, inputs, test_utils=("test_schema", "test_faketensor"))
    with FakeTensorMode():
        q, cache = (
            torch.empty(3, 14, 64, dtype=torch.bfloat16),
            torch.empty(3, 2, 99, 64, dtype=torch.bfloat16),
        )
        out = decode_attention(q, cache, cache, torch.zeros(3, dtype=torch.int64))
    assert out.shape == q.shape and out.dtype == q.dtype


Q, CACHE, ROWS = torch.zeros(2, 4, 8), torch.zeros(2, 2, 5, 8), torch.tensor([1, 2])
REFUSED = {
    "too many rows of cache": ((Q[:1], CACHE, CACHE, ROWS), r"\(1, 4, 8\).*\(2, 2, 5, 8\).*pass the rows"),
    "caches that differ": ((Q, CACHE, CACHE[:, :, 1:], ROWS), r"\(2, 2, 5, 8\) and \(2, 2, 4, 8\)"),
    "groups that differ in size": ((Q[:, :3], CACHE, CACHE, ROWS), "Hq = 3, Hkv = 2.*must divide Hq"),
    "no places": ((Q, CACHE[:, :, :0], CACHE[:, :, :0], ROWS), "W = 0"),
    "another dtype": ((Q.half(), CACHE, CACHE, ROWS), r"float16, k_cache torch.float32.*cast q"),
    "lengths of other rows": ((Q, CACHE, CACHE, ROWS[:1]), r"int64 of shape \(1,\).*of shape \(2,\)"),
    "lengths in fp32": ((Q, CACHE, CACHE, ROWS.float()), "float32 of shape"),
    "another device": ((Q, CACHE, CACHE, ROWS.to("meta")), "lengths on meta"),
    "keys that are spread": ((Q, CACHE.mT.contiguous().mT, CACHE, ROWS), r"\(80, 40, 1, 5\).*last must be 1"),
    "a window of 0": ((Q, CACHE, CACHE, ROWS, 0), "window is 0"),
}


@pytest.mark.parametrize(("arguments", "match"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_do_not_fit_are_refused_with_both_values(arguments, match):
    tensors, window = arguments[:4], dict(zip(("window",), arguments[4:], strict=False))
    with pytest.raises(ValueError, match=match):
        decode_attention(*tensors, **window)


@pytest.mark.interpreter
@pytest.mark.parametrize(("Hq", "D", "why"), [(1, 257, "257 wide"), (33, 8, "33 query heads share")])
def test_what_the_kernels_do_not_take_is_refused(Hq, D, why):
    with pytest.raises(ValueError, match=f"{why}.*use torch's attention"):
        decode_attention(*problem([3], Hq, 1, 5, D))


@pytest.mark.interpreter
def test_offsets_past_2_to_the_31_do_not_overflow(monkeypatch):
    places, D, GROUP, row = 16, 256, 16, 2**20 + 3  # caches and parts of 2^32 elements before this row
    run_as_program(row, monkeypatch)
    q, k, v, out = (far_memory((row + 1) * n * D) for n in (GROUP, places, places, GROUP))
    parts, logsumexps = (far_memory((row + 1) * GROUP * n, torch.float32) for n in (D, 1))
    lengths = torch.full((row + 1,), 21)
    small = [x.half() for x in problem([21], GROUP, 1, places, D)[:3]]
    for far, near in zip((q, k, v), small, strict=True):
        far[-near.numel() :] = near.flatten()
    strides = GROUP * D, D, *[places * D, places * D, D] * 2
    kernels._split_kernel[(1, 1, 1)](
        q, k, v, lengths, parts, logsumexps, places, places, 32, D**-0.5, *strides,
        GROUP=GROUP, D=D, BLOCK_D=D, BLOCK_M=16, BLOCK_N=16,
    )  # fmt: skip
    head = GROUP - 1  # its program, in a grid of one head per row, finds the only split of the last head
    kernels._join_kernel[(1, 1)](
        parts[head * D :], logsumexps[head:], lengths, out, places, 32, GROUP, D=D, BLOCK_D=D, JOINED=2
    )
    expected = decode_attention_reference(*(x.float() for x in small), lengths[:1])[0]
    torch.testing.assert_close(parts[-GROUP * D :].view(GROUP, D), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(out[row * D :][:D].float(), expected[head], rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is the child")
def test_the_kernels_pass_the_same_tests_in_the_interpreter(record_property):
    pass_in_the_interpreter(__file__, record_property)
