import math

import pytest
import torch
from conftest import FAMILIES, make_model, random_documents
from torch.utils._python_dispatch import TorchDispatchMode

from kit.models.backbone import head_weight
from kit.packing import PackedBatch
from kit.train.savings import Savings
from kit.train.step import TrainingStep

LENGTHS = [9, 4, 23, 12]
LEAN = {
    "update_in_backward": True, "tile_tokens": 7, "offload_inputs": True, "logit_rows": 5,
    "offload_optimizer": True,
}  # fmt: skip


def tied(family, dtype=torch.float32):
    model = make_model(family, dtype)
    model.set_output_embeddings(model.get_output_embeddings())
    head = model.get_output_embeddings()
    head.weight = model.get_input_embeddings().weight
    return model


def trained(model, savings, steps=3, seed=0, **options):
    training_step = TrainingStep(model, savings, lr=1e-2, seed=seed, **options)
    history = []
    for step in range(steps):
        loss, norm = training_step([PackedBatch.build(random_documents(LENGTHS, seed=step))])
        history.append((loss.item(), norm.item()))
    training_step.close()
    return history


def assert_close_to(model, other, atol):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
def test_updating_inside_the_backward_pass_gives_the_bits_of_updating_after_it(family):
    """The order of updates changes nothing: all have the same lr, each parameter has its own random bits."""
    for dtype in (torch.float32, torch.bfloat16):
        model, other = make_model(family, dtype), make_model(family, dtype)
        history = trained(model, Savings(optimizer="adamw8bit"))
        assert [x for x, _ in trained(other, Savings(update_in_backward=True))] == [x for x, _ in history]
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_savings_together_train_the_same_model(family):
    model, other = tied(family), tied(family)
    history, lean = (
        trained(model, Savings(optimizer="adamw8bit")),
        trained(other, Savings(**LEAN, head_update="blocked")),
    )
    for (loss, norm), (lean_loss, lean_norm) in zip(history, lean, strict=True):
        assert lean_loss == pytest.approx(loss, rel=1e-4)
        assert lean_norm == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocked_head_updates_the_tied_embedding_as_autograd_would(family, monkeypatch):
    """Do one 8-bit step on gradients equal up to rounding; codes differ if a random threshold is close."""
    # 97 rows of 32 numbers: blocks of 256 numbers, twelve and a bit
    monkeypatch.setattr("kit.kernels.linear_cross_entropy_blocks.VOCABULARY_UNIT", 8)
    monkeypatch.setattr("kit.kernels.linear_cross_entropy_blocks.BLOCK_BYTES", 1)
    gradients = []
    for savings in (
        Savings(update_in_backward=True),
        Savings(update_in_backward=True, head_update="blocked"),
    ):
        model = tied(family)
        training_step = TrainingStep(model, savings, lr=1e-2)
        weight, seen = head_weight(model), torch.zeros_like(head_weight(model))

        def update(parameter, gradient=None, *, first=0, seen=seen, weight=weight):
            if parameter is weight:
                gradient = (parameter.grad if gradient is None else gradient).reshape(-1)
                seen.view(-1)[first : first + len(gradient)] += gradient

        monkeypatch.setattr(training_step.optimizer, "update", update)
        documents = random_documents(LENGTHS)
        # its row gets nothing from the lookup
        documents[0].ids[:3] = model.get_input_embeddings().padding_idx or 0
        _, norm = training_step([PackedBatch.build(documents)])
        gradients.append((seen, norm))
    (whole, norm), (blocked, blocked_norm) = gradients
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(blocked, whole, atol=1e-5 * whole.abs().max().item(), rtol=1e-4)
    torch.testing.assert_close(blocked_norm, norm)


def test_a_gradient_is_freed_after_its_layer():
    model = make_model("llama")
    alive = []
    training_step = TrainingStep(model, Savings(update_in_backward=True), lr=1e-2)
    update = training_step.optimizer.update

    def counted(parameter, *args, **options):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        update(parameter, *args, **options)

    training_step.optimizer.update = counted
    training_step([PackedBatch.build(random_documents(LENGTHS))])
    assert len(alive) == len(list(model.parameters())) and set(alive) == {1}
    assert all(p.grad is None for p in model.parameters())


def test_settings_that_exclude_one_another_are_refused_with_the_way_out():
    model = make_model("llama")
    rows = [PackedBatch.build(random_documents(LENGTHS))] * 2
    two_rows = r"2 rows but update_in_backward.*--batch_traces 1.*--no_update_in_backward"
    with pytest.raises(ValueError, match=two_rows):
        TrainingStep(model, Savings(update_in_backward=True), lr=1e-2)(rows)
    with pytest.raises(
        ValueError, match=r"head_update is blocked but offload_gradients .*--offload_gradients"
    ):
        Savings(head_update="blocked")
    with pytest.raises(ValueError, match="head_update is 'tiled' but must be whole or blocked"):
        Savings(head_update="tiled")
    with pytest.raises(ValueError, match="recompute is off"):
        Savings(recompute=False, tile_tokens=5)
    with pytest.raises(ValueError, match="optimizer is adamw, which updates all at once"):
        Savings(update_in_backward=True, optimizer="adamw")
    blocked = Savings(update_in_backward=True, head_update="blocked")
    with pytest.raises(ValueError, match="the head is not tied"):
        TrainingStep(make_model("llama"), blocked, lr=1e-2)
    for norm in (-1.0, math.nan):
        with pytest.raises(ValueError, match=r"max_grad_norm is (-1\.0|nan) but must be >= 0"):
            TrainingStep(model, Savings(), lr=1e-2, max_grad_norm=norm)
    clipped = "max_grad_norm is 1 but update_in_backward .*--max_grad_norm 0, or --no_update"
    with pytest.raises(ValueError, match=clipped):
        TrainingStep(make_model("llama"), Savings(update_in_backward=True), lr=1e-2, max_grad_norm=1.0)
    eight_traces = r"batch_traces is 8 but update_in_backward.*--batch_traces 1.*--no_update_in_backward"
    with pytest.raises(ValueError, match=eight_traces):
        Savings(update_in_backward=True).check_rows(8)
    Savings(update_in_backward=True).check_rows(1)
    Savings().check_rows(8)


class Products(TorchDispatchMode):
    """Count the tensors that are multiplied in place."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.count += len(args[0]) if name == "aten::_foreach_mul_" else name == "aten::mul_"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("offloaded", [False, True])
def test_gradients_are_multiplied_only_to_clip_them(offloaded):
    model, counts = make_model("llama"), []
    for max_grad_norm in (0.0, 0.1):
        step = TrainingStep(model, Savings(offload_gradients=offloaded), lr=0.0, max_grad_norm=max_grad_norm)
        with Products() as products:
            step([PackedBatch.build(random_documents(LENGTHS))])
        step.close()
        counts.append(products.count)
    assert counts[1] - counts[0] == len(list(model.parameters()))


def test_closing_removes_every_hook():
    model = make_model("gemma3")
    training_step = TrainingStep(model, Savings(**LEAN), lr=1e-2)
    training_step.close()
    before = [p.detach().clone() for p in model.parameters()]
    sum(p.square().sum() for p in model.parameters()).backward()
    assert all(
        torch.equal(p, q) and p.grad is not None for p, q in zip(model.parameters(), before, strict=True)
    )
    assert not model.training
