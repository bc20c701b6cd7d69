import math

import pytest
import torch

from kit.generate.sampling import SamplingParams, check_finite, sample, stream_key
from kit.kernels import gumbel as kernel
from kit.kernels.gumbel import gumbel
from kit.memory.live_bytes import LiveBytes

N = 20_000


def draw(logits, n=N, seed=0, **options):
    """Draw n times from one row of logits, each time with another stream."""
    params = SamplingParams(**{"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 1} | options)
    keys = torch.tensor([stream_key(seed, i) for i in range(n)])
    return sample(logits.expand(n, -1), params, keys, torch.zeros(n, dtype=torch.int64))


def within_chance(tokens, probabilities):
    """Return whether each token's share is within five standard errors of its probability (0: never)."""
    shares = torch.bincount(tokens, minlength=len(probabilities)).double() / len(tokens)
    error = (probabilities * (1 - probabilities) / len(tokens)).sqrt()
    return bool(((shares - probabilities).abs() <= 5 * error).all())


LOGITS = torch.tensor([2.0, 1.5, -1.0, 0.3, 0.0, -30.0, 1.4])


def test_tokens_come_with_the_probability_of_the_softmax():
    tokens, logprobs = draw(LOGITS)
    assert within_chance(tokens, LOGITS.double().softmax(-1))
    torch.testing.assert_close(logprobs, LOGITS.log_softmax(-1)[tokens])
    # and the test can tell a close neighbour apart
    assert not within_chance(tokens, (LOGITS.double() / 1.1).softmax(-1))


def test_temperature_top_k_and_top_p_cut_and_renormalise_in_that_order():
    cases = {
        (0.6, 0, 1.0): lambda p: p,
        (0.6, 3, 1.0): lambda p: p * (p >= p.topk(3).values[-1]),
        (1.0, 0, 0.75): lambda p: p * (p >= p.topk(3).values[-1]),  # 0.43 + 0.26 < 0.75 <= 0.43 + 0.26 + 0.24
        (1.0, 3, 0.75): lambda p: p * (p >= p.topk(3).values[-1]),  # of the three: 0.46 + 0.28 < 0.75
        (1.0, 0, 1e-9): lambda p: p * (p >= p.max()),
    }
    for (temperature, top_k, top_p), cut in cases.items():
        expected = cut((LOGITS.double() / temperature).softmax(-1))
        expected = expected / expected.sum()
        tokens, logprobs = draw(LOGITS, temperature=temperature, top_k=top_k, top_p=top_p)
        assert within_chance(tokens, expected), (temperature, top_k, top_p)
        torch.testing.assert_close(logprobs.double(), expected.log()[tokens], atol=1e-5, rtol=1e-5)


def test_a_nucleus_larger_than_the_first_look_is_found_whole():
    logits = torch.linspace(1, 0, 5000)
    tokens, logprobs = draw(logits, n=1500, top_p=0.9)
    p = logits.double().softmax(-1)
    p = p * (p.cumsum(-1) - p < 0.9)
    assert len(tokens.unique()) > 1024
    torch.testing.assert_close(logprobs.double(), (p / p.sum()).log()[tokens], atol=1e-5, rtol=1e-5)


def test_tokens_that_are_equally_likely_are_kept_together():
    logits = torch.zeros(5000)
    logits[17] = 3.0
    for cut in ({"top_p": 0.9}, {"top_k": 2}, {"top_k": 2, "top_p": 0.9}):
        _, logprobs = draw(logits, n=50, **cut)
        assert logprobs.min().item() == pytest.approx(-math.log(math.exp(3) + 4999), rel=1e-4)


def test_greedy_takes_the_first_of_the_largest_and_needs_no_stream():
    tokens, logprobs = draw(torch.tensor([0.0, 2.0, 2.0]), n=3, temperature=0.0)
    assert tokens.tolist() == [1, 1, 1]
    torch.testing.assert_close(logprobs, torch.tensor([0.0, 2.0, 2.0]).log_softmax(-1)[1].expand(3))


def test_a_stream_depends_on_seed_key_and_position_and_on_nothing_else():
    logits = torch.zeros(8, 50)
    params = SamplingParams(1.0, 1.0)
    keys = torch.tensor([stream_key(0, ["q", i]) for i in range(8)])
    positions = torch.arange(8)
    tokens, _ = sample(logits, params, keys, positions)
    order = torch.tensor([3, 1, 7])
    again, _ = sample(logits[:3], params, keys[order], positions[order])
    assert torch.equal(again, tokens[order])
    names = (0, "0", ["q", 0], ["q", 1], [0, "q"])
    assert len({stream_key(seed, name) for seed in (0, 1) for name in names}) == 10


def test_noise_of_neighbouring_keys_positions_and_tokens_is_uncorrelated_and_gumbel():
    one = torch.tensor([0])
    many = torch.arange(50_000)
    for noise in (
        gumbel(one, one, many)[0],
        gumbel(many, torch.zeros_like(many), one)[:, 0],
        gumbel(torch.zeros_like(many), many, one)[:, 0],
    ):
        assert noise.isfinite().all()
        # the mean is Euler's constant, the standard deviation pi / sqrt(6)
        assert abs(noise.mean() - 0.5772) < 5 * 1.2825 / math.sqrt(len(many))
        assert abs(torch.corrcoef(torch.stack([noise[1:], noise[:-1]]))[0, 1]) < 5 / math.sqrt(len(many))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_parameters_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_how_many_candidates_other_rows_need_does_not_change_a_draw():
    torch.manual_seed(0)
    sharp = torch.randn(1, 5000) * 6
    keys, positions = torch.tensor([stream_key(0, i) for i in range(400)]), torch.arange(400)
    params = SamplingParams(temperature=1.0, top_p=0.95)
    alone, alone_logprobs = sample(sharp.expand(400, -1), params, keys, positions)
    beside, beside_logprobs = sample(
        torch.cat([sharp.expand(400, -1), torch.zeros(1, 5000)]),
        params,
        torch.cat([keys, keys[:1]]),
        torch.cat([positions, positions[:1]]),
    )
    assert len(alone.unique()) > 3
    assert torch.equal(beside[:400], alone)
    torch.testing.assert_close(beside_logprobs[:400], alone_logprobs)


def test_drawing_from_whole_vocabularies_holds_no_more_for_more_rows_than_their_logits_and_draws_the_same(
    monkeypatch,
):
    V, params = 1_000, SamplingParams(temperature=0.7, top_p=1.0, max_new_tokens=1)
    torch.manual_seed(0)
    logits, keys, positions = torch.randn(67, V), torch.arange(67), torch.zeros(67, dtype=torch.int64)
    whole = sample(logits, params, keys, positions)
    monkeypatch.setattr(kernel, "RACED_AT_ONCE", 8 * V + 1)
    peaks = []
    for rows in (8, 67):
        with LiveBytes() as held:
            found = sample(logits[:rows], params, keys[:rows], positions[:rows])
        peaks.append(held.peak)
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    assert peaks[1] <= peaks[0] + 67 * 100  # the tokens and log-probs of every row


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 50, 99])
@pytest.mark.parametrize("how", [{}, {"temperature": 0}, {"top_p": 1.0}, {"top_p": 1.0, "top_k": 5}])
def test_one_logit_that_is_not_finite_is_seen_in_the_log_prob_of_its_row_alone(bad, place, how):
    torch.manual_seed(0)
    logits = torch.randn(3, 100)
    params, streams = SamplingParams(**how), (torch.tensor([1, 2, 3]), torch.zeros(3, dtype=torch.int64))
    logprobs = sample(logits, params, *streams)[1].tolist()
    check_finite(logprobs)
    logits[1, place] = bad
    with pytest.raises(ValueError, match="logits are NaN or infinite for 1 of 3 responses"):
        check_finite(sample(logits, params, *streams)[1].tolist())


def test_a_token_that_cannot_be_drawn_is_no_reason_to_stop():
    logits = torch.randn(2, 100).index_fill(1, torch.arange(99), -math.inf)
    found = sample(logits, SamplingParams(), torch.tensor([1, 2]), torch.zeros(2, dtype=torch.int64))
    assert found[1].tolist() == [0.0, 0.0]
    check_finite(found[1].tolist())
