"""The torch path, and in a child process the real Triton kernels in the interpreter: TRITON_INTERPRET is read at import."""

import math
import mmap

import pytest
import torch
from children import pass_in_the_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import kit.kernels.packing as kp
from kit.kernels.backend import INTERPRET
from kit.kernels.packing import pack, pack_reference, unpack, unpack_reference
from kit.packing import Document, PackedBatch

DTYPES = (
    [torch.float32, torch.float16, torch.int64]
    if INTERPRET
    else [torch.float32, torch.float64, torch.bfloat16, torch.int64]
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kp, "BLOCK", 16)


def corpus(lengths, prompt_lens, dtype=torch.int32):
    """buffer, offsets, prompt_lens"""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(3, 250_000, (int(offsets[-1]),), generator=generator, dtype=dtype),
        offsets,
        torch.tensor(prompt_lens),
    )


def row(offsets, documents):
    """documents, cu_seqlens, num_tokens: what pack takes besides the corpus"""
    lengths = offsets.diff()[torch.tensor(documents)]
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    return torch.tensor(documents), cu_seqlens, int(cu_seqlens[-1])


def check(lengths, prompt_lens, documents, dtype=torch.int32):
    """Against PackedBatch.build, bit for bit; what the kernel does not write shows as poison."""
    buffer, offsets, prompts = corpus(lengths, prompt_lens, dtype)
    plan = row(offsets, documents)
    built = PackedBatch.build(
        [Document(buffer[offsets[d] : offsets[d + 1]], prompt_lens[d]) for d in documents]
    )
    packed = pack(buffer, offsets, prompts, *plan)
    for ours, name, reference in zip(
        (*packed, plan[1]),
        PackedBatch.TENSORS,
        pack_reference(buffer, offsets, prompts, plan[0]),
        strict=True,
    ):
        expected = getattr(built, name)
        assert ours.dtype == expected.dtype and ours.equal(expected), name
        assert reference.equal(expected), name


@pytest.fixture
def poison(monkeypatch):
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(-77))


@settings(max_examples=25 if INTERPRET else 300, deadline=None, database=None)
@given(st.data())
def test_every_row_is_the_one_packed_batch_builds(data):
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=9))
    prompt_lens = [
        data.draw(st.integers(0, length + 2)) for length in lengths
    ]  # beyond the document too: then all is silent
    indices = st.integers(0, len(lengths) - 1)
    documents = data.draw(st.lists(indices, min_size=1, max_size=9))  # any order, the same one twice
    check(lengths, prompt_lens, documents, data.draw(st.sampled_from([torch.int32, torch.int64])))


@pytest.mark.parametrize(
    "lengths, prompt_lens, documents",
    [
        ([1], [0], [0]),
        ([1, 1, 1], [1, 0, 1], [2, 0, 1]),
        ([17], [17], [0]),
        ([16, 16], [0, 1], [1, 0]),
        ([5, 0, 33], [2, 0, 9], [2, 0]),  # the buffer holds an empty document that no row names
        ([3] * 70, [1] * 70, list(range(69, -1, -1))),
    ],
    ids=str,
)
def test_awkward_rows(lengths, prompt_lens, documents, poison):
    check(lengths, prompt_lens, documents)


def values(T, rest, dtype):
    return (10 * torch.randn(T, *rest, generator=torch.Generator().manual_seed(1))).to(dtype)


LENGTHS = [1, 17, 5, 16, 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rest", [(), (3,), (2, 5), (0,)], ids=str)
@pytest.mark.parametrize("max_seqlen", [17, 29])
def test_unpacked_values_lie_one_document_a_line(max_seqlen, rest, dtype):
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    x = values(sum(LENGTHS), rest, dtype)
    for fill in (0, -100):
        padded = unpack(x, cu_seqlens, max_seqlen, fill)
        assert padded.dtype == dtype and padded.equal(unpack_reference(x, cu_seqlens, max_seqlen, fill))
    if rest:
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert unpack(strided, cu_seqlens, max_seqlen).equal(unpack(x, cu_seqlens, max_seqlen))
        assert unpack(x[:1].expand_as(x), cu_seqlens, max_seqlen).equal(
            unpack(x[:1].expand_as(x).clone(), cu_seqlens, max_seqlen)
        )


@settings(max_examples=20 if INTERPRET else 200, deadline=None, database=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(0, 3))
def test_what_is_packed_comes_back_unpacked_and_so_does_its_gradient(lengths, spare):
    buffer, offsets, prompts = corpus(lengths, [0] * len(lengths))
    documents, cu_seqlens, T = row(offsets, list(range(len(lengths)))[::-1])
    input_ids, _, _ = pack(buffer, offsets, prompts, documents, cu_seqlens, T)
    L = max(lengths) + spare
    for line, d in zip(unpack(input_ids, cu_seqlens, L, fill=-1), documents.tolist(), strict=True):
        assert (
            line[: lengths[d]].equal(buffer[offsets[d] : offsets[d + 1]].long())
            and (line[lengths[d] :] == -1).all()
        )
    x = values(T, (2,), torch.float32).requires_grad_()
    upstream = values(len(lengths) * L, (2,), torch.float32).view(len(lengths), L, 2)
    (ours,) = torch.autograd.grad(unpack(x, cu_seqlens, L), x, upstream)
    (truth,) = torch.autograd.grad(unpack_reference(x, cu_seqlens, L), x, upstream)
    assert ours.equal(truth)


def test_the_gradient_of_a_sum_a_document_is_that_documents_weight(poison):
    """What a policy update does: (T,) log-probs, a sum a document, a weight each. .sum hands down a stride-0 gradient."""
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    weights = torch.tensor([3.0, -1.0, 0.5, 2.0, 7.0])
    x = values(sum(LENGTHS), (), torch.float32).requires_grad_()
    sums = unpack(x, cu_seqlens, 20).sum(1)
    torch.testing.assert_close(sums.detach(), torch.stack([part.sum() for part in x.detach().split(LENGTHS)]))
    (sums * weights).sum().backward()
    assert x.grad.equal(weights.repeat_interleave(torch.tensor(LENGTHS)))
    if not INTERPRET:
        torch.autograd.gradcheck(lambda x: unpack(x, cu_seqlens, 20), x.detach().double().requires_grad_())


def test_fake_tensors_and_the_operators():
    buffer, offsets, prompts = corpus(LENGTHS, [1] * 5)
    plan = row(offsets, [4, 1])
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (buffer, offsets, prompts, *plan[:2])]
        assert [x.shape for x in pack(*fake, plan[2])] == [(19,)] * 3
        x = torch.empty(19, 3, dtype=torch.bfloat16, requires_grad=True)
        unpack(x, fake[4], 17).sum().backward()
        assert x.grad.shape == (19, 3)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(kp._pack, (buffer, offsets, prompts, *plan), test_utils=tests)
    torch.library.opcheck(kp._unpack, (values(19, (3,), torch.float32), plan[1], 20, -1.0), test_utils=tests)
    torch.library.opcheck(
        kp._repack, (values(40, (3,), torch.float32).view(2, 20, 3), plan[1], 19), test_utils=tests
    )


def test_arguments_that_do_not_fit_are_refused_with_both_values():
    buffer, offsets, prompts = corpus(LENGTHS, [1] * 5)
    documents, cu_seqlens, T = row(offsets, [4, 1])
    good = {
        "buffer": buffer, "offsets": offsets, "prompt_lens": prompts,
        "documents": documents, "cu_seqlens": cu_seqlens, "num_tokens": T,
    }  # fmt: skip
    for match, change in {
        "buffer is torch.float32": {"buffer": buffer.float()},
        "offsets is torch.int32": {"offsets": offsets.int()},
        r"documents is .*strides \(2,\)": {"documents": torch.tensor([4, 0, 1, 0])[::2]},
        "prompt_lens is .* on meta": {"prompt_lens": prompts.to("meta")},
        "prompt_lens has 4 entries but offsets 6": {"prompt_lens": prompts[:-1]},
        "cu_seqlens has 2 entries but documents 2": {"cu_seqlens": cu_seqlens[:-1]},
        "cu_seqlens has 1 entries but documents 0": {
            "documents": documents[:0],
            "cu_seqlens": cu_seqlens[:1],
            "num_tokens": 0,
        },
        "num_tokens is 1 but documents has 2": {"num_tokens": 1},
        r"rise from 0 to 18.*\[0, 2, 19\]": {"num_tokens": 18},
        "offsets must rise from 0 to 40": {"buffer": buffer[:-1]},
        "documents names 1 to 5 but offsets has documents 0 to 4": {"documents": torch.tensor([5, 1])},
        "documents names -1 to 1": {"documents": torch.tensor([-1, 1])},
        "document 1 has 17 tokens in offsets but 2 in cu_seqlens": {"documents": torch.tensor([1, 4])},
    }.items():
        with pytest.raises(ValueError, match=match):
            pack(**good | change)
    x = values(T, (), torch.float32)
    for match, call in {
        "max_seqlen is 16 but the longest document has 17": lambda: unpack(x, cu_seqlens, 16),
        "rise from 0 to 18": lambda: unpack(x[:-1], cu_seqlens, 17),
        "cu_seqlens is torch.int64": lambda: unpack(x, cu_seqlens.long(), 17),
        "cu_seqlens has 1 entries": lambda: unpack(x, cu_seqlens[:1], 17),
        r"values has shape \(0,\)": lambda: unpack(x[:0], cu_seqlens, 17),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.skipif(not INTERPRET, reason="needs the interpreter")
def test_a_plan_that_does_not_fit_gives_the_token_minus_1_where_nothing_can_raise():
    """What a GPU does, where the values are not looked at: document 1 is said to be shorter than it is, document 2 right."""
    buffer, offsets, prompts = corpus([7, 9], [0, 0])
    out = torch.full((3, 14), -77)
    cu_seqlens = torch.tensor([0, 5, 14], dtype=torch.int32)
    kp._pack_kernel[(1,)](
        buffer, offsets, prompts, torch.tensor([0, 1]), cu_seqlens, *out, 2, 14, -100, -1, 16
    )
    assert (out[0, :5] == -1).all() and (out[1, :5] == -100).all() and out[0, 5:].equal(buffer[7:].long())


def far(dtype, count):
    """An address space of which only the pages touched exist."""
    size = count * torch.empty(0, dtype=dtype).element_size()
    space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    return torch.frombuffer(space, dtype=dtype)


@pytest.mark.skipif(not INTERPRET, reason="needs the interpreter")
def test_offsets_past_2_to_the_31_do_not_overflow(monkeypatch):
    import triton.runtime.interpreter as interpreter

    monkeypatch.setattr(
        interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True)
    )
    start = 2**32 + 5
    buffer, tokens = far(torch.int32, start + 20), torch.arange(100, 120, dtype=torch.int32)
    buffer[start:] = tokens
    offsets, documents, cu_seqlens = (
        torch.tensor([0, start, start + 20]),
        torch.tensor([1]),
        torch.tensor([0, 20]).int(),
    )
    out = torch.full((3, 20), -77)
    kp._pack_kernel[(2,)](
        buffer, offsets, torch.tensor([0, 1]), documents, cu_seqlens, *out, 1, 20, -100, -1, 16
    )
    assert out[0].equal(tokens.long()) and out[1, :-1].equal(tokens[1:].long()) and out[1, -1] == -100

    get, C, L = (
        interpreter.interpreter_builder.create_get_program_id,
        262_144,
        16_384,
    )  # logits, say: 2^32 numbers per document

    def last(axis):
        handle = get(axis)
        handle.data = handle.data + handle.data.dtype.type(L * C // 16)
        return handle

    monkeypatch.setattr(interpreter.interpreter_builder, "create_get_program_id", last)
    T, cu_seqlens = L + 1, torch.tensor([0, L, L + 1]).int()
    flat, padded = far(torch.float16, T * C), far(torch.float16, 2 * L * C)
    flat[L * C :][:16] = torch.arange(16).half()
    kp._unpack_kernel[(1,)](
        flat, cu_seqlens, padded, L, C, L * C // 16, 16
    )  # the first program of document 1
    assert padded[L * C :][:16].equal(torch.arange(16).half())

    def last_token(axis):
        handle = get(axis)
        handle.data = handle.data + handle.data.dtype.type(L * C // 16)
        return handle

    monkeypatch.setattr(interpreter.interpreter_builder, "create_get_program_id", last_token)
    back = far(torch.float16, T * C)
    kp._repack_kernel[(1,)](padded, cu_seqlens, back, 2, T, L, C, 16)
    assert back[L * C :][:16].equal(torch.arange(16).half())


@pytest.mark.skipif(not INTERPRET, reason="needs the interpreter")
def test_grids_have_one_axis_since_a_card_ends_the_others_at_65_535(monkeypatch):
    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: None

    for kernel in ("_pack_kernel", "_unpack_kernel", "_repack_kernel"):
        monkeypatch.setattr(kp, kernel, Recorded())
    buffer, offsets, prompts = corpus([7, 9], [0, 0])
    cu_seqlens = torch.tensor([0, 7, 16], dtype=torch.int32)
    kp.pack(buffer, offsets, prompts, torch.tensor([0, 1]), cu_seqlens, 16)
    values = torch.zeros(16, 70, requires_grad=True)
    kp.unpack(values, cu_seqlens, 9).sum().backward()
    assert [len(grid) for grid in grids] == [1, 1, 1]
    assert grids[1][0] == 2 * math.ceil(9 * 70 / kp.BLOCK)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is the child")
def test_the_triton_kernels_pass_this_file_in_the_interpreter():
    pass_in_the_interpreter(__file__, "-W", "error::RuntimeWarning")
