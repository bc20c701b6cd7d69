"""A step whose loss or gradient is not finite changes neither weights nor optimizer states."""

import pytest
import torch
from conftest import make_model, random_documents
from torch.utils._python_dispatch import TorchDispatchMode

from kit.models.families import family_of
from kit.models.layers import norm_of
from kit.packing import PackedBatch
from kit.train.savings import Savings
from kit.train.step import TrainingStep
from kit.train.weight_updates import NotFinite, all_finite

LENGTHS = [9, 4, 23, 12]
IN_BACKWARD = Savings(update_in_backward=True)
BLOCKED = Savings(update_in_backward=True, head_update="blocked")
AT_THE_END = {
    "adamw": Savings(),
    "8-bit states": Savings(optimizer="adamw8bit"),
    "gradients in CPU memory": Savings(offload_gradients=True),
    "all in CPU memory": Savings(offload_gradients=True, offload_optimizer=True),
    "in CPU memory, in blocks": Savings(offload_gradients=True, head_update="blocked"),
}
ALL = AT_THE_END | {"in the backward pass": IN_BACKWARD, "in blocks": BLOCKED}


def rows(count=1):
    return [PackedBatch.build(random_documents(LENGTHS, seed=seed)) for seed in range(count)]


class Case:
    """A model after one step, whose next step can be spoilt."""

    def __init__(self, savings, family="gemma3"):  # whose head is its embedding
        self.model, self.spoil = make_model(family), None
        norm_of(self.model.model.norm, family_of(self.model.config)).register_forward_pre_hook(self.hook)
        self.step = TrainingStep(self.model, savings, lr=1e-2)
        self.step(rows())

    def hook(self, module, args):
        return (self.spoil(args[0]),) if self.spoil else None

    def everything(self):
        states = [x.clone() for state in self.step.optimizer.state.values() for x in state.values()]
        return [p.detach().clone() for p in self.model.parameters()] + states

    def differs(self, before):
        after = self.everything()
        return [i for i, (x, y) in enumerate(zip(before, after, strict=True)) if not torch.equal(x, y)]


def spoil_loss(hidden):
    return hidden * float("nan")


def spoil_gradient(hidden):
    """Let the loss be finite, and the gradient overflow in the layers below."""
    hidden = hidden * 1.0
    hidden.register_hook(lambda gradient: gradient * float("inf"))
    return hidden


@pytest.mark.parametrize(
    ("name", "family"),
    [*((name, "gemma3") for name in ALL), ("adamw", "llama"), ("in the backward pass", "llama")],
)
def test_a_loss_that_is_not_finite_changes_nothing_and_the_next_step_is_as_if_it_had_not_been(name, family):
    case, other = Case(ALL[name], family), Case(ALL[name], family)
    before = case.everything()
    case.spoil = spoil_loss
    with pytest.raises(NotFinite, match="loss is nan"):
        case.step(rows())
    assert case.differs(before) == []
    case.spoil = None
    assert case.step(rows()) == other.step(rows())
    assert case.differs(before) and other.differs(case.everything()) == []


@pytest.mark.parametrize("name", AT_THE_END)
def test_a_gradient_that_is_not_finite_in_one_of_two_rows_changes_nothing(name):
    case, seen = Case(AT_THE_END[name]), []

    def second_row(hidden):
        seen.append(1)
        return spoil_gradient(hidden) if len(seen) == 2 else hidden

    before, case.spoil = case.everything(), second_row
    with pytest.raises(NotFinite, match=r"loss is \d.* and gradient norm (nan|inf)"):
        case.step(rows(2))
    assert case.differs(before) == []


@pytest.mark.parametrize("savings", [IN_BACKWARD, BLOCKED], ids=["whole", "blocked"])
def test_a_gradient_that_overflows_while_weights_are_updated_is_reported_too(savings):
    """The layers above are updated by then, so this step cannot be taken back: only a checkpoint helps."""
    case = Case(savings)
    case.spoil = spoil_gradient
    with pytest.raises(NotFinite, match=r"loss is \d.* and gradient norm (nan|inf)"):
        case.step(rows())


class Questions(TorchDispatchMode):
    """Count how often a card is asked whether values are finite, which it waits for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.kit.all_finite.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "times"), [*((name, 1) for name in AT_THE_END), ("in blocks", 2)])
def test_a_step_is_asked_once_whether_it_is_finite(name, times):
    """In the backward pass twice: for the loss, before it, and for the norm. Never per row or parameter."""
    case = Case(ALL[name])
    with Questions() as asked:
        case.step(rows(3 if name in AT_THE_END else 1))
    assert asked.count == times


def test_the_question_is_an_operator_that_a_simulated_step_can_ask():
    for values in (torch.ones(2), torch.tensor([1.0, float("nan")])):
        torch.library.opcheck(all_finite, (values,), test_utils=("test_schema",))
    assert all_finite(torch.tensor([1.0, 3e38])) and not all_finite(torch.tensor([1.0, -float("inf")]))
