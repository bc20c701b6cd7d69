"""Test the Triton kernels of packed attention in the interpreter, in a child process.

TRITON_INTERPRET is read when Triton is imported.
"""

import mmap
from itertools import accumulate, pairwise, product

import pytest
import torch
from children import pass_in_the_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st

import kit.kernels.packed_attention as pa
import kit.kernels.packed_attention_tiles as tiles
from kit.kernels.backend import HAS_TRITON, INTERPRET
from kit.kernels.packed_attention import packed_attention, packed_attention_reference

LENGTHS = [1, 13, 37, 2]  # shorter than a tile, a little longer than one and than two
SMALL = {
    "forward": (32, 16, 4, 1),
    "dkdv": (16, 32, 4, 1),
    "dq": (16, 32, 4, 1),
}  # sides differ, so that mixing them up shows

in_the_interpreter = pytest.mark.interpreter


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILES", dict.fromkeys(tiles.TILES, SMALL))


def problem(lengths, heads, kv_heads, D, dtype):
    """Return q, k, v and the output's gradient in a dtype."""
    torch.manual_seed(0)
    shapes = (
        (sum(lengths), heads, D),
        (sum(lengths), kv_heads, D),
        (sum(lengths), kv_heads, D),
        (sum(lengths), heads, D),
    )
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def run(function, tensors, lengths, **options):
    *leaves, dout = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]  # keeps their strides
    pairs = torch.tensor([[bound, -7] for bound in (0, *accumulate(lengths))], dtype=torch.int32)
    cu_seqlens = pairs[:, 0]  # with a stride of 2
    out = function(*leaves, cu_seqlens, max(lengths, default=0), **options)
    return dict(
        zip(("out", "dq", "dk", "dv"), (out.detach(), *torch.autograd.grad(out, leaves, dout)), strict=True)
    )


def rms(x):
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def check(tensors, lengths, *, is_degenerate=False, **options):
    """Check that the error is at most twice torch's own, up to the rounding of the interpreter's products.

    The interpreter's products are numpy's. In which order it adds the D terms of one depends on the machine,
    and torch's order may be the better one: sqrt(D) roundings in fp32, as of a random walk, are allowed for.
    If every token sees only itself, p = 1 and torch's gradients of q and k are zero by luck. There, and for
    single numbers, the floor is the D roundings of the dot products whose difference they are.
    """
    truth = run(packed_attention_reference, [x.double() for x in tensors], lengths, **options)
    torchs, ours = (
        run(f, tensors, lengths, **options) for f in (packed_attention_reference, packed_attention)
    )
    D, dtype = tensors[0].shape[-1], tensors[0].dtype
    for name in truth:
        error, allowed = rms(ours[name] - truth[name]), rms(torchs[name] - truth[name])
        floor = D**0.5 * torch.finfo(torch.float32).eps * rms(truth[name])
        if is_degenerate:
            floor = D * torch.finfo(dtype).eps * rms(truth["out"])
        assert ours[name].dtype == dtype and ours[name].shape == truth[name].shape
        assert error <= 2 * allowed + floor, f"{name}: {error:.2e}, torch {allowed:.2e}"


@in_the_interpreter
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype", "window"),
    [
        *((2, 1, torch.float32, window) for window in (None, 17, 18, 40)),
        *((4, 1, torch.float32, window) for window in (1, 2)),
        *((2, 2, torch.float16, window) for window in (None, 17)),
        (5, 1, torch.float16, 33),
        (4, 2, torch.float16, None),
    ],
)
def test_kernels_are_as_good_as_torch_for_every_window_and_group(small_tiles, heads, kv_heads, dtype, window):
    check(problem(LENGTHS, heads, kv_heads, 16, dtype), LENGTHS, window=window, is_degenerate=window == 1)


@in_the_interpreter
@pytest.mark.parametrize("window", [63, 64, 79])
def test_no_tile_is_taken_for_whole_that_a_mask_cuts_by_one_token(small_tiles, window):
    """Of windows a token longer or shorter, other tiles are seen as a whole."""
    check(problem([3, 100], 2, 1, 16, torch.float32), [3, 100], window=window)


@in_the_interpreter
@pytest.mark.parametrize(
    ("D", "dtype"),
    [(5, torch.float32), (48, torch.float16), (64, torch.float32), (80, torch.float16), (256, torch.float32)],
)
def test_kernels_are_as_good_as_torch_for_every_head_dim(small_tiles, D, dtype):
    check(problem([5, 34], 2, 1, D, dtype), [5, 34], window=20, scale=1.5 / D**0.5)


@in_the_interpreter
@pytest.mark.parametrize("lengths", [[], [1], [50], [1] * 9, [32, 16]], ids=str)
def test_kernels_are_as_good_as_torch_for_every_pack(small_tiles, lengths):
    for dtype in (torch.float16, torch.float32):
        check(problem(lengths, 2, 1, 16, dtype), lengths, is_degenerate=max(lengths, default=1) == 1)


@in_the_interpreter
@pytest.mark.parametrize(
    ("D", "dtype", "own"),
    [
        *product([64, 128, 256], [torch.float16, torch.float32], [{}]),
        *((D, torch.float16, own) for (_, D), own in tiles.HOPPER_TILES.items()),
    ],
    ids=str,
)
def test_kernels_are_as_good_as_torch_with_the_tiles_of_a_card(D, dtype, own, monkeypatch):
    shape = dtype.itemsize, D
    monkeypatch.setitem(tiles.TILES, shape, tiles.TILES[shape] | own)
    rows = tiles.TILES[shape].values()
    lengths = [9, max(max(BLOCK_M, BLOCK_N) for BLOCK_M, BLOCK_N, *_ in rows) + 3]  # longer than a tile
    check(problem(lengths, 2, 1, D, dtype), lengths, window=lengths[1] // 2)


@in_the_interpreter
@settings(max_examples=6, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_kernels_agree_with_float64_whatever_the_pack(data):
    lengths = data.draw(st.lists(st.integers(1, 36), min_size=1, max_size=2))
    kv_heads, group, D = (data.draw(st.sampled_from(x)) for x in ([1, 2], [1, 3], [16, 48]))
    window = data.draw(st.none() | st.integers(1, 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILES", dict.fromkeys(tiles.TILES, SMALL))
        check(
            problem(lengths, kv_heads * group, kv_heads, D, torch.float32),
            lengths,
            window=window,
            is_degenerate=True,
        )


@in_the_interpreter
@pytest.mark.parametrize("window", [None, 20])
def test_other_documents_change_no_bit_of_a_document(small_tiles, window):
    tensors = problem(LENGTHS, 1, 1, 16, torch.float32)
    before, again = (run(packed_attention, tensors, LENGTHS, window=window) for _ in range(2))
    rows = slice(14, 51)  # the third
    for x in tensors:
        x[rows] = torch.nan
    after = run(packed_attention, tensors, LENGTHS, window=window)
    for name in before:
        assert torch.equal(before[name], again[name]), f"{name} differs between two runs"
        others = torch.ones(len(before[name]), dtype=torch.bool)
        others[rows] = False
        assert torch.equal(before[name][others], after[name][others]), name
        assert after[name][rows].isnan().any(), name


@in_the_interpreter
def test_views_and_broadcast_tensors_are_read_in_place(small_tiles):
    lengths, T = [3, 9], 12
    q, k, v, dout = problem(lengths, 4, 2, 16, torch.float32)
    truth = run(packed_attention, (q, k, v, dout), lengths)
    between = torch.full((T, 4, 40), torch.nan)
    between[..., 3:19] = q  # rows and heads are not adjacent
    every_other = torch.full((T, 2, 32), torch.nan)
    every_other[..., ::2] = v  # nor are the numbers of a head
    heads_first = k.transpose(0, 1).contiguous().transpose(0, 1)
    views = (
        between[..., 3:19],
        heads_first,
        every_other[..., ::2],
        dout.transpose(0, 2).contiguous().transpose(0, 2),
    )
    for name, x in run(packed_attention, views, lengths).items():
        assert torch.equal(x, truth[name]), name
    kv = k[:, :1].expand(T, 2, 16)
    for narrow in ((1, 4, 16), (1, 1, 1)):  # the gradient of .sum() has stride 0
        broadcast = torch.randn(narrow).expand(T, 4, 16)
        ours = run(packed_attention, (q, kv, kv, broadcast), lengths)
        truth = run(packed_attention, (q, kv.contiguous(), kv.contiguous(), broadcast.contiguous()), lengths)
        for name, x in ours.items():
            assert torch.equal(x, truth[name]), name


def poison(monkeypatch, value):
    """Fill every tensor the kernels allocate with value, and return them, each with a margin of 8 rows."""
    allocated = []
    new_empty = torch.Tensor.new_empty

    def poisoned(like, *shape, **options):
        if shape == (0,):  # the interpreter's own
            return new_empty(like, *shape, **options)
        shape = shape[0] if isinstance(shape[0], tuple | torch.Size) else shape
        whole = new_empty(like, shape[0] + 16, *shape[1:], **options).fill_(value)
        allocated.append(whole)
        return whole[8:-8]

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: poisoned(x, x.shape))
    return allocated


@in_the_interpreter
def test_every_number_is_written_and_nothing_unwritten_is_read(small_tiles, monkeypatch):
    tensors = problem(LENGTHS, 2, 1, 16, torch.float32)
    truth = run(packed_attention, tensors, LENGTHS, window=20)
    allocated = poison(monkeypatch, torch.nan)
    for name, x in run(packed_attention, tensors, LENGTHS, window=20).items():
        assert torch.equal(x, truth[name]), name
    assert len(allocated) == 6  # out, logsumexp; dq, dk, dv, delta
    assert all(x[:8].isnan().all() and x[-8:].isnan().all() and x[8:-8].isfinite().all() for x in allocated)


@in_the_interpreter
@pytest.mark.parametrize(
    "bounds", [[0, 40, 20, 10**6, 70], [-90, -5, 30, 60], [2**31 - 1, 0, 2**31 - 1], [5, 5, 5], [-(2**31), 9]]
)
def test_with_wrong_bounds_no_kernel_leaves_the_pack(small_tiles, monkeypatch, bounds):
    T = 70
    whole = [torch.full((T + 40, 2, 16), torch.nan) for _ in range(4)]
    q, k, v, dout = (x[20:-20].copy_(torch.randn(T, 2, 16)) for x in whole)
    allocated = poison(monkeypatch, 777.0)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    out, logsumexp = tiles.forward(q, k, v, cu_seqlens, 30, 1.0)
    gradients = tiles.backward(dout, q, k, v, out, torch.zeros(2, T), cu_seqlens, 30, 0.01)
    assert not any(x.isnan().any() for x in (out, logsumexp, *gradients))  # read from outside
    assert all((x[:8] == 777).all() and (x[-8:] == 777).all() for x in allocated)  # written outside


@in_the_interpreter
@pytest.mark.parametrize("window", [None, 1, 2, 18])
def test_no_tile_is_visited_that_is_masked_as_a_whole(small_tiles, monkeypatch, window):
    import triton.runtime.interpreter as interpreter

    dots = []
    create_dot = interpreter.interpreter_builder.create_dot
    monkeypatch.setattr(
        interpreter.interpreter_builder, "create_dot", lambda *a, **o: dots.append(1) or create_dot(*a, **o)
    )
    run(packed_attention, problem(LENGTHS, 2, 1, 16, torch.float32), LENGTHS, window=window)
    expected = 0
    for n in LENGTHS:
        distance = torch.arange(n)[:, None] - torch.arange(n)[None, :]
        seen = (distance >= 0) & (distance < (window or n))
        for kernel, products in (("forward", 2), ("dq", 3), ("dkdv", 4)):
            block_m, block_n, *_ = SMALL[kernel]
            own, walked, matrix = (block_n, block_m, seen.T) if kernel == "dkdv" else (block_m, block_n, seen)
            for block in matrix.split(own):
                columns = block.any(0).nonzero()[
                    :, 0
                ]  # the block sees one range of keys, walked from its beginning
                expected += 2 * products * -(-len(columns) // walked)
    assert len(dots) == expected


@in_the_interpreter
def test_the_values_of_cu_seqlens_are_checked_once_and_again_when_they_change(small_tiles, monkeypatch):
    looked, bounds = [], pa._bounds
    monkeypatch.setattr(pa, "_bounds", lambda *a: looked.append(a) or bounds(*a))
    q, k, v, _ = problem([10], 1, 1, 16, torch.float32)
    cu_seqlens = torch.tensor([0, 4, 10])
    for _layer in range(3):
        packed_attention(q.requires_grad_(), k, v, cu_seqlens, 6).sum().backward()
    assert len(looked) == 1
    with pytest.raises(ValueError, match="max_seqlen is 5 but the longest document has 6"):
        packed_attention(q, k, v, cu_seqlens, 5)
    with pytest.raises(ValueError, match="rise from 0 to T = 9"):
        packed_attention(q[:9], k[:9], v[:9], cu_seqlens, 6)
    cu_seqlens[1] = 11
    with pytest.raises(ValueError, match="rise from 0 to T = 10"):
        packed_attention(q, k, v, cu_seqlens, 6)
    with torch.inference_mode():
        cu_seqlens = torch.tensor([0, 4, 10])
        packed_attention(q, k, v, cu_seqlens, 6)
        cu_seqlens[0] = 1
        with pytest.raises(ValueError, match="rise from 0"):
            packed_attention(q, k, v, cu_seqlens, 6)


@in_the_interpreter
def test_heads_wider_than_256_are_named_once_and_run_in_plain_torch():
    tensors = problem([9, 5], 4, 2, 257, torch.float32)
    pa._takes.cache_clear()
    with pytest.warns(UserWarning, match="257 wide and the attention kernels take up to 256") as warned:
        check(tensors, [9, 5], window=3)
        check(tensors, [9, 5])
    assert len(warned) == 1


FAR_T, FAR_H, FAR_D = 16_384, 1024, 256  # the last head of the last rows: offsets near 2^32 elements


@in_the_interpreter
@pytest.mark.parametrize(
    ("start", "window", "filled"), [(FAR_T - 4, FAR_T, 4), (0, 4, 32)], ids=["far document", "far tile"]
)
def test_offsets_near_2_to_the_32_do_not_overflow(monkeypatch, start, window, filled):
    """Run only the program of the last tile: of a document that starts late, and of one that is long."""
    import triton.runtime.interpreter as interpreter

    builder = interpreter.interpreter_builder
    place = {}  # a program's number, and how many there are, on both axes

    def handle(value):
        return interpreter.TensorHandle(
            interpreter.np.array([value], dtype=interpreter.np.int32), interpreter.tl.int32
        )

    # debug=True raises on int32 overflow
    monkeypatch.setattr(builder, "options", interpreter.InterpreterOptions(debug=True))
    monkeypatch.setattr(builder, "create_get_program_id", lambda axis: handle(place["id"][axis]))
    monkeypatch.setattr(builder, "create_get_num_programs", lambda axis: handle(place["num"][axis]))

    def far_tensor():
        # 8 GiB of addresses, of which a few pages are touched: MAP_NORESERVE (0x4000) commits nothing
        space = mmap.mmap(-1, 2 * FAR_T * FAR_H * FAR_D, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
        return torch.frombuffer(space, dtype=torch.float16).view(FAR_T, FAR_H, FAR_D)

    q, k, v, dout, out, dq, dk, dv = (far_tensor() for _ in range(8))
    small = problem([filled], 1, 1, FAR_D, torch.float16)
    for x, values in zip((q, k, v, dout), small, strict=True):
        x[-filled:, -1:] = values
    logsumexp, delta = torch.zeros(FAR_H, FAR_T), torch.zeros(FAR_H, FAR_T)
    cu_seqlens = torch.tensor([0, start, FAR_T] if start else [0, FAR_T], dtype=torch.int32)
    sizes = FAR_T, len(cu_seqlens) - 1, window, FAR_D**-0.5, *[FAR_H * FAR_D, FAR_D] * 3
    blocks = {"GROUP": 1, "D": FAR_D, "BLOCK_D": FAR_D, "BLOCK_M": 16, "BLOCK_N": 16}
    # 1,023 tiles come before; a second document starts one number later
    program = FAR_T // 16 if start else FAR_T // 16 - 1
    place["id"], place["num"] = (0, FAR_H - 1), (program + 1, FAR_H)  # counted from the end
    tiles._forward_kernel[(1,)](q, k, v, out, logsumexp, cu_seqlens, *sizes, **blocks)
    sizes += FAR_H * FAR_D, FAR_D
    tiles._dq_kernel[(1,)](q, k, v, out, dout, logsumexp, delta, dq, cu_seqlens, *sizes, **blocks)
    place["id"] = (program, FAR_H - 1)
    tiles._dkdv_kernel[(1,)](q, k, v, dout, logsumexp, delta, dk, dv, cu_seqlens, *sizes, **blocks)
    truth = run(packed_attention_reference, [x.double() for x in small], [filled], window=window)
    torchs = run(packed_attention_reference, small, [filled], window=window)
    rows = slice(-min(filled, 16), None)  # the tile
    for name, x in {"out": out, "dq": dq, "dk": dk, "dv": dv}.items():
        assert rms(x[rows, -1:] - truth[name][rows]) <= 2 * rms((torchs[name] - truth[name])[rows]), name


def test_programs_reach_every_tile_and_at_most_one_per_document_is_idle():
    """Check the claim in packed_attention_tiles' docstring in plain integers."""
    generator = torch.Generator().manual_seed(0)
    for block in (1, 16, 64):
        for _ in range(50):
            lengths = torch.randint(1, 200, (9,), generator=generator).tolist()
            starts = [0, *accumulate(lengths)]
            first = [start // block + d for d, start in enumerate(starts)]
            needed = [-(-n // block) for n in lengths]
            for (a, b), blocks in zip(pairwise(first), needed, strict=True):
                assert blocks <= b - a <= blocks + 1
            assert first[-1] == sum(lengths) // block + len(lengths)


@pytest.mark.slow
@pytest.mark.skipif(
    INTERPRET or not HAS_TRITON, reason="this is the child, or Triton is not installed (macOS)"
)
def test_the_kernels_pass_this_file_in_the_interpreter(record_property):
    pass_in_the_interpreter(__file__, record_property, "--durations=8")
