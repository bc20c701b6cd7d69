import weakref

import pytest
import torch

from kit.train.saved_tensors import catch_gradient, recomputed


def graph(x, weight, calls, gradients):
    """Three uses of x, two of them views; x is made again by a copy of what it held."""
    content = x.clone()
    with recomputed(x, lambda: calls.append(1) or content.clone()):
        entering = catch_gradient(x, gradients)
        return (
            entering @ weight
            + entering.view(-1, weight.shape[0]) @ weight.square()
            + entering[:, :3] @ weight[:3]
        ).sum()


def test_a_tensor_that_is_let_go_gives_the_gradients_it_would_have_given():
    torch.manual_seed(0)
    x, weight = (
        torch.randn(7, 5, dtype=torch.float64),
        torch.randn(5, 4, dtype=torch.float64, requires_grad=True),
    )
    leaf = x.clone().requires_grad_()
    (leaf @ weight + leaf.view(-1, 5) @ weight.square() + leaf[:, :3] @ weight[:3]).sum().backward()
    expected, weight.grad = weight.grad, None
    calls, gradients = [], []
    loss = graph(x, weight, calls, gradients)
    storage = weakref.ref(x.untyped_storage())
    del x
    assert storage() is None and not calls
    loss.backward()
    assert torch.equal(weight.grad, expected) and torch.equal(gradients[0], leaf.grad)
    assert calls == [1] and len(gradients) == 1  # made once for three


def test_what_was_kept_and_then_changed_is_refused_as_autograd_would():
    x, other = torch.randn(4, 4), torch.randn(4, 4, requires_grad=True)
    with recomputed(x, x.clone):
        kept = other * 2
        out = (kept * kept).sum() + (x * other).sum()
    with torch.no_grad():
        kept.add_(1)
    with pytest.raises(
        RuntimeError, match=r"a tensor of shape \(4, 4\) that the backward pass needs was changed in place"
    ):
        out.backward()


def test_an_output_that_its_own_node_saves_is_freed_with_the_graph():
    x, leaf = torch.randn(3), torch.randn(1000, requires_grad=True)
    with recomputed(x, x.clone):
        out = leaf.exp()  # saves its own result
    storage = weakref.ref(out.untyped_storage())
    del out
    assert storage() is None
