import weakref

import pytest
import torch

from kit.train.saved_tensors import catch_gradient, recomputed


def graph(x, weight, calls, gradients):
    """Use x three times, two of them as views; a copy of its content stands in for recomputing it."""
    content = x.clone()
    with recomputed(x, lambda: calls.append(1) or content.clone()):
        return sum_of_uses(catch_gradient(x, gradients), weight)


def sum_of_uses(x, weight):
    return (x @ weight + x.view(-1, 5) @ weight.square() + x[:, :3] @ weight[:3]).sum()


def test_a_tensor_that_is_freed_gives_the_gradients_it_would_have_given():
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    leaf = x.clone().requires_grad_()
    sum_of_uses(leaf, weight).backward()
    expected, weight.grad = weight.grad, None
    calls, gradients = [], []
    loss = graph(x, weight, calls, gradients)
    storage = weakref.ref(x.untyped_storage())
    del x
    assert storage() is None and not calls
    loss.backward()
    assert torch.equal(weight.grad, expected) and torch.equal(gradients[0], leaf.grad)
    assert calls == [1] and len(gradients) == 1  # computed once for three uses


def test_what_was_kept_and_then_changed_is_refused_as_autograd_would():
    x, other = torch.randn(4, 4), torch.randn(4, 4, requires_grad=True)
    with recomputed(x, x.clone):
        kept = other * 2
        out = (kept * kept).sum() + (x * other).sum()
    with torch.no_grad():
        kept.add_(1)
    message = r"a tensor of shape \(4, 4\) that the backward pass needs was changed in place"
    with pytest.raises(RuntimeError, match=message):
        out.backward()


def test_an_output_that_its_own_node_saves_is_freed_with_the_graph():
    x, leaf = torch.randn(3), torch.randn(1000, requires_grad=True)
    with recomputed(x, x.clone):
        out = leaf.exp()  # saves its own result
    storage = weakref.ref(out.untyped_storage())
    del out
    assert storage() is None
