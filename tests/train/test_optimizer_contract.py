"""What torch promises of its own AdamW holds for AdamW8bit: every case runs on both."""

import copy
import math

import pytest
import torch

from kit.train.optimizer import AdamW8bit

SIZES = (700, 256 * 5 + 3)


class SmallSlabs(AdamW8bit):
    SLAB = 512  # several slabs per parameter


KINDS = {
    "torch": (torch.optim.AdamW, torch.float32, {}),
    "fp32": (SmallSlabs, torch.float32, {}),
    "bf16": (SmallSlabs, torch.bfloat16, {}),
    "exact": (SmallSlabs, torch.bfloat16, {"exact": True}),
    "offloaded": (SmallSlabs, torch.bfloat16, {"exact": True, "offload": True}),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def parameters_of(kind, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).to(KINDS[kind][1])) for n in sizes]


def make(kind, params, **settings):
    optimizer, _, options = KINDS[kind]
    return optimizer(params, **options | settings)


def step(optimizer, parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


def moved(parameters, before):
    return [not torch.equal(p, q) for p, q in zip(parameters, before, strict=True)]


def copies(parameters):
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def overwrite(parameters, others):
    for p, q in zip(parameters, others, strict=True):
        p.copy_(q)


def assert_equal(optimizer, parameters, other, other_parameters):
    """Compare parameters and states, to the bit and in dtype."""
    for p, q in zip(parameters, other_parameters, strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == other.state[q].keys()
        for name, x in optimizer.state[p].items():
            y = other.state[q][name]
            assert x.dtype == y.dtype and torch.equal(x, y), name


def test_defaults_are_those_of_torchs_adamw():
    ours, torchs = (make(kind, parameters_of(kind)).param_groups[0] for kind in ("fp32", "torch"))
    for name in ("lr", "betas", "eps", "weight_decay"):
        assert ours[name] == torchs[name]


def test_a_group_that_is_added_after_steps_is_updated_with_its_own_settings(kind):
    first, second = parameters_of(kind, (300, 5_000))  # the second needs longer slabs
    optimizer = make(kind, [first], lr=1e-2)
    step(optimizer, [first])
    optimizer.add_param_group({"params": second, "lr": 0.5, "weight_decay": 0.0})
    before = copies([first, second])
    step(optimizer, [first, second], seed=1)
    changes = [(p - q).float().abs().mean().item() for p, q in zip((first, second), before, strict=True)]
    assert changes[1] == pytest.approx(0.5, rel=0.1) and changes[0] < 0.05
    assert [int(optimizer.state[p]["step"]) for p in (first, second)] == [2, 1]


def test_a_group_that_is_added_before_the_first_step_is_as_one_that_was_there_from_the_start(kind):
    parameters, others = parameters_of(kind), parameters_of(kind)
    optimizer = make(kind, [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.1}])
    other = make(kind, others[:1])
    other.add_param_group({"params": others[1:], "lr": 0.1})
    for seed in range(2):
        step(optimizer, parameters, seed)
        step(other, others, seed)
    assert_equal(optimizer, parameters, other, others)


def test_groups_may_be_empty_and_their_parameters_may_have_names(kind):
    parameters = parameters_of(kind)
    optimizer = make(kind, [{"params": []}, {"params": parameters}])
    before = copies(parameters)
    step(optimizer, parameters)
    assert moved(parameters, before) == [True, True]
    assert make(kind, [("w", parameters[0])]).param_groups[0]["param_names"] == ["w"]


def test_parameters_without_a_gradient_keep_their_values_and_their_step(kind):
    parameters = parameters_of(kind)
    optimizer = make(kind, parameters)
    before = copies(parameters)
    step(optimizer, parameters[:1])
    assert moved(parameters, before) == [True, False]
    assert int(optimizer.state[parameters[1]].get("step", 0)) == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_every_group(kind, set_to_none):
    parameters = parameters_of(kind)
    optimizer = make(kind, [{"params": [parameter]} for parameter in parameters])
    step(optimizer, parameters)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in parameters)


def test_a_learning_rate_that_is_set_in_a_group_takes_effect_and_a_tensor_is_one_too(kind):
    parameters = parameters_of(kind)
    optimizer = make(kind, parameters, weight_decay=0.0)
    before = copies(parameters)
    optimizer.param_groups[0]["lr"] = 0.0
    step(optimizer, parameters)
    assert moved(parameters, before) == [False, False]
    optimizer.param_groups[0]["lr"] = torch.tensor(1.0)
    step(optimizer, parameters)
    assert all((p - q).float().abs().mean() > 0.5 for p, q in zip(parameters, before, strict=True))


def test_torchs_schedulers_set_every_groups_learning_rate(kind):
    parameters = parameters_of(kind)
    optimizer = make(kind, [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.2}], lr=0.1)
    schedulers = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, total_iters=2),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4),
    ]
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones=[2])
    rates = []
    for seed in range(6):
        rates.append([group["lr"] for group in optimizer.param_groups])
        before = copies(parameters)
        step(optimizer, parameters, seed)
        assert moved(parameters, before) == [True, True]
        scheduler.step()
    expected = [0.5, 0.75, *(0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(4))]
    assert rates == [pytest.approx([0.1 * factor, 0.2 * factor]) for factor in expected]

    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=4)  # betas, too
    before = copies(parameters)
    step(optimizer, parameters)
    cycle.step()
    assert moved(parameters, before) == [True, True]


def test_a_loaded_state_goes_on_to_the_bit_with_the_learning_rate_it_was_saved_with(kind):
    parameters, others = parameters_of(kind), parameters_of(kind)
    optimizer = make(kind, [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.3}])
    for seed in range(3):
        step(optimizer, parameters, seed)
    overwrite(others, parameters)
    other = make(kind, [{"params": others[:1], "lr": 0.7}, {"params": others[1:], "lr": 0.8}])
    step(other, others, seed=9)  # its own states and weights are replaced
    overwrite(others, parameters)

    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_equal(optimizer, parameters, other, others)
    assert [group["lr"] for group in other.param_groups] == [1e-3, 0.3]
    other.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.05  # read from the loaded groups
    for seed in range(3, 5):
        step(optimizer, parameters, seed)
        step(other, others, seed)
    assert_equal(optimizer, parameters, other, others)


def test_a_copy_of_model_and_optimizer_goes_on_to_the_bit_and_leaves_the_original_alone(kind):
    parameters = parameters_of(kind)
    optimizer = make(kind, parameters)
    step(optimizer, parameters)
    others, other = copy.deepcopy((parameters, optimizer))
    kept = copies(parameters)
    step(other, others, seed=1)
    assert moved(parameters, kept) == [False, False]
    step(optimizer, parameters, seed=1)
    assert_equal(optimizer, parameters, other, others)


def test_states_that_were_cleared_start_again(kind):
    parameters, others = parameters_of(kind), parameters_of(kind)
    optimizer, other = make(kind, parameters), make(kind, others)
    step(optimizer, parameters)
    optimizer.state.clear()
    overwrite(others, parameters)
    step(optimizer, parameters, seed=1)
    step(other, others, seed=1)
    assert_equal(optimizer, parameters, other, others)


def test_a_closure_computes_gradients_first_and_its_loss_is_returned(kind):
    parameters = parameters_of(kind)
    optimizer = make(kind, parameters)
    before = copies(parameters)

    def closure():
        optimizer.zero_grad()
        loss = sum(parameter.float().square().sum() for parameter in parameters)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(
        sum(q.float().square().sum().item() for q in before), rel=1e-5
    )
    assert moved(parameters, before) == [True, True]
    assert optimizer.step() is None


def test_hooks_run_around_a_step(kind):
    parameters, calls = parameters_of(kind), []
    optimizer = make(kind, parameters)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    step(optimizer, parameters)
    assert calls == ["before", "after"]


def test_the_default_dtype_changes_no_bit_and_steps_are_counted_beyond_256(kind):
    parameters, others = parameters_of(kind), parameters_of(kind)
    optimizer = make(kind, parameters)
    step(optimizer, parameters)
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = make(kind, others)
        for p, q in zip(parameters, others, strict=True):
            q.grad = p.grad
        other.step()
        assert_equal(optimizer, parameters, other, others)
        for q in others:
            other.state[q]["step"].fill_(255)
        for _ in range(3):
            other.step()
        assert [int(other.state[q]["step"]) for q in others] == [258, 258]
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1.0}, {"lr": math.nan}, {"betas": (-0.1, 0.9)}, {"betas": (0.9, 1.0)}, {"betas": (1.0, 0.9)},
     {"eps": -1.0}, {"weight_decay": -1.0}, {"weight_decay": math.nan}],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused_of_the_optimizer_and_ours_of_a_group(kind, wrong):
    (name, value), parameters = *wrong.items(), parameters_of(kind)
    with pytest.raises(ValueError, match=r"Invalid" if kind == "torch" else f"{name} is .* but must be "):
        make(kind, parameters, **wrong)
    if kind == "torch":
        return  # which takes any setting of a group
    optimizer = make(kind, parameters[:1])
    with pytest.raises(ValueError, match=f"{name} is .* but must be "):
        optimizer.add_param_group({"params": parameters[1:], name: value})
    assert len(optimizer.param_groups) == 1  # a refused group is not half there
    step(optimizer, parameters[:1])


def test_what_torch_refuses_of_parameters_is_refused(kind):
    parameters = parameters_of(kind)
    for wrong, error, words in (
        ([], ValueError, "empty parameter list"),
        (parameters[0], TypeError, "iterable"),
        ([1.0], TypeError, "only optimize Tensors"),
        ([parameters[0] * 2], ValueError, "non-leaf"),
        ([{"params": set(parameters)}], TypeError, "ordered"),
        ([{"params": parameters}, {"params": parameters[1]}], ValueError, "more than one parameter group"),
    ):
        with pytest.raises(error, match=words):
            make(kind, wrong)
    optimizer = make(kind, parameters[:1])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": parameters})
    with pytest.warns(UserWarning, match="duplicate parameters"):
        make(kind, [parameters[0], parameters[0]])


def test_a_sparse_gradient_is_refused(kind):
    parameters = parameters_of(kind)
    optimizer = make(kind, parameters)
    parameters[0].grad = torch.zeros_like(parameters[0]).to_sparse()
    with pytest.raises((RuntimeError, ValueError), match="sparse"):
        optimizer.step()


@pytest.mark.parametrize("other", ["one group less", "one parameter less"])
def test_a_state_of_other_groups_is_refused_and_changes_nothing(kind, other):
    parameters, others = parameters_of(kind), parameters_of(kind)
    groups = [{"params": [p], "lr": 0.2} for p in others]
    saved = make(kind, groups[:1] if other == "one group less" else [groups[0], {"params": []}]).state_dict()
    optimizer = make(kind, [{"params": [p]} for p in parameters])
    step(optimizer, parameters)
    kept = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"different number of parameter groups|doesn't match the size"):
        optimizer.load_state_dict(saved)
    found = optimizer.state_dict()
    assert found["param_groups"] == kept["param_groups"]
    for key, state in kept["state"].items():
        assert all(torch.equal(x, found["state"][key][name]) for name, x in state.items())


@pytest.mark.parametrize("saved", ["of other shapes", "of torch", "of inexact weights", "with codes in bf16"])
def test_a_state_that_does_not_fit_is_refused_with_both_and_changes_nothing(saved):
    parameters = parameters_of("exact")
    optimizer = make("exact", parameters)
    step(optimizer, parameters)
    kept, lr = copy.deepcopy(optimizer.state_dict()), optimizer.param_groups[0]["lr"]
    wrong_kind = {"of torch": "torch", "of inexact weights": "bf16"}.get(saved, "exact")
    others = parameters_of(wrong_kind, (700, 7) if saved == "of other shapes" else SIZES)
    other = make(wrong_kind, others, lr=0.5)
    step(other, others)
    wrong = other.state_dict()
    if saved == "with codes in bf16":
        wrong["state"][1]["m_codes"] = wrong["state"][1]["m_codes"].bfloat16()
    message = {
        "of other shapes": r"1\.m_codes is \(\d+,\) torch.int8 there and \(\d+,\) torch.int8 here",
        "of torch": r"it lacks 0\.\w+, .* and has 0\.exp_avg, 0\.exp_avg_sq, .* besides",
        "of inexact weights": r"it lacks 0\.rest, 1\.rest.* and has nothing besides",
        "with codes in bf16": r"1\.m_codes is \(\d+,\) torch.bfloat16 there and \(\d+,\) torch.int8 here",
    }[saved]
    with pytest.raises(ValueError, match=rf"state_dict .*{message}.*; load one of an AdamW8bit"):
        optimizer.load_state_dict(wrong)
    assert optimizer.param_groups[0]["lr"] == lr
    for key, state in kept["state"].items():
        for name, x in state.items():
            assert torch.equal(x, optimizer.state_dict()["state"][key][name]), name


@pytest.mark.parametrize(("first", "second"), [("exact", "offloaded"), ("offloaded", "exact")])
def test_a_state_may_move_to_an_optimizer_that_keeps_it_elsewhere(first, second):
    parameters, others = parameters_of(first), parameters_of(second)
    optimizer = make(first, parameters)
    step(optimizer, parameters)
    overwrite(others, parameters)
    other = make(second, others)
    other.load_state_dict(optimizer.state_dict())
    assert other.offload == (second == "offloaded")
    for seed in (1, 2):
        step(optimizer, parameters, seed)
        step(other, others, seed)
    assert_equal(optimizer, parameters, other, others)


def test_whoever_reads_offloaded_states_waits_for_the_copies_first():
    class Stream:
        waits = 0

        def synchronize(self):
            self.waits += 1

    parameters = parameters_of("offloaded")
    optimizer = make("offloaded", parameters)
    step(optimizer, parameters)
    stream = optimizer.slabs.stream = Stream()  # as if a card were here
    saved = optimizer.state_dict()
    assert stream.waits == 1
    copy.deepcopy(optimizer)
    assert stream.waits == 2
    optimizer.load_state_dict(saved)
    assert stream.waits == 3


def test_only_bf16_parameters_have_a_rest_to_keep():
    parameters = [*parameters_of("fp32", (300,)), *parameters_of("exact", (300,))]
    optimizer = AdamW8bit(parameters, exact=True, offload=True)
    step(optimizer, parameters)
    assert ["rest" in optimizer.state[p] for p in parameters] == [False, True]
