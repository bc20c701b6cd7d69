"""Test the torch path and, in a child process, the Triton kernel in the interpreter: their bits are equal."""

from itertools import pairwise

import pytest
import torch
from children import pass_in_the_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import kit.kernels.adamw8bit as ka
from kit.kernels.adamw8bit import adamw8bit_, adamw_reference, exact_weight, init_state, state_slice
from kit.kernels.adamw8bit_blocks import in_blocks, torch_level, torch_random_bits
from kit.kernels.backend import INTERPRET

# bf16 too: the kernel does no bf16 arithmetic, which the interpreter gets wrong
DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["fp32", "bf16", "exact"]  # exact: bf16 with a rest
GRADIENTS = [torch.float32, torch.bfloat16, torch.float16]
# one number; a block less one; a block; a block and one; several programs, the last one ragged
SIZES = [1, 255, 256, 257, 2_001]


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    monkeypatch.setattr(ka, "CPU_SLAB", 3 * ka.BLOCK)


def gradients(N, num_steps, *, seed=0, dtype=torch.float32):
    """Return heavy-tailed gradients (num_steps, N); some numbers and some steps get none."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp(torch.randn(N, generator=generator))
    g = 1e-3 * scales * torch.randn(num_steps, N, generator=generator)
    g[:, torch.rand(N, generator=generator) < 0.1] = 0
    g[torch.rand(num_steps, N, generator=generator) < 0.1] = 0
    return g.to(dtype)


def weights(N, dtype=torch.float32):
    return (0.02 * torch.randn(N, generator=torch.Generator().manual_seed(1))).to(dtype)


def fresh(N, kind):
    """Return (weights, state), the same bf16 numbers for "bf16" and "exact"."""
    p = weights(N, torch.float32 if kind == "fp32" else torch.bfloat16)
    return p, init_state(p, exact=kind == "exact")


def train(p, gs, *, state=None, first_step=1, lr=1e-3, seed=0, **options):
    """Return copies of p and state after the updates."""
    p, state = p.clone(), {name: x.clone() for name, x in (state or init_state(p)).items()}
    for step, g in enumerate(gs, first_step):
        adamw8bit_(p, g, state, step=step, lr=lr, seed=seed, **options)
    return p, state


def decode_state(state):
    """Return (m, v), (N,) fp32 each."""
    N, m_codes, v_codes = len(state["m_codes"]), in_blocks(state["m_codes"]), in_blocks(state["v_codes"])
    m = torch_level(m_codes, ka.M_LEVELS).mul_(state["m_scales"][:, None]).copysign_(m_codes)
    v = torch_level(v_codes, ka.V_LEVELS).mul_(state["v_scales"][:, None]).square_()
    return m.view(-1)[:N], v.view(-1)[:N]


def assert_same_bits(a, b):
    (p, state), (q, other) = a, b
    assert p.equal(q)
    for name in state:
        assert state[name].equal(other[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradient_dtype", GRADIENTS, ids=str)
@pytest.mark.parametrize("N", SIZES)
def test_kernel_and_torch_path_give_the_same_bits(N, gradient_dtype, kind):
    """Only a code can differ, about once in 10^7, if a number is within a bit of a level; none here does."""
    options = {"weight_decay": 0.1, "gradient_scale": 0.7, "index": 3}
    start, state = fresh(N, kind)
    p, state = train(start, gradients(N, 4, dtype=gradient_dtype), state=state, **options)
    q, other = fresh(N, kind)
    for step, g in enumerate(gradients(N, 4, dtype=gradient_dtype), 1):
        ka._torch_update(
            q, g, *(other[x] for x in ka.STATES), other.get("rest"), 0, ka._stream_key(0, step, 3),
            0.7, 0.9, 1 - 0.9, 0.999, 1 - 0.999,
            (1 - 0.999**step) ** -0.5, 1e-8, 1e-3 / (1 - 0.9**step), 1 - 1e-3 * 0.1,
        )  # fmt: skip
    assert_same_bits((p, state), (q, other))


@pytest.mark.parametrize("gradient_dtype", GRADIENTS, ids=str)
def test_the_first_step_is_adamw_and_its_states_are_the_nearest_codes_up_or_down(gradient_dtype):
    """The first update reads no codes, so p is as exact as in torch's fp32 AdamW.

    A code is a neighbour of its number.
    """
    N, options = 2_001, {"lr": 3e-4, "eps": 1e-8, "weight_decay": 0.1}
    g = gradients(N, 1, dtype=gradient_dtype)[0]
    p, state = train(weights(N), [g], **options)
    zero = torch.zeros(N, dtype=torch.float64)
    truth, m, v = adamw_reference(weights(N).double(), g.double(), zero, zero, step=1, **options)
    torchs = torch.nn.Parameter(weights(N))
    torchs.grad = g.float()
    torch.optim.AdamW([torchs], **options).step()
    assert (p - truth).abs().max() <= 2 * (torchs - truth).abs().max()
    for name, x, levels in (("m", m.abs(), 127), ("v", v.sqrt(), 255)):
        scale = state[f"{name}_scales"].double().repeat_interleave(256)[:N]
        exact = levels * (x / scale) ** 0.25
        code = state[f"{name}_codes"].double().abs()
        eps = levels * torch.finfo(torch.float32).eps
        assert ((code >= exact.floor() - eps) & (code <= (exact + eps).ceil())).all()
        # each block's largest is exact
        assert (state[f"{name}_codes"].float().abs() == levels).float().sum() >= N // 256
    assert ((state["v_codes"] == 0) == (g == 0)).all()  # v is not 0 for any gradient that is not 0
    sign = state["m_codes"].sign()
    assert ((sign == 0) | (sign == g.sign())).all()


@pytest.mark.skipif(INTERPRET, reason="the kernel's bits are the torch path's")
def test_the_random_codes_have_the_right_mean():
    """m and sqrt(v) have no bias: 1,024 streams' mean is within five standard errors of two-point noise."""
    g, trials = gradients(256, 1)[0], 1_024
    g[0] = 1.0
    states = [decode_state(train(weights(256), [g], seed=seed)[1]) for seed in range(trials)]
    ms, roots = (
        torch.stack([m.double() for m, _ in states]),
        torch.stack([v.double().sqrt() for _, v in states]),
    )
    for samples, x, levels in (
        (ms.abs(), 0.1 * g.double().abs(), 127),
        (roots, 0.001**0.5 * g.double().abs(), 255),
    ):
        lower = (levels * (x / x.max()) ** 0.25).floor()
        low, high = (x.max() * (code / levels) ** 4 for code in (lower, lower + 1))
        error = ((x - low) * (high - x)).clamp(min=0).sqrt() / trials**0.5 + 1e-6 * x
        z = ((samples.mean(0) - x) / error)[(x > low[x > 0].min()) & (x > 0)]
        assert z.abs().max() < 5 and z.mean().abs() < 5 / len(z) ** 0.5


def updates_of_1e_5(round_):
    """Return how far 1,000 updates of 1e-5 move the mean of bf16 weights near 0.02 (spacing 1.2e-4)."""
    p = (0.02 + 0.002 * torch.rand(4_096, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    before = p.double().mean()
    return round_(p) - before


@pytest.mark.skipif(INTERPRET, reason="4 million updates; the kernel's bits are the torch path's")
def test_a_thousand_updates_of_1e_5_move_bf16_weights_by_1e_2():
    """A constant gradient makes Adam's update exactly lr. Downwards, the spacing shrinks with the weights."""

    def stochastic(p):
        return train(p, [torch.ones(len(p))] * 1_000, lr=1e-5)[0].double().mean()

    def to_nearest(p):
        for _ in range(1_000):
            p.copy_(p.float() - 1e-5)
        return p.double().mean()

    assert abs(updates_of_1e_5(stochastic) + 1e-2) < 2e-4
    assert not abs(updates_of_1e_5(to_nearest) + 1e-2) < 2e-4  # the test can see the difference


@pytest.mark.parametrize("gradient_dtype", GRADIENTS, ids=str)
def test_weight_and_rest_are_the_bits_of_an_fp32_weight_after_the_same_gradients(gradient_dtype):
    N, options = 2_001, {"weight_decay": 0.1, "gradient_scale": 0.7, "index": 3, "lr": 1e-4}
    p, state = fresh(N, "exact")
    gs = gradients(N, 10 if INTERPRET else 400, dtype=gradient_dtype)
    truth, others = train(p.float(), gs, **options)
    p, state = train(p, gs, state=state, **options)
    assert_same_bits((exact_weight(p, state.pop("rest")), state), (truth, others))
    assert not p.float().equal(truth)  # the rest is needed


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="6 million updates; the kernel's bits are the torch path's")
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_at_the_learning_rate_of_rl_rounding_is_as_large_as_the_move_and_with_a_rest_it_is_nothing(mean):
    """The move is the fp32 weights': 400 updates of 5e-7 near 0.02, where bf16 numbers are 1.2e-4 apart."""
    generator = torch.Generator().manual_seed(0)
    p = (0.02 + 0.002 * torch.randn(4_096, generator=generator)).bfloat16()
    gs = mean + torch.randn(400, 4_096, generator=generator)
    truth, _ = train(p.float(), gs, lr=5e-7)
    rounded, _ = train(p, gs, lr=5e-7)
    kept, state = train(p, gs, state=init_state(p, exact=True), lr=5e-7)
    move = (truth - p.float()).norm()
    share = ((rounded.float() - truth).norm() / move).item()
    print(f"gradients of mean {mean}: rounding ends {share:.2f} times the move from fp32")
    assert share > 0.5 and exact_weight(kept, state["rest"]).equal(truth)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy in the interpreter warns about NaN
def test_every_bf16_pattern_keeps_every_edge_of_its_rest_and_is_the_nearest_to_the_exact_weight():
    """An update by nothing takes weights apart into numbers and puts them together again."""
    uppers = torch.arange(-(2**15), 2**15).to(torch.int16)
    edges = torch.tensor([0, 1, -1, 2**15 - 1, -(2**15)], dtype=torch.int16)
    before, rest = (x.reshape(-1).clone() for x in torch.meshgrid(uppers, edges, indexing="ij"))
    wide = before.long() * 2**16 + rest  # the exact weight's bits, by definition
    number = ((wide + 2**31) % 2**32 - 2**31).to(torch.int32).view(torch.float32)
    p = before.clone().view(torch.bfloat16)
    p, state = train(p, torch.zeros(1, len(p)), state=init_state(p, exact=True) | {"rest": rest})

    nan = number.isnan()
    assert p.isnan().equal(nan) and (state["rest"][nan] == 0).all()
    assert p.view(torch.int16)[~nan].equal(before[~nan]) and state["rest"][~nan].equal(rest[~nan])
    assert exact_weight(p, state["rest"])[~nan].view(torch.int32).equal(number[~nan].view(torch.int32))
    tie = rest == -(2**15)
    assert p[~nan & ~tie].equal(number[~nan & ~tie].bfloat16())
    finite = p.isfinite() & tie & ~nan
    assert (p[finite].double().abs() > number[finite].double().abs()).all()  # away from zero


def test_the_bits_depend_on_seed_step_index_and_element_only():
    p, gs = weights(2_001, torch.bfloat16), gradients(2_001, 1)
    first = train(p, gs, seed=7)
    assert_same_bits(first, train(p, gs, seed=7))
    for other in ({"seed": 8}, {"seed": 7, "index": 1}):
        q, state = train(p, gs, **other)
        assert not q.equal(first[0]) and not state["m_codes"].equal(first[1]["m_codes"])
    keys = {
        ka._stream_key(seed, step, index) for seed in range(4) for step in range(50) for index in range(20)
    }
    assert len(keys) == 4 * 50 * 20 and all(-(2**63) <= key < 2**63 for key in keys)
    bits = torch_random_bits(ka._stream_key(7, 1, 0), 0, 1 << 16, "cpu").view(-1)
    assert len(bits.unique()) == 1 << 16
    ones = torch.stack([(bits >> i) & 1 for i in range(64)]).double()  # (64, elements)
    error = 5 * 0.5 / (1 << 8)  # five standard errors of a mean of 2^16 coins
    assert (ones.mean(1) - 0.5).abs().max() < error
    apart = torch.corrcoef(ones) - torch.eye(64)
    assert apart.abs().max() < 5 / (1 << 8)  # the bits of one number: p, m and v use different ones
    assert (
        torch.stack(
            [((ones[:, lag:] == ones[:, :-lag]).double().mean(1) - 0.5).abs().max() for lag in (1, 2, 256)]
        ).max()
        < error
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(kind, tmp_path):
    from safetensors.torch import load_file, save_file

    (p, start), gs = fresh(700, kind), gradients(700, 6)
    half, state = train(p, gs[:3], state=start)
    save_file({"p": half, **state}, tmp_path / "state.safetensors")
    state = load_file(tmp_path / "state.safetensors")
    resumed = train(state.pop("p"), gs[3:], state=state, first_step=4)
    assert_same_bits(resumed, train(p, gs, state=start))


@settings(max_examples=5 if INTERPRET else 40, deadline=None, database=None)
@given(st.data())
def test_slices_in_any_order_give_the_bits_of_the_whole(data):
    N = data.draw(st.integers(0, 2_600))
    cuts = sorted({0, N, *(256 * i for i in data.draw(st.lists(st.integers(0, N // 256), max_size=4)))})
    parts = data.draw(st.permutations(list(pairwise(cuts))))
    (p, state), gs = fresh(N, data.draw(st.sampled_from(KINDS))), gradients(N, 2)
    whole = train(p, gs, state=state)
    for step, g in enumerate(gs, 1):
        for first, end in parts:
            part = state_slice(state, first, end - first)
            adamw8bit_(p[first:end], g[first:end], part, step=step, lr=1e-3, seed=0, first_element=first)
    assert_same_bits(whole, (p, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_gradient_and_state_only_the_decay_moves_a_weight(dtype):
    p = weights(2_001, dtype)
    still, state = train(p, torch.zeros(5, 2_001))
    assert still.equal(p) and all((x == 0).all() for x in state.values())
    decayed, _ = train(p, torch.zeros(5, 2_001), lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(
        decayed.double().norm() / p.double().norm(), torch.tensor(0.95**5).double(), rtol=1e-3, atol=0
    )


def test_a_dead_neighbour_of_a_live_weight_stops_and_never_explodes():
    """Half a block gets only one gradient: m fades to code 0, v does not, no update exceeds Adam's first."""
    N, steps = 512, 20 if INTERPRET else 1_500
    gs = gradients(N, steps)
    dead = torch.arange(N) % 2 == 0
    gs[1:, dead] = 0
    p, state, largest = weights(N), init_state(weights(N)), []
    for step, g in enumerate(gs, 1):
        before = p.clone()
        adamw8bit_(p, g, state, step=step, lr=1e-3, seed=0)
        largest.append((p - before)[dead].abs().max())
    assert max(largest) <= 1.01e-3
    assert (state["v_codes"][dead] > 0).equal(gs[0, dead] != 0)
    assert INTERPRET or (state["m_codes"][dead] == 0).all()


def test_a_v_far_below_the_first_code_keeps_it_and_only_a_v_of_zero_has_the_code_0():
    """With v = 0 a weight whose m is not yet 0 would be divided by eps alone."""
    g = torch.full((256,), 1e-12)
    g[0], g[100:] = 1.0, 0.0
    _, state = train(weights(256), [g])
    assert state["v_codes"].tolist() == [255] + 99 * [1] + 156 * [0]


def test_v_follows_gradients_that_shrink_beside_others_that_do_not():
    """beta2 = 0.999 shrinks v by under a code per step: rounded to nearest, it would stay far too large."""
    N, steps = 512, 30 if INTERPRET else 2_000
    g = torch.randn(steps, N, generator=torch.Generator().manual_seed(0))
    g[steps // 5 :, ::2] *= 0.03
    _, state = train(weights(N), g)
    v = torch.zeros(N, dtype=torch.float64)
    for x in g.double():
        v = 0.999 * v + 0.001 * x.square()
    ratio = (decode_state(state)[1].double() / v)[::2]
    # 2 % more: the spread of a root is a bias of its square
    assert (ratio.mean() - 1).abs() < 5 * ratio.std() / len(ratio) ** 0.5 + 0.02


@pytest.mark.parametrize("size", [1e-30, 1e4])
def test_tiny_and_huge_gradients_neither_underflow_nor_overflow(size):
    """An Adam step does not depend on the gradient's size, down to eps; below it is size / eps."""
    g = size * torch.randn(3, 2_001, generator=torch.Generator().manual_seed(0))
    p, state = train(weights(2_001), g, eps=1e-8)
    truth, m, v = weights(2_001).double(), *torch.zeros(2, 2_001, dtype=torch.float64)
    for step, x in enumerate(g.double(), 1):
        truth, m, v = adamw_reference(truth, x, m, v, step=step, lr=1e-3)
    assert all(x.isfinite().all() for x in (p, *state.values()))
    assert (state["m_codes"] != 0).float().mean() > 0.99
    moved, expected = (p - weights(2_001)).double(), truth - weights(2_001)
    assert (moved - expected).norm() <= 0.05 * expected.norm() or expected.abs().max() < 1e-20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy in the interpreter warns about inf / inf
def test_a_gradient_that_is_not_finite_turns_its_weight_nan_at_once_and_its_block_next(bad, kind):
    g = gradients(700, 2)
    g[0, 300] = bad
    start, state = fresh(700, kind)
    p, state = train(start, g[:1], state=state)
    assert p.isnan().nonzero().tolist() == [[300]]
    p, state = train(p, g[1:], state=state, first_step=2)
    assert p[256:512].isnan().all() and p[:256].isfinite().all() and p[512:].isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_nan_of_all_ones_does_not_round_to_a_finite_number():
    """GPUs write NaN as 0x7fffffff, and it survives arithmetic: random bits added to it would give -0."""
    g = torch.full((256,), 2**31 - 1, dtype=torch.int32).view(torch.float32)
    for kind in ("bf16", "exact"):
        start, state = fresh(256, kind)
        p, state = train(start, [g], state=state)
        assert p.isnan().all()
    assert (state["rest"] == 0).all()


def trained(update, *, steps=200, seed=0):
    """Return 20 x 77 weights after `steps` batches of least squares, with gradients over four decades."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** (-4 * torch.rand(77, generator=generator))
    goal = torch.randn(20, 77, generator=generator)
    p = torch.zeros(20, 77)
    for step in range(1, steps + 1):
        x = torch.randn(16, 77, generator=generator) * scales
        g = (x @ (p - goal).T + 0.1 * torch.randn(16, 20, generator=generator)).T @ x / 16
        update(p, g, step)
    return p


@pytest.mark.skipif(INTERPRET, reason="the kernel's bits are the torch path's")
def test_after_200_steps_we_are_no_further_from_fp32_adamw_than_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def ours(seed):
        state = init_state(torch.empty(20, 77))
        return lambda p, g, step: adamw8bit_(p, g, state, step=step, lr=1e-2, seed=seed)

    def torchs(make):
        made = {}

        def update(p, g, step):
            if not made:
                made["p"] = torch.nn.Parameter(p)
                made["optimizer"] = make([made["p"]])
            made["p"].grad = g
            made["optimizer"].step()

        return update

    options = {"lr": 1e-2, "weight_decay": 0.0}
    errors = {"ours": 0.0, "bitsandbytes": 0.0}
    for seed in range(3):
        truth = trained(torchs(lambda p: torch.optim.AdamW(p, **options)), seed=seed)
        theirs = trained(
            torchs(lambda p: bitsandbytes.optim.AdamW8bit(p, min_8bit_size=1, **options)), seed=seed
        )
        assert truth.abs().max() > 0.5  # the loss falls
        errors["ours"] += (trained(ours(seed), seed=seed) - truth).norm().item()
        errors["bitsandbytes"] += (theirs - truth).norm().item()
    print(errors)
    assert errors["ours"] <= errors["bitsandbytes"], errors


def test_any_shape_and_a_gradient_that_is_not_contiguous():
    g = gradients(35, 1)[0]
    flat = train(weights(35), [g])
    for shape in ((5, 7), (7, 1, 5), (35,)):
        p, state = train(weights(35).view(shape), [g.view(shape)])
        assert_same_bits((p.view(-1), state), flat)
    p, state = train(weights(35).view(5, 7), [g.view(5, 7).T.contiguous().T])
    assert_same_bits((p.view(-1), state), flat)
    assert train(weights(35), [torch.ones(1).expand(35)])[0].equal(train(weights(35), [torch.ones(35)])[0])
    p, state = train(torch.empty(0, 3), [torch.empty(0, 3)])
    assert p.shape == (0, 3) and len(state["m_scales"]) == 0


def test_fake_tensors_and_the_operator():
    with FakeTensorMode():
        p = torch.empty(300, 7, dtype=torch.bfloat16, requires_grad=True)
        for exact in (False, True):
            adamw8bit_(p, torch.empty(300, 7), init_state(p, exact=exact), step=1, lr=1e-3, seed=0)
    for kind in KINDS:
        p, state = fresh(300, kind)
        states = [state.get(name) for name in (*ka.STATES, "rest")]
        numbers = (0, 5, 1.0, 0.9, 0.1, 0.999, 0.001, 1.0, 1e-8, 1e-3, 1.0)
        torch.library.opcheck(
            ka._update_,
            (p, gradients(300, 1)[0], *states, *numbers),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_arguments_that_do_not_fit_are_refused_with_both_values():
    p, g = weights(300), gradients(300, 1)[0]
    state = init_state(p)

    def call(p=p, g=g, state=state, **options):
        adamw8bit_(p, g, state, **{"step": 1, "lr": 1e-3, "seed": 0} | options)

    for match, arguments in {
        "float16": {"p": p.half()},
        r"strides \(1, 20\) for shape \(20, 15\).*contiguous\(\)": {
            "p": p.view(15, 20).T,
            "g": g.view(20, 15),
        },
        r"\(299,\) but parameter \(300,\)": {"g": g[1:]},
        "gradient is torch.float64": {"g": g.double()},
        "m_codes'] is missing": {"state": {}},
        r"m_scales'\] is torch.float32 \(3,\).*\(2,\)": {"state": state | {"m_scales": torch.zeros(3)}},
        "state has a rest but parameter is torch.float32": {"state": init_state(p, exact=True)},
        r"rest'\] is torch.int16 \(299,\)": {
            "p": p.bfloat16(),
            "state": state | {"rest": torch.zeros(299, dtype=torch.int16)},
        },
        "v_codes'] is torch.int8": {"state": state | {"v_codes": state["m_codes"]}},
        "is on meta but parameter on cpu": {"state": state | {"v_scales": torch.zeros(2, device="meta")}},
        "gradient is on meta": {"g": g.to("meta")},
        "first_element is 100 but 256": {"first_element": 100},
        "step is 0": {"step": 0},
        "betas": {"betas": (0.9, 1.0)},
        "eps is 0": {"eps": 0.0},
    }.items():
        with pytest.raises(ValueError, match=match):
            call(**arguments)
    for first, count in ((100, 200), (0, 100), (256, 100)):
        with pytest.raises(ValueError, match="256"):
            state_slice(state, first, count)


@pytest.mark.interpreter
@pytest.mark.parametrize("first_element", [2**31 - 256, 2**32, 2**41])
def test_elements_past_2_to_the_31_do_not_overflow(monkeypatch, first_element):
    import triton.runtime.interpreter as interpreter

    monkeypatch.setattr(
        interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True)
    )
    p, state = weights(700, torch.bfloat16), init_state(weights(700))
    q, other = p.clone(), init_state(p)
    g = gradients(700, 1)[0]
    adamw8bit_(p, g, state, step=1, lr=1e-3, seed=0, first_element=first_element)
    monkeypatch.setattr(ka, "uses_triton", lambda tensor: False)
    adamw8bit_(q, g, other, step=1, lr=1e-3, seed=0, first_element=first_element)
    assert_same_bits((p, state), (q, other))


@pytest.mark.interpreter
def test_the_offset_of_the_last_program_of_a_large_parameter_does_not_overflow(monkeypatch):
    """Program 2^31 / 256 / BLOCKS writes element 2^31 + ... and touches one page of its address space."""
    import mmap

    import triton.runtime.interpreter as interpreter

    FAR = 2**31 // (ka.BLOCK * ka.BLOCKS)
    get = interpreter.interpreter_builder.create_get_program_id

    def create_get_program_id(axis):
        handle = get(axis)
        handle.data = handle.data + handle.data.dtype.type(FAR)
        return handle

    monkeypatch.setattr(
        interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True)
    )
    monkeypatch.setattr(interpreter.interpreter_builder, "create_get_program_id", create_get_program_id)
    N = 2**31 + 60

    def far(dtype, count=N):
        size = torch.empty(0, dtype=dtype).element_size()
        # 0x4000 is MAP_NORESERVE: nothing is committed
        space = mmap.mmap(-1, size * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
        return torch.frombuffer(space, dtype=dtype)

    p, g, m, v = far(torch.int16), far(torch.int16), far(torch.int8), far(torch.uint8)
    m_scales, v_scales = far(torch.float32, 2**23 + 1), far(torch.float32, 2**23 + 1)
    rest = far(torch.int16)
    g[-60:] = torch.ones(60, dtype=torch.bfloat16).view(torch.int16)
    rest[-60:] = 1  # of a weight of 0: 1e-45, which the update drowns
    numbers = (0, 5, 1.0, 0.9, 0.1, 0.999, 0.001, 1.0, 1e-8, 1.0, 1.0)
    ka._update_kernel[(1,)](
        p, g, m, m_scales, v, v_scales, rest, N, *numbers, ka.BLOCK, ka.BLOCKS, ka.M_LEVELS, ka.V_LEVELS
    )
    assert (m[-60:] == 127).all() and (v[-60:] == 255).all() and m_scales[-1] == torch.tensor(0.1)
    torch.testing.assert_close(
        exact_weight(p[-60:].view(torch.bfloat16), rest[-60:]), torch.full((60,), -(0.1 / 0.001**0.5))
    )


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is the child")
def test_the_triton_kernel_passes_this_file_in_the_interpreter(record_property):
    pass_in_the_interpreter(__file__, record_property, "-W", "error::RuntimeWarning")
