"""What the loss is as a node of a graph: upstream gradients, second passes, double backward, backward in place."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from oracle import Options, every_dtype, loss_and_grad
from torch import Tensor
from torch.autograd import forward_ad

import xent

pytestmark = pytest.mark.usefixtures("backend")


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


# torch's own forward mode imports a part of torch.jit, which warns of itself.
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
def test_forward_mode_is_right_or_refused() -> None:
    """Never a tangent of 0 in silence."""
    x, y = batch(6, 5, dtype=torch.float64)
    tangent = torch.randn(6, 5).double()
    expected = (torch.autograd.grad(xent.cross_entropy(x, y), x)[0] * tangent).sum()
    refused = False
    with forward_ad.dual_level():
        try:
            found = forward_ad.unpack_dual(xent.cross_entropy(forward_ad.make_dual(x.detach(), tangent), y)).tangent
        except NotImplementedError:
            refused = True
    assert refused or torch.isclose(found, expected)


# Backward in place

IN_PLACE: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "(C)": lambda: (torch.randn(5), torch.tensor(2)),
    "(N, C)": lambda: (torch.randn(6, 5), torch.tensor([-100, 1, 2, 3, 4, 0])),
    "(B, T, V)": lambda: (torch.randn(2, 3, 5), torch.tensor([[-100, 1, 2], [3, 4, 0]])),
    "rows far apart": lambda: (torch.randn(6, 9)[:, :5], torch.tensor([-100, 1, 2, 3, 4, 0])),
    "transposed": lambda: (torch.randn(5, 6).t(), torch.tensor([-100, 1, 2, 3, 4, 0])),
    "probabilities": lambda: (torch.randn(6, 5), torch.rand(6, 5)),
}
every_in_place = pytest.mark.parametrize("make", IN_PLACE.values(), ids=IN_PLACE)


@every_dtype
@every_in_place
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"softcap": 3.0}], ids=str)
def test_inplace_backward(make: Callable[[], tuple[Tensor, Tensor]], options: Options, dtype: torch.dtype) -> None:
    """The gradient is that of the plain backward, to the bit, and lies where the logits were."""
    torch.manual_seed(0)
    x, target = make()
    x = x.to(dtype)
    target = target.to(dtype) if target.is_floating_point() else target
    expected = loss_and_grad(xent.cross_entropy, x.clone(), target, **options)
    loss, grad = loss_and_grad(xent.cross_entropy, x, target, inplace_backward=True, **options)
    assert loss.equal(expected[0])
    assert grad.equal(expected[1])
    assert grad.data_ptr() == x.data_ptr()
    assert x.equal(expected[1])


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torch.randn(2, 5, 3), id="(N, C, d1)"),
        pytest.param(lambda: torch.randn(2, 4, 5)[:, :-1], id="(B, T, V), cut in T"),
    ],
)
def test_inplace_backward_where_the_rows_are_no_view(make: Callable[[], Tensor]) -> None:
    """In place all the same, or an error that says so: not the gradient over a copy of the logits, in silence."""
    torch.manual_seed(0)
    x, y = make(), torch.tensor([[-100, 1, 2], [3, 4, 0]])
    expected = loss_and_grad(xent.cross_entropy, x.clone(), y)
    refused = ""
    try:
        loss_and_grad(xent.cross_entropy, x, y, inplace_backward=True)
    except (ValueError, RuntimeError) as refusal:
        refused = str(refusal)
    assert x.equal(expected[1]) or "inplace_backward" in refused


def test_inplace_backward_through_a_model() -> None:
    x, y = batch(6, 5)
    head = torch.nn.Linear(5, 4)
    y = y.clamp(max=3)
    grads = []
    for inplace in (False, True):
        loss = xent.cross_entropy(head(x), y, inplace_backward=inplace)
        grads.append(torch.autograd.grad(loss, [x, *head.parameters()]))
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))


def test_inplace_backward_beside_probabilities_that_learn() -> None:
    """Their gradient needs the logits, and is taken before these are overwritten."""
    x, _ = batch(6, 5)
    grads = []
    for inplace in (False, True):
        q = torch.linspace(0.1, 1, 30).view(6, 5).requires_grad_()
        loss = xent.cross_entropy(x.clone(), q, label_smoothing=0.1, inplace_backward=inplace)
        grads.append(torch.autograd.grad(loss, [x, q]))
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("twice", ["the loss", "an older user of the logits", "a newer user of the logits"])
def test_logits_are_gone_after_backward_in_place(twice: str) -> None:
    """A second use of them raises autograd's own error, as after any operation in place."""
    x, y = batch(6, 5)
    logits = x * 1
    square = (logits**2).sum()
    loss = xent.cross_entropy(logits, y, inplace_backward=True)
    if twice == "a newer user of the logits":
        square = (logits**2).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss if twice == "the loss" else square).backward()


def test_inplace_backward_cannot_be_differentiated_again() -> None:
    x, y = batch(6, 5)
    before = x.detach().clone()
    loss = xent.cross_entropy(x, y, inplace_backward=True)
    with pytest.raises(RuntimeError, match=r"inplace_backward=True: .* cannot be differentiated again"):
        torch.autograd.grad(loss, x, create_graph=True)
    assert x.detach().equal(before)


@pytest.mark.parametrize("shared", ["rows", "classes"])
@pytest.mark.parametrize("ignored", [-100, 0], ids=["some ignored", "all rows count"])
def test_inplace_backward_of_expanded_logits_raises(shared: str, ignored: int) -> None:
    """Several logits in one place have no room for several gradients."""
    x, y = batch(6, 5)
    y[0] = ignored
    before = x.detach().clone()
    view = x[:1] if shared == "rows" else x[:, :1]
    with pytest.raises(RuntimeError, match=r"(?i)inplace|single memory location"):
        xent.cross_entropy(view.expand(6, 5), y, inplace_backward=True).backward()
    assert x.detach().equal(before)
