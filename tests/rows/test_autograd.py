"""What the loss is as a node of a graph: upstream gradients, second passes, double backward."""

from __future__ import annotations

import oracle
import pytest
import torch
from oracle import Options
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

import xent


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits that require grad, and index targets of which the first is ignored."""
    torch.manual_seed(0)
    y = torch.randint(shape[-1], shape[:-1])
    y.view(-1)[0] = -100
    return torch.randn(shape).to(dtype).requires_grad_(), y


def test_forward_writes_nothing() -> None:
    """Well-known kernels write the gradient over the logits before anyone has asked for one."""
    x, y = batch(6, 5)
    before, version = x.detach().clone(), x._version
    for inplace in (False, True):
        xent.cross_entropy(x, y, inplace_backward=inplace)
        assert x.detach().equal(before)
        assert x._version == version


def test_second_backward_is_the_first_again() -> None:
    """Kernels that scale a stored gradient in place scale it twice."""
    x, y = batch(6, 5)
    loss = xent.cross_entropy(x, y) * 3
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert first.equal(second)
    loss.backward()
    loss = xent.cross_entropy(x, y)
    loss.backward()
    torch.testing.assert_close(x.grad, first * (1 + 1 / 3))


def test_each_row_has_its_own_upstream() -> None:
    x, y = batch(6, 5)
    upstream = torch.tensor([1.0, -2.0, 0.0, 4.0, 0.5, 3.0])
    loss = xent.cross_entropy(x, y, reduction="none")
    (grad,) = torch.autograd.grad(loss, x, upstream, retain_graph=True)
    (ones,) = torch.autograd.grad(loss, x, torch.tensor(1.0).expand(6))  # stride 0, as sum() delivers it
    torch.testing.assert_close(grad, ones * upstream[:, None])
    assert not grad[2].any()


def test_gradients_are_no_views() -> None:
    """Autograd adds the next gradient in place to a tensor that has its memory alone."""
    x, y = batch(2, 3, 5)
    for loss in (xent.cross_entropy(x, y), xent.token_stats(x, y).log_prob.sum()):
        assert torch.autograd.grad(loss, x)[0]._base is None


def test_no_gradient_asked_for() -> None:
    x, y = batch(6, 5)
    with torch.no_grad():
        assert not xent.cross_entropy(x, y).requires_grad
    assert not xent.cross_entropy(x.detach(), y).requires_grad
    with torch.inference_mode():
        assert xent.cross_entropy(x, y).item() == xent.cross_entropy(x.detach(), y).item()


def test_gradients_of_probabilities_alone() -> None:
    """Logits that need no gradient, as in distillation turned round."""
    x, _ = batch(6, 5, dtype=torch.float64)
    q = torch.rand(6, 5).double().requires_grad_()
    (grad,) = torch.autograd.grad(xent.cross_entropy(x.detach(), q), q)
    torch.testing.assert_close(grad, -x.detach().log_softmax(1) / 6)


def test_double_backward() -> None:
    """A penalty on the norm of the gradient, as in gradient-penalty training; detached silently elsewhere."""
    x, y = batch(6, 5, dtype=torch.float64)
    results = []
    for function in (xent.cross_entropy, oracle.cross_entropy):
        (grad,) = torch.autograd.grad(function(x, y), x, create_graph=True)
        assert grad.requires_grad
        results.append(torch.autograd.grad((grad**2).sum(), x)[0])
    torch.testing.assert_close(*results)


def test_forward_mode() -> None:
    """Not a tangent of 0 in silence."""
    x, y = batch(6, 5, dtype=torch.float64)
    tangent = torch.randn(6, 5).double()
    expected = (torch.autograd.grad(xent.cross_entropy(x, y), x)[0] * tangent).sum()
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(xent.cross_entropy(forward_ad.make_dual(x.detach(), tangent), y)).tangent
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "none"}], ids=str)
def test_class_weight_that_requires_grad(options: Options) -> None:
    """Taken where no gradient is recorded, as torch does; refused where that of indices would be dropped in silence."""
    x, y = batch(6, 5, dtype=torch.float64)
    weight, head = torch.rand(5).double().requires_grad_(), torch.eye(5).double()
    with torch.no_grad():
        expected = F.cross_entropy(x, y, weight, **options)
        torch.testing.assert_close(xent.cross_entropy(x, y, weight, **options), expected)
        torch.testing.assert_close(xent.linear_cross_entropy(x, head, y, weight=weight, **options), expected)
        module = xent.CrossEntropyLoss(weight, **options)
        torch.testing.assert_close(module(x, y), expected)
    refused = "weight: is not differentiated with class indices and may not require grad; detach it"
    for call in (
        lambda: xent.cross_entropy(x.detach(), y, weight, **options),
        lambda: xent.linear_cross_entropy(x.detach(), head, y, weight=weight, **options),
        lambda: module(x.detach(), y),
    ):
        with pytest.raises(RuntimeError, match=refused):
            call()
