import os
import subprocess
import sys
import warnings
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import kit.kernels.packed_attention as pa
from kit.kernels import backend
from kit.kernels import packed_attention_tiles as tiles
from kit.kernels.packed_attention import packed_attention, packed_attention_reference

LENGTHS = [1, 13, 7, 1, 8, 20]  # single tokens, a window of 7 and one more, longer than two windows
T = sum(LENGTHS)
D = 16  # head_dim
CU_SEQLENS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)


def problem(heads, kv_heads, dtype=torch.float64, T=T):
    torch.manual_seed(0)
    q, k, v = (torch.randn(T, h, 16, dtype=torch.float64) for h in (heads, kv_heads, kv_heads))
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def run(function, tensors, **options):
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors)
    out = function(q, k, v, CU_SEQLENS, max(LENGTHS), **options)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (out * weight.to(out.dtype)).sum().backward()
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (7, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_no_worse_than_the_masked_square_against_float64(window, heads, kv_heads, scale):
    options = {"window": window, "scale": scale}
    for dtype in (torch.float32, torch.bfloat16):
        tensors = problem(heads, kv_heads, dtype)
        truth = run(packed_attention_reference, [x.double() for x in tensors], **options)
        ours, torchs = (
            run(packed_attention, tensors, **options),
            run(packed_attention_reference, tensors, **options),
        )
        for name in truth:
            error, allowed = rms(ours[name] - truth[name]), rms(torchs[name] - truth[name])
            # through a window of 1 dq and dk are differences of two equal dot products: D roundings are their
            # floor
            floor = D * torch.finfo(dtype).eps * rms(truth["out"]) if window == 1 else 0.0
            assert error <= 2 * allowed + floor, f"{name} {dtype}"


@pytest.mark.parametrize("window", [None, 3])
def test_perturbing_one_document_leaves_the_others_bit_equal(window):
    q, k, v = problem(4, 2, torch.float32)
    before = run(packed_attention, (q, k, v), window=window)
    rows = slice(int(CU_SEQLENS[1]), int(CU_SEQLENS[2]))
    with torch.no_grad():
        for x in (q, k, v):
            x[rows] += 1
    after = run(packed_attention, (q, k, v), window=window)
    others = torch.ones(T, dtype=torch.bool)
    others[rows] = False
    for name in before:
        assert torch.equal(before[name][others], after[name][others]), name
        assert not torch.equal(before[name][rows], after[name][rows]), name


def test_non_contiguous_and_broadcast_inputs_are_read_right():
    q, k, v = (x.detach() for x in problem(4, 2))
    wide = torch.zeros(T, 4, 32, dtype=torch.float64)
    wide[..., ::2] = q
    v = v[:, :1].expand(T, 2, 16)  # stride 0 along the heads
    ours = packed_attention(wide[..., ::2], k, v, CU_SEQLENS, 20)
    torch.testing.assert_close(
        ours, packed_attention(q, k, v.contiguous(), CU_SEQLENS, 20), atol=1e-14, rtol=0
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (T, 3)}, "Hkv dividing Hq"),
        ({"v": (T - 1, 2)}, "must be"),
        ({"window": 0}, "window is 0"),
        ({"cu_seqlens": [0, 5, 5, T]}, "rise from 0 to T = 50"),
        ({"cu_seqlens": [0, 5, T - 1]}, "rise from 0 to T = 50"),
        ({"cu_seqlens": [1, 5, T]}, "rise from 0 to T = 50"),
        ({"cu_seqlens": []}, "cu_seqlens is torch.float32 of shape"),
        ({"cu_seqlens": [0.0, 50.0]}, "cu_seqlens is torch.float32.*int32 or int64"),
        ({"cu_seqlens": [[0, 50]]}, r"shape \(1, 2\)"),
        ({"max_seqlen": 19}, "max_seqlen is 19 but the longest document has 20"),
        ({"max_seqlen": torch.tensor(20)}, r"max_seqlen is tensor\(20\) but must be an int"),
        ({"window": -3}, "window is -3"),
        ({"window": 2.5}, "window is 2.5.*int >= 1"),
        ({"k": (T, 0), "v": (T, 0)}, "Hkv dividing Hq"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    shapes = {"q": (T, 4), "k": (T, 2), "v": (T, 2)} | {n: s for n, s in change.items() if n in "qkv"}
    q, k, v = (torch.zeros(*shapes[name], 16) for name in "qkv")
    cu_seqlens = torch.tensor(change.get("cu_seqlens", CU_SEQLENS.tolist()))
    with pytest.raises(ValueError, match=message):
        packed_attention(q, k, v, cu_seqlens, change.get("max_seqlen", 20), window=change.get("window"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.float16}, "q is torch.float32, k torch.float16 and v torch.float32; cast"),
        ({"q": torch.int64, "k": torch.int64, "v": torch.int64}, "q is torch.int64"),
        ({"v": "meta"}, "q is on cpu, k on cpu, v on meta and cu_seqlens on cpu"),
        ({"cu_seqlens": "meta"}, "cu_seqlens on meta"),
    ],
)
def test_mixed_dtypes_and_devices_are_refused(change, message):
    tensors = {
        "q": torch.zeros(T, 4, 16),
        "k": torch.zeros(T, 2, 16),
        "v": torch.zeros(T, 2, 16),
        "cu_seqlens": CU_SEQLENS,
    }
    tensors |= {name: tensors[name].to(where) for name, where in change.items()}
    with pytest.raises(ValueError, match=message):
        packed_attention(**tensors, max_seqlen=20)


@pytest.mark.parametrize("function", [packed_attention, pa.documents_attention])
def test_a_pack_without_tokens_returns_none_and_has_gradients(function):
    tensors = [torch.zeros(0, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    out = function(*tensors, torch.tensor([0]), 0)
    assert out.shape == (0, 4, 16)
    out.sum().backward()
    assert tensors[0].grad.shape == (0, 4, 16)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_every_pack_agrees_with_the_masked_square(data):
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    kv_heads, group, D = (data.draw(st.integers(1, 3)) for _ in range(3))
    window = data.draw(st.none() | st.integers(1, 14))
    cu_seqlens = torch.tensor([0, *accumulate(lengths)])
    torch.manual_seed(0)
    tensors = [
        torch.randn(sum(lengths), h, D, dtype=torch.float64) for h in (kv_heads * group, kv_heads, kv_heads)
    ]
    results = []
    for function in (packed_attention, packed_attention_reference):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = function(*leaves, cu_seqlens, max(lengths), window=window)
        results.append([out, *torch.autograd.grad((out * out).sum(), leaves)])
    # in float64 only a few roundings of sums of a few terms remain
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("window", [None, 7])
def test_the_path_without_operators_gives_the_same_to_the_last_bit(window):
    tensors = problem(4, 2, torch.float32)
    ours = run(packed_attention, tensors, window=window)
    other = run(pa.documents_attention, tensors, window=window)
    for name in ours:
        assert torch.equal(ours[name], other[name]), name


def test_a_gradient_is_returned_only_for_inputs_that_need_it():
    q, k, v = problem(4, 2, torch.float32)
    packed_attention(q, k.detach(), v, CU_SEQLENS, 20).sum().backward()
    assert q.grad is not None and v.grad is not None and k.grad is None
    assert not packed_attention(q.detach(), k.detach(), v.detach(), CU_SEQLENS, 20).requires_grad


def test_autocast_casts_what_a_rotary_embedding_left_in_fp32():
    q, k, v = (x.detach().float() for x in problem(4, 2))
    with torch.autocast("cpu", torch.bfloat16):
        ours = packed_attention(q, k, v.bfloat16(), CU_SEQLENS, 20)
    assert torch.equal(ours, packed_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), CU_SEQLENS, 20))


def test_fake_tensors_allocate_what_the_kernels_do():
    saved = []
    with (
        FakeTensorMode(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        q, k, v = (torch.empty(T, h, 16, dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2))
        cu_seqlens = torch.empty(4, dtype=torch.int32)  # without values
        out = packed_attention(q, k, v, cu_seqlens, 20, window=7)
        out.sum().backward()
    assert out.shape == (T, 4, 16) and out.dtype == torch.bfloat16
    assert [(tuple(x.shape), x.dtype) for x in saved] == [
        *(((T, h, 16), torch.bfloat16) for h in (4, 2, 2, 4)), ((4, T), torch.float32), ((4,), torch.int32)
    ]  # fmt: skip
    assert all(x.grad.shape == x.shape and x.grad.dtype == x.dtype for x in (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_operators_and_their_fake_implementations_agree(dtype):
    q, k, v = (x.detach().to(dtype) for x in problem(4, 2))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(pa._forward, (q, k, v, CU_SEQLENS, 20, 7, 0.25), test_utils=tests)
    out, logsumexp = pa._forward(q, k, v, CU_SEQLENS, 20, 7, 0.25)
    torch.library.opcheck(pa._backward, (out, q, k, v, out, logsumexp, CU_SEQLENS, 7, 0.25), test_utils=tests)


@pytest.mark.parametrize("window", [None, 7])
def test_a_compiled_function_is_one_graph_and_gives_the_same(window):
    tensors = problem(4, 2, torch.float32)
    compiled = torch.compile(
        lambda *a, **o: packed_attention(*a, **o) * 2, fullgraph=True, backend="aot_eager"
    )
    ours, eager = (
        run(compiled, tensors, window=window),
        run(lambda *a, **o: packed_attention(*a, **o) * 2, tensors, window=window),
    )
    for name in ours:
        assert torch.equal(ours[name], eager[name]), name
    with pytest.raises(ValueError, match="rise from 0 to T = 50"):
        compiled(*tensors, CU_SEQLENS - 1, 20, window=window)


def test_a_card_without_tensor_cores_gets_one_warning(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 0 else (8, 6)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce RTX 2080")
    backend.has_tensor_cores.cache_clear()
    with pytest.warns(UserWarning, match=r"RTX 2080 has compute capability 7.5.*plain torch"):
        assert not backend.has_tensor_cores(torch.device("cuda", 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not backend.has_tensor_cores(torch.device("cuda", 0))
        assert backend.has_tensor_cores(torch.device("cuda", 1))
    backend.has_tensor_cores.cache_clear()


@pytest.mark.skipif(not backend.HAS_TRITON, reason="Triton is not installed (macOS)")
def test_an_h100_has_tiles_of_its_own_unless_it_runs_another_cards_code(monkeypatch):
    found = {}
    for override in ("", "sm89"):
        monkeypatch.setenv("TRITON_OVERRIDE_ARCH", override)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        backend.compute_capability.cache_clear()
        found[override] = tiles.tiles(256, 2, backend.compute_capability(torch.device("cuda", 0)))
    backend.compute_capability.cache_clear()
    assert backend.compute_capability(torch.device("cpu")) == 0
    assert found["sm89"] == tiles.tiles(256, 2) != found[""]
    assert found[""]["dkdv"] == found["sm89"]["dkdv"]  # what has no tile of its own has the others'
    assert all(tiles.tiles(D, 4, 90) == tiles.tiles(D, 4) for D in (64, 128, 256))


def test_without_triton_the_module_imports_and_uses_the_torch_path():
    code = """
import sys
sys.modules["triton"] = None  # import triton now raises ImportError, as on macOS
import torch
from kit.kernels.packed_attention import packed_attention
q = torch.randn(6, 2, 16, requires_grad=True)
packed_attention(q, q, q, torch.tensor([0, 2, 6]), 4, window=3).sum().backward()
assert q.grad.isfinite().all()
"""
    child = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def test_a_copy_that_was_checked_on_the_host_is_not_read_again_until_it_changes(monkeypatch):
    copy, other = CU_SEQLENS.clone(), CU_SEQLENS.clone()
    pa.accept_copy(copy, CU_SEQLENS, T, max(LENGTHS))
    read = []
    monkeypatch.setattr(pa, "_bounds", lambda *arguments: read.append(arguments))
    pa._accept(copy, T, max(LENGTHS))
    assert read == []
    pa._accept(other, T, max(LENGTHS))  # another tensor of the same values
    pa._accept(copy, T, max(LENGTHS) + 1)  # another claim
    copy += 0
    pa._accept(copy, T, max(LENGTHS))
    assert len(read) == 3
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"rise from 0 to T = {T + 1}"):
        pa.accept_copy(other, CU_SEQLENS, T + 1, max(LENGTHS))
