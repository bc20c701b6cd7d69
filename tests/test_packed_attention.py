import pytest
import torch

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
        ours, torchs = run(packed_attention, tensors, **options), run(packed_attention_reference, tensors, **options)
        for name in truth:
            error, allowed = rms(ours[name] - truth[name]), rms(torchs[name] - truth[name])
            # through a window of 1 dq and dk are differences of two equal dot products: D roundings are their floor
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
    torch.testing.assert_close(ours, packed_attention(q, k, v.contiguous(), CU_SEQLENS, 20), atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (T, 3)}, "Hkv dividing Hq"),
        ({"v": (T - 1, 2)}, "must be"),
        ({"window": 0}, "window is 0"),
        ({"cu_seqlens": [0, 5, 5, T]}, "rise from 0 to T = 50"),
        ({"cu_seqlens": [0, 5, T - 1]}, "rise from 0 to T = 50"),
        ({"cu_seqlens": [1, 5, T]}, "rise from 0 to T = 50"),
        ({"max_seqlen": 19}, "max_seqlen is 19 but the longest document has 20"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    shapes = {"q": (T, 4), "k": (T, 2), "v": (T, 2)} | {n: s for n, s in change.items() if n in "qkv"}
    q, k, v = (torch.zeros(*shapes[name], 16) for name in "qkv")
    cu_seqlens = torch.tensor(change.get("cu_seqlens", CU_SEQLENS.tolist()))
    with pytest.raises(ValueError, match=message):
        packed_attention(q, k, v, cu_seqlens, change.get("max_seqlen", 20), window=change.get("window"))
