"""The torch path, and in a child process the real Triton kernel in the interpreter.

TRITON_INTERPRET is read when a kernel is defined, so this file runs once in each.
"""

import mmap

import pytest
import torch
from children import pass_in_the_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import kit.kernels.packing as kp
from kit.kernels.backend import INTERPRET
from kit.kernels.packing import pack, pack_reference
from kit.packing import Document, PackedBatch, _pack_on_device, pack_rows


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kp, "BLOCK", 16)


@pytest.fixture
def poison(monkeypatch):
    """Outputs that the kernel does not write keep -77."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(-77))


def documents_of(lengths, prompt_lens, dtype=torch.int32):
    generator = torch.Generator().manual_seed(0)
    return [
        Document(torch.randint(3, 250_000, (length,), generator=generator, dtype=dtype), prompt_len)
        for length, prompt_len in zip(lengths, prompt_lens, strict=True)
    ]


def arguments_of(documents, *, before=0, after=0):
    """Return pack's arguments: the documents in one buffer, between so many tokens of other documents."""
    other = [torch.full((n,), 7, dtype=documents[0].ids.dtype) for n in (before, after)]
    buffer = torch.cat([other[0], *(document.ids for document in documents), other[1]])
    offsets = torch.tensor([before, *map(len, documents)]).cumsum(0)
    prompt_lens = torch.tensor([document.prompt_len for document in documents])
    return buffer, offsets, prompt_lens, int(offsets[-1]) - before


def check_same(ours: PackedBatch, expected: PackedBatch):
    for name in PackedBatch.TENSORS:
        found, wanted = getattr(ours, name), getattr(expected, name)
        assert found.dtype == wanted.dtype and found.equal(wanted), name
        assert found.is_contiguous()
    for name in ("max_seqlen", "num_targets", "num_documents"):
        assert getattr(ours, name) == getattr(expected, name), name
    assert expected.num_targets == int((expected.targets != -100).sum())


def check_pack(documents, **around):
    """Compare pack and its reference with PackedBatch.build, bit for bit."""
    expected = PackedBatch.build(documents)
    *tensors, T = arguments_of(documents, **around)
    counts = {"max_seqlen": expected.max_seqlen, "num_targets": expected.num_targets}
    check_same(PackedBatch(*pack(*tensors, T), **counts), expected)
    check_same(PackedBatch(*pack_reference(*tensors), **counts), expected)


@settings(max_examples=25 if INTERPRET else 300, deadline=None, database=None)
@given(st.data())
def test_every_row_is_the_one_packed_batch_builds(data):
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=9))
    # a prompt may be longer than its document: nothing is a target then
    prompt_lens = [data.draw(st.integers(0, length + 2)) for length in lengths]
    documents = documents_of(lengths, prompt_lens, data.draw(st.sampled_from([torch.int32, torch.int64])))
    check_pack(documents, before=data.draw(st.integers(0, 20)), after=data.draw(st.integers(0, 3)))


AWKWARD = [
    ([1], [0]),
    ([1], [1]),
    ([1, 1, 1], [1, 0, 1]),
    ([17], [17]),  # all prompt
    ([16, 16], [0, 1]),
    ([33, 5], [9, 2]),
    ([3] * 70, [1] * 70),
]


@pytest.mark.parametrize("lengths, prompt_lens", AWKWARD, ids=str)
def test_awkward_rows(lengths, prompt_lens, poison):
    check_pack(documents_of(lengths, prompt_lens))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_rows_of_a_step_share_a_buffer_and_are_those_packed_batch_builds(dtype, poison):
    """What pack_rows does for a card, on the CPU."""
    rows = [documents_of(lengths, prompt_lens, dtype) for lengths, prompt_lens in AWKWARD]
    for ours, row in zip(_pack_on_device(rows, torch.device("cpu")), rows, strict=True):
        check_same(ours, PackedBatch.build(row))


@pytest.mark.parametrize(
    "rows", [[[]], [[], [Document(torch.tensor([5]), 0)]], [[Document(torch.tensor([]).int(), 0)]]]
)
def test_a_row_of_nothing_is_refused_on_every_device(rows):
    for pack_them in (pack_rows, _pack_on_device):
        with pytest.raises(ValueError, match="documents of at least one token"):
            pack_them(rows, torch.device("cpu"))


LENGTHS = [1, 17, 5, 16, 2]


def test_fake_tensors_and_the_operator():
    *tensors, T = arguments_of(documents_of(LENGTHS, [1] * 5))
    with FakeTensorMode() as mode:
        packed = pack(*(mode.from_tensor(x) for x in tensors), T)
        assert [x.shape for x in packed] == [(41,), (41,), (41,), (6,)]
        assert [x.dtype for x in packed] == [torch.int32, torch.int64, torch.int32, torch.int32]
    torch.library.opcheck(kp._pack, (*tensors, T), test_utils=("test_schema", "test_faketensor"))


def test_arguments_that_do_not_fit_are_refused_with_both_values():
    names = ("buffer", "offsets", "prompt_lens", "num_tokens")
    good = dict(zip(names, arguments_of(documents_of(LENGTHS, [1] * 5), before=2), strict=True))
    buffer, offsets, prompt_lens, _ = good.values()
    stopping = offsets.clone()
    stopping[2] = stopping[1]  # an empty document
    for match, change in {
        "buffer is torch.float32": {"buffer": buffer.float()},
        "offsets is torch.int32": {"offsets": offsets.int()},
        r"offsets is .*strides \(2,\)": {"offsets": offsets.repeat_interleave(2)[::2]},
        "prompt_lens is .* on meta": {"prompt_lens": prompt_lens.to("meta")},
        "offsets has 6 entries but prompt_lens 4": {"prompt_lens": prompt_lens[:-1]},
        "offsets has 1 entries but prompt_lens 0": {"offsets": offsets[:1], "prompt_lens": prompt_lens[:0]},
        "num_tokens is 4 but the row has 5 documents": {"num_tokens": 4},
        "num_tokens is 40 but the documents have 41": {"num_tokens": 40},
        r"between 0 and 42.*\[2, 3, 20\] ... \[25, 41, 43\]": {"buffer": buffer[:-1]},
        r"offsets must rise by at least 1.*\[2, 3, 3\]": {"offsets": stopping},
        r"between 0 and 43.*\[-1, 0, 17\]": {"offsets": offsets - 3},
    }.items():
        with pytest.raises(ValueError, match=match):
            pack(**good | change)


def launch(buffer, offsets, prompt_lens, T, *, programs):
    """Run the kernel as a GPU does, without looking at values first. Return what it wrote over -77."""
    D = len(prompt_lens)
    ids, targets, positions, bounds = (torch.full((n,), -77, dtype=torch.int32) for n in (T, T, T, D + 1))
    out = [ids, targets.long(), positions, bounds]
    kp._pack_kernel[(programs,)](buffer, offsets, prompt_lens, *out, D, T, -100, -1, 16)
    return out


@pytest.mark.interpreter
@pytest.mark.parametrize("T", [15, 17])
def test_a_number_of_tokens_that_does_not_fit_gives_the_token_minus_1_where_nothing_can_raise(T):
    buffer, offsets, prompt_lens, _ = arguments_of(documents_of([7, 9], [0, 0]), after=5)
    input_ids, targets, *_ = launch(buffer, offsets, prompt_lens, T, programs=2)
    assert (input_ids == -1).all() and (targets == -100).all()


def far(dtype, count):
    """An address space of which only the pages touched exist."""
    size = count * torch.empty(0, dtype=dtype).element_size()
    space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    return torch.frombuffer(space, dtype=dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("start", [2**31 - 10, 2**32 + 5])
def test_offsets_past_2_to_the_31_do_not_overflow(monkeypatch, start):
    import triton.runtime.interpreter as interpreter

    options = interpreter.InterpreterOptions(debug=True)  # raises if an int32 overflows
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    buffer, tokens = far(torch.int32, start + 20), torch.arange(100, 120, dtype=torch.int32)
    buffer[start:] = tokens
    offsets = torch.tensor([start, start + 13, start + 20])
    input_ids, targets, position_ids, cu_seqlens = launch(
        buffer, offsets, torch.tensor([1, 2]), 20, programs=2
    )
    assert input_ids.equal(tokens)
    assert targets.tolist() == [*range(101, 113), -100, -100, *range(115, 120), -100]
    assert position_ids.tolist() == [*range(13), *range(7)]
    assert cu_seqlens.tolist() == [0, 13, 20]


@pytest.mark.interpreter
@pytest.mark.parametrize(("T", "programs"), [(15, 1), (16, 2), (17, 2)])
def test_a_row_of_documents_of_one_token_has_a_program_for_the_last_boundary(
    T, programs, monkeypatch, poison
):
    grids, kernel = [], kp._pack_kernel

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kp, "_pack_kernel", Recorded())
    check_pack(documents_of([1] * T, [0] * T))
    assert grids == [(programs,)]  # one axis: a card ends the others at 65,535


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is the child")
def test_the_triton_kernel_passes_this_file_in_the_interpreter(record_property):
    pass_in_the_interpreter(__file__, record_property, "-W", "error::RuntimeWarning")
