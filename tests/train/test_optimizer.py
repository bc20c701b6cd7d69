import math

import pytest
import torch

from kit.memory.live_bytes import LiveBytes
from kit.train.optimizer import (
    AdamW8bit,
    Slabs,
    cosine_with_warmup,
    make_optimizer,
)


def test_the_schedule_warms_up_in_a_line_and_falls_along_half_a_cosine():
    factors = [cosine_with_warmup(step, 100, 0.05) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == 1.0
    assert factors[52] == pytest.approx(0.5 * (1 + math.cos(math.pi * 47 / 95)))
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert 0 < factors[-1] < 0.001
    assert cosine_with_warmup(0, 1, 0.0) == 1.0
    assert cosine_with_warmup(0, 1, 0.05) == 1.0


def adamw_float64(weight, gradients, *, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0):
    """Compute Algorithm 2 of Loshchilov & Hutter in float64."""
    w, m, v = weight.double(), 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        g = g.double()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        w = w - lr * (m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps) + weight_decay * w)
    return w


def test_bf16_steps_follow_adamw_in_float64_on_average():
    """An update is a tenth of the distance between two bf16 numbers: rounding to nearest would drop it."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter((torch.randn(50_000) * 0.02).bfloat16())
    start = weight.detach().clone()
    # the same in every step, which 8-bit states follow to 1 %
    gradient = (torch.randn(50_000) * 0.2 + 1).bfloat16()
    optimizer = AdamW8bit([weight], lr=1e-5, weight_decay=0.1)

    for _ in range(20):
        weight.grad = gradient
        optimizer.step()

    truth = adamw_float64(start, [gradient] * 20, lr=1e-5, weight_decay=0.1)
    moved = (truth - start.double()).mean()
    error = weight.detach().double() - truth
    standard_error = error.std() / math.sqrt(len(weight))
    assert abs(error.mean()) < 5 * standard_error + abs(moved) / 100
    assert abs(moved) > 20 * standard_error  # the test can see the move it checks


def test_the_optimizer_follows_the_dtype_and_refuses_a_mixture():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    assert isinstance(make_optimizer(model, lr=1.0), torch.optim.AdamW)
    model[0].bfloat16()
    with pytest.raises(ValueError, match=r"torch.bfloat16', 'torch.float32"):
        make_optimizer(model, lr=1.0)
    assert isinstance(make_optimizer(model.bfloat16(), lr=1.0), AdamW8bit)
    with pytest.raises(ValueError, match=r"optimizer is adamw but the weights are bfloat16.*pass adamw8bit"):
        make_optimizer(model, lr=1.0, name="adamw")
    assert isinstance(make_optimizer(model.float(), lr=1.0, name="adamw8bit"), AdamW8bit)
    with pytest.raises(ValueError, match="optimizer is 'lion'; pass one of auto, adamw, adamw8bit"):
        make_optimizer(model, lr=1.0, name="lion")
    with pytest.raises(ValueError, match="offload_optimizer is on but optimizer is adamw"):
        make_optimizer(model, lr=1.0, name="adamw", offload=True)
    with pytest.raises(ValueError, match="none"):
        make_optimizer(model.requires_grad_(False), lr=1.0)


def updated(dtype, *, exact=False, offload=False, steps=3, order=(0, 1), by_slices=False, together=False):
    """Return two parameters after a few 8-bit steps, and their optimizer."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter((torch.randn(n) * 0.02).to(dtype)) for n in (700, 256 * 5 + 3)]
    optimizer = AdamW8bit(parameters, lr=1e-3, weight_decay=0.1, seed=5, offload=offload, exact=exact)
    optimizer.SLAB = 512
    for step in range(steps):
        gradients = [
            torch.randn(len(p), generator=torch.Generator().manual_seed(step)).to(dtype) for p in parameters
        ]
        for i in order:
            parameters[i].grad = gradients[i]
            if together:
                continue
            if by_slices:
                for first in range(0, len(parameters[i]), 256):
                    optimizer.update(parameters[i], gradients[i][first : first + 256], first=first)
            else:
                optimizer.update(parameters[i])
        if together:
            optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize(
    ("dtype", "exact"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize(
    "options",
    [{"offload": True}, {"order": (1, 0)}, {"by_slices": True}, {"offload": True, "by_slices": True},
     {"together": True}, {"offload": True, "together": True}],
)  # fmt: skip
def test_neither_the_place_of_the_states_nor_the_pieces_of_an_update_change_a_bit(dtype, exact, options):
    parameters, optimizer = updated(dtype, exact=exact)
    others, other_optimizer = updated(dtype, exact=exact, **options)
    for p, q in zip(parameters, others, strict=True):
        assert torch.equal(p, q)
        assert ("rest" in optimizer.state[p]) == exact
        for name, tensor in optimizer.state[p].items():
            assert torch.equal(tensor, other_optimizer.state[q][name]), name
    assert [int(optimizer.state[p]["step"]) for p in parameters] == [3, 3]


@pytest.mark.parametrize("optimizer", ["auto", "adamw8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exact_weights_keep_a_rest_of_bf16_weights_alone(optimizer, dtype):
    model = torch.nn.Linear(3, 3).to(dtype)
    made = make_optimizer(model, lr=1.0, name=optimizer, exact_weights=True)
    assert any("rest" in state for state in made.state.values()) == (dtype == torch.bfloat16)


def test_offloaded_states_are_made_in_cpu_memory_and_nothing_else_is_for_them():
    """Made on a card first, an embedding's would not fit where the step itself does."""
    parameter = torch.nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    with LiveBytes() as held:
        optimizer = AdamW8bit([parameter], offload=True, exact=True)
    assert held.peak == held.now > 4 * len(parameter)
    assert not any(state.any() for state in optimizer.state[parameter].values())


def test_the_states_of_the_next_piece_are_copied_before_this_one_is_updated_and_only_to_an_empty_slab():
    calls = []

    class Recorded(Slabs):
        def fetch(self, on_host):
            found = super().fetch(on_host)
            calls.append(("in", self.turn))
            return found

        def write_back(self, on_host, on_card):
            places = [slab["m_codes"].data_ptr() for slab in self.slabs]
            calls.append(("out", places.index(on_card["m_codes"].data_ptr())))
            super().write_back(on_host, on_card)

    parameters = [torch.nn.Parameter(torch.randn(n)) for n in (1_000, 3, 700)]
    optimizer = AdamW8bit(parameters, lr=1e-3, offload=True)
    optimizer.SLAB, optimizer.slabs = 512, Recorded(512, torch.device("cpu"))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert calls[:4] == [("in", 1), ("in", 0), ("out", 1), ("in", 1)]
    full = set()
    for way, slab in calls:
        assert (slab in full) == (way == "out")
        full ^= {slab}
    assert not full and len(calls) == 2 * (2 + 1 + 2)


def test_8_bit_steps_use_other_random_bits_for_another_seed_and_another_parameter():
    def run(seed):
        parameters = [torch.nn.Parameter(torch.full((4096,), 0.02).bfloat16()) for _ in range(2)]
        optimizer = AdamW8bit(parameters, lr=1e-5, seed=seed)
        for p in parameters:
            p.grad = torch.ones_like(p)
            optimizer.update(p)
        return parameters

    first = run(0)
    assert all(torch.equal(a, b) for a, b in zip(first, run(0), strict=True))
    assert not torch.equal(first[0], run(1)[0])
    assert not torch.equal(first[0], first[1])


def test_8_bit_steps_follow_adamw_in_float64():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4096) * 0.02)
    start, gradients = weight.detach().clone(), [torch.randn(4096) + 0.5 for _ in range(20)]
    optimizer = AdamW8bit([weight], lr=1e-3, weight_decay=0.1)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    moved, truth = (
        x - start.double()
        for x in (weight.detach().double(), adamw_float64(start, gradients, lr=1e-3, weight_decay=0.1))
    )
    cosine = (moved @ truth / moved.norm() / truth.norm()).item()
    assert cosine > 0.99 and moved.norm() / truth.norm() == pytest.approx(1, abs=0.05)
