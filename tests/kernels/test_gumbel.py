"""Test the torch path and, in a child process, the real Triton kernels in the interpreter.

A child process is needed because TRITON_INTERPRET is read at import.
"""

import math

import pytest
import torch
from accuracy import far_memory, poisoned, rms, run_as_program  # noqa: F401
from children import pass_in_the_interpreter
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_counting import Counter

import kit.kernels.gumbel as kernels
from kit.kernels import gumbel_tiles
from kit.kernels.backend import INTERPRET, tl, triton
from kit.kernels.gumbel import draw, draw_reference, gumbel

DTYPES = [torch.float16] if INTERPRET else [torch.float16, torch.bfloat16]
SETTINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6, "top_p": 0.95},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 2.0, "top_k": 40, "top_p": 0.7},
    {"temperature": 30.0, "top_p": 0.99},  # nearly flat: the candidates do not hold the nucleus
    {"temperature": 30.0, "top_k": 90, "top_p": 0.9},
]
PINNED_NOISE = [2.129956124554388, -0.6758308919569692, 1.9793958084638672]
PINNED_TOKENS = [[41, 124, 113, 92, 122, 105], [129] * 6, [122, 124, 113, 92, 122, 105]]
SHAPES = [(1, 1), (3, 7), (2, 65), (2, 300)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Tiles of 64 columns and 8 candidates: small inputs cross every seam."""
    monkeypatch.setattr(kernels, "BLOCK_V", 64)
    monkeypatch.setattr(kernels, "CANDIDATES", 8)
    monkeypatch.setattr(kernels, "RACED_AT_ONCE", 700)


def problem(N, V, dtype=torch.float32, scale=3.0):
    torch.manual_seed(N + V)
    keys = torch.randint(-(2**63), 2**63 - 1, (N,))
    return (scale * torch.randn(N, V)).to(dtype), keys, torch.arange(N) * 1_000


def kept_by(z, top_k, top_p):
    """Return which scaled logits of a row are kept: the definition, token by token."""
    p = (z.double() - z.double().max()).exp()
    floor = z.sort(descending=True).values[min(top_k or len(z), len(z)) - 1]
    p = p * (z >= floor)
    above = torch.stack([p[z > value].sum() for value in z])
    return (z >= floor) & (above < top_p * p.sum())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_are_the_references_and_log_probs_as_good_as_torchs(shape, settings, poisoned):  # noqa: F811
    compare_with_reference(problem(*shape), settings)


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_16_bits_are_drawn_from_as_their_values_in_fp32(dtype, settings, poisoned):  # noqa: F811
    compare_with_reference(problem(3, 130, dtype), settings)


def compare_with_reference(inputs, settings):
    logits, keys, positions = inputs
    tokens, logprobs = draw(logits, keys, positions, **settings)
    expected, theirs = draw_reference(logits, keys, positions, **settings)
    assert torch.equal(tokens, expected) and tokens.dtype == torch.int64
    assert logprobs.dtype == torch.float32 and not logprobs.isnan().any()
    _, truth = draw_reference(logits.double(), keys, positions, **settings)
    allowed = 2 * rms(theirs - truth) + 2 * torch.finfo(torch.float32).eps * (1 + rms(logits))
    assert rms(logprobs - truth) <= allowed


@pytest.mark.parametrize("settings", SETTINGS[2:], ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_only_kept_tokens_are_drawn_and_equal_ones_are_kept_together(settings, ties):
    logits, _, _ = problem(1, 300, scale=1.0)
    logits = logits.round(decimals=1) if ties else logits
    row, N = logits[0], 3 if INTERPRET else 150
    temperature, top_k, top_p = (
        settings.get(n, d) for n, d in (("temperature", 1), ("top_k", 0), ("top_p", 1))
    )
    kept = kept_by(row / temperature, top_k, top_p)
    tokens, logprobs = draw(
        logits.expand(N, -1), torch.arange(N), torch.zeros(N, dtype=torch.int64), **settings
    )
    assert kept[tokens].all() and (kept.sum() > 8 or settings["temperature"] < 2)
    expected = (row / temperature).masked_fill(~kept, -torch.inf).log_softmax(-1)
    torch.testing.assert_close(logprobs, expected[tokens], atol=3e-6, rtol=1e-5)
    if ties:
        values = row[kept].unique()
        assert all(kept[row == value].all() for value in values) and len(values) < kept.sum()


def test_tokens_come_with_the_probability_of_the_softmax():
    logits, N = torch.tensor([2.0, 1.5, -1.0, 0.3, 0.0, -30.0, 1.4]), 120 if INTERPRET else 2_000
    tokens, _ = draw(logits.expand(N, -1), torch.arange(N), torch.full((N,), 7))
    shares = torch.bincount(tokens, minlength=len(logits)).double() / N
    p = logits.double().softmax(-1)
    chi_squared = (N * (shares - p).square() / p)[p > 0.01].sum()
    assert chi_squared < 25  # five degrees of freedom: chance exceeds it once in 7,000
    flat = torch.full_like(p, 1 / len(p))
    assert (N * (shares - flat).square() / flat).sum() > 25  # and the test can tell a distribution apart


def test_streams_that_are_pinned_stay_as_they_are():
    """A run that is resumed draws what it would have drawn: these numbers may never change."""
    noise = gumbel(torch.tensor([-5]), torch.tensor([3]), torch.tensor([0, 1, 151_935]))
    expected = torch.tensor(PINNED_NOISE, dtype=torch.float64)
    torch.testing.assert_close(noise[0], expected, rtol=1e-15, atol=0)
    logits = torch.linspace(0, 3, 130)[None].expand(6, -1)
    drawn = [
        draw(logits, torch.arange(6), torch.arange(6), **settings)[0].tolist() for settings in SETTINGS[:3]
    ]
    assert drawn == PINNED_TOKENS


def test_no_rows_give_no_tokens():
    tokens, logprobs = draw(*problem(0, 9), top_p=0.9)
    assert tokens.shape == logprobs.shape == (0,) and tokens.dtype == torch.int64


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_ties_and_tokens_that_cannot_be_drawn(settings):
    logits, keys, positions = problem(3, 200)
    logits[0], logits[1] = 1.5, -torch.inf
    logits[1, 130] = -4.0  # the only one that can be drawn; whole tiles are -inf
    logits[2, :150] = -torch.inf
    tokens, logprobs = draw(logits, keys, positions, **settings)
    assert torch.equal(tokens, draw_reference(logits, keys, positions, **settings)[0])
    assert tokens[1] == 130 and logprobs[1] == 0 and tokens[2] >= 150 and logprobs.isfinite().all()
    if settings.get("temperature") == 0:
        assert tokens[0] == 0  # the first of the largest
    torch.testing.assert_close(logprobs[0], torch.tensor(-math.log(200)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("settings", SETTINGS[:5], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, "row"])
@pytest.mark.parametrize("place", [0, 199] if not INTERPRET else [70])
def test_logits_that_are_not_finite_are_seen_in_the_log_prob_of_their_row_alone(settings, bad, place):
    logits, keys, positions = problem(3, 200)
    if bad == "row":
        logits[1] = -torch.inf
    else:
        logits[1, place] = bad
    tokens, logprobs = draw(logits, keys, positions, **settings)
    assert logprobs.isfinite().tolist() == [True, False, True]
    assert tokens.min() >= 0 and tokens.max() < 200  # it may be embedded before the host sees the log-prob


@triton.jit
def _rough_kernel(bits_ptr, noise_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(noise_ptr + cols, gumbel_tiles._rough_gumbel(tl.load(bits_ptr + cols)))


@pytest.mark.interpreter
def test_rough_noise_is_wrong_by_far_less_than_the_join_allows():
    torch.manual_seed(0)
    ends = torch.arange(100)
    bits = torch.cat([ends, 2**52 - 1 - ends, 2**51 - 50 + ends, torch.randint(2**52, (4096 - 300,))])
    u = (bits.double() + 0.5) / 2**52
    rough = torch.empty(4096)
    _rough_kernel[(1,)](bits, rough, BLOCK=4096)
    assert (rough + (-u.log()).log()).abs().max() < 2**-12 / 20  # a card's log errs ten times as much as here


@pytest.mark.interpreter
def test_tokens_that_the_rough_noise_would_put_in_the_wrong_order_are_drawn_in_float64(monkeypatch):
    """Two tokens of different tiles, whose sums in fp32 and in float64 disagree about the larger."""
    monkeypatch.setattr(kernels, "BLOCK_V", 2048)
    key, position, ids = torch.tensor([11]), torch.tensor([5]), torch.arange(4096)
    exact, rough = gumbel(key, position, ids)[0], torch.empty(4096)
    _rough_kernel[(1,)](_bits(key, position, ids), rough, BLOCK=4096)
    error = rough.double() - exact
    high, low = error[:2048].topk(40).indices, error[2048:].topk(40, largest=False).indices + 2048
    first, second = (x.flatten() for x in torch.meshgrid(high, low, indexing="ij"))
    z = (
        exact[first] - exact[second] + (error[first] - error[second]) / 2
    ).float()  # of the second; the first: 0
    disagree = (z + exact[second] > exact[first]) & (z + rough[second] < rough[first])
    assert disagree.sum() > 20
    pairs = torch.stack([first, second], 1)[disagree][:5]
    for (i, j), z_j in zip(pairs.tolist(), z[disagree], strict=False):
        logits = torch.full((1, 4096), -torch.inf)
        logits[0, i], logits[0, j] = 0, z_j
        assert draw(logits, key, position)[0] == j == draw_reference(logits, key, position)[0]


def _bits(keys, positions, ids):
    return (
        kernels._mix(
            kernels._mix(keys + positions * -0x61C8864680B583EB)[:, None] + ids * -0x2917014799A6026D
        )
        >> 12
    ) & ((1 << 52) - 1)


def test_strided_rows_count_as_their_values():
    logits, keys, positions = problem(5, 70)
    wide = torch.full((5, 100), torch.nan)
    wide[:, 10:80] = logits
    expected = draw_reference(logits, keys, positions, top_p=0.9)
    for view in (wide[:, 10:80], logits.T.contiguous().T):
        assert torch.equal(draw(view, keys, positions, top_p=0.9)[0], expected[0])
    assert torch.equal(
        draw(logits[:1].expand(5, 70), keys, positions)[0][0], draw(logits, keys, positions)[0][0]
    )


def test_the_operator_and_its_fake_implementation_agree():
    arguments = (*problem(3, 70), 0.7, 0, 0.9)
    torch.library.opcheck(kernels._draw, arguments, test_utils=("test_schema", "test_faketensor"))
    with FakeTensorMode():
        tokens, logprobs = kernels._draw(
            torch.empty(5, 70, dtype=torch.bfloat16), *[torch.zeros(5).long()] * 2, 1, 0, 1
        )
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32 and logprobs.shape == (5,)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        (r"int64 of shape \(2, 3\); needed are floating", {"logits": torch.ones(2, 3).long()}),
        (r"shape \(2, 0\); needed are floating \(B, V\), V >= 1", {"logits": torch.ones(2, 0)}),
        (
            r"keys is torch.int64 of shape \(3,\) on cpu, but logits has 2 rows",
            {"keys": torch.ones(3).long()},
        ),
        ("positions is torch.int32", {"positions": torch.ones(2).int()}),
        ("positions is .* on meta", {"positions": torch.ones(2, device="meta").long()}),
        ("temperature is -1.0", {"temperature": -1.0}),
        ("top_k -2", {"top_k": -2}),
        ("top_p 1.5", {"top_p": 1.5}),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_both_values(match, options):
    arguments = {"logits": torch.ones(2, 3), "keys": torch.ones(2).long(), "positions": torch.ones(2).long()}
    with pytest.raises(ValueError, match=match):
        draw(**arguments | options)


@pytest.mark.interpreter
def test_a_vocabulary_of_151_936_is_split_joined_and_read_once(monkeypatch):
    monkeypatch.undo()
    N, V = 2, 151_936
    logits, keys, positions = problem(N, V, scale=8.0)  # whose nucleus the candidates hold
    for settings, passes in (
        ({"temperature": 0.6}, 1),
        ({"temperature": 0.6, "top_p": 0.9}, 3),
    ):  # one is torch.topk's
        with Counter() as counter:
            tokens, _ = draw(logits, keys, positions, **settings)
        assert torch.equal(tokens, draw_reference(logits, keys, positions, **settings)[0])
        tiles = N * 4 * kernels.BLOCK_V
        assert 0 <= counter.total.bytes_loaded - passes * logits.nbytes <= 4 * tiles


@pytest.mark.interpreter
def test_rows_past_2_to_the_31_elements_do_not_overflow(monkeypatch):
    V, row = 64, 2**25 + 3
    run_as_program(row, monkeypatch)
    logits, values, threshold = (far_memory((row + 1) * n, torch.float32) for n in (V, 8, 1))
    parts, logprobs = far_memory(row + 3, torch.float32), far_memory(row + 1, torch.float32)
    keys, positions, tokens = (far_memory(2 * (row + 1), torch.float32).view(torch.int64) for _ in range(3))
    last, _, _ = problem(1, V)
    logits[-V:], values[-8:] = last[0], last[0].topk(8).values

    sizes = V, V, 8, 0, 0.7, 0.9
    gumbel_tiles._cut_kernel[(1,)](logits, values, threshold, *sizes, BLOCK_V=64, CANDIDATES=8)
    streams = logits, keys, positions, threshold, parts
    gumbel_tiles._race_kernel[(1, 1)](*streams, V, V, 0.7, 1.0, BLOCK_V=64)
    gumbel_tiles._join_kernel[(1,)](*streams, tokens, logprobs, V, V, 1, 0.7, 1.0, BLOCK_V=64, TILES=1)
    expected, logprob = draw_reference(last, keys[:1], positions[:1], temperature=0.7, top_p=0.9)
    assert tokens[-1] == expected[0]
    torch.testing.assert_close(logprobs[-1:], logprob, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is the child")
def test_the_kernels_pass_the_same_tests_in_the_interpreter(record_property):
    pass_in_the_interpreter(__file__, record_property)
