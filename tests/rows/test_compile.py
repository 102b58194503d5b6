"""torch.compile, export, the operators behind them, and tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics
from torch._subclasses import FakeTensorMode

import xent

# The compiler warns of its own use of torch.jit and of its own configuration.
pytestmark = [
    pytest.mark.usefixtures("untraced"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def untraced() -> Iterator[None]:
    """The compiler sees xent as users have it, without the run-time type checks, and nothing of an earlier test."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


W = torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5])


def sum_of_stats(x: Tensor, y: Tensor) -> Tensor:
    stats = xent.token_stats(x, y, entropy=True, prediction=True)
    return stats.log_prob.sum() + stats.lse.square().sum() + stats.entropy.sum()


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda x, y: xent.cross_entropy(x, y),
    "none": lambda x, y: xent.cross_entropy(x, y, reduction="none").square().sum(),
    "everything": lambda x, y: xent.cross_entropy(
        x, y, W, label_smoothing=0.1, z_loss=0.1, softcap=2.0, logit_scale=0.5, on_empty="zero"
    ),
    "probabilities": lambda x, y: xent.cross_entropy(x, (2 * x.detach()).softmax(1), label_smoothing=0.1),
    "token_stats": sum_of_stats,
    "module": xent.CrossEntropyLoss(z_loss=0.1),
    "in place": lambda x, y: xent.cross_entropy(2 * x, y, inplace_backward=True),
}


def batch(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(n)
    y = torch.randint(5, (n,))
    y[0] = -100
    return torch.randn(n, 5, dtype=dtype, requires_grad=True), y


# By itself, dynamic=None compiles for a shape and then for all: what True and False do besides is seen on two of them.
COMPILED = [(name, None) for name in FUNCTIONS] + [("plain", True), ("everything", True), ("plain", False)]


@pytest.mark.parametrize(("name", "dynamic"), COMPILED)
def test_one_graph_forward_and_backward(name: str, dynamic: bool | None) -> None:
    """No graph break; and with dynamic shapes nothing is compiled again when only N changes."""
    function = FUNCTIONS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    compilations = []
    for n in (6, 9, 12):
        x, y = batch(n)
        found, expected = compiled(x, y), function(x, y)
        compilations.append(counter.frame_count)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (found, expected)))
    first, second, third = compilations
    assert third == second or dynamic is False
    assert second == first or not dynamic


HEAD = xent.LinearCrossEntropyLoss(5, 5, bias=False)


def head_loss(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    return xent.linear_cross_entropy(x, HEAD.linear.weight, y, **options)


DEFAULTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda x, y: xent.cross_entropy(x, y),
    "token_stats": lambda x, y: xent.token_stats(x, y).lse,
    "CrossEntropyLoss": xent.CrossEntropyLoss(),
    "linear_cross_entropy": head_loss,
    "linear_token_stats": lambda x, y: xent.linear_token_stats(x, HEAD.linear.weight, y).lse,
    "LinearCrossEntropyLoss": HEAD,
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_dynamic_shapes_are_traced_once(name: str) -> None:
    """No default is made a symbol, found to be a constant after all, and the whole function traced again."""
    clear_compilation_metrics()
    torch.compile(DEFAULTS[name], fullgraph=True, dynamic=True, backend="aot_eager")(*batch(6))
    assert [metrics.restart_reasons for metrics in get_compilation_metrics()] == [set()]


# Losses of (x, y) with one more number, which changes from step to step.
SCHEDULES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "label_smoothing": lambda x, y, n: xent.cross_entropy(x, y, label_smoothing=n),
    "z_loss": lambda x, y, n: xent.cross_entropy(x, y, z_loss=n),
    "normalizer": lambda x, y, n: xent.cross_entropy(x, y, normalizer=n),
    "head, label_smoothing": lambda x, y, n: head_loss(x, y, label_smoothing=n, reduction="none").mean(),
    "head, z_loss": lambda x, y, n: head_loss(x, y, z_loss=n, reduction="none").mean(),
    "head, normalizer": lambda x, y, n: head_loss(x, y, normalizer=n),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_option_that_changes_is_compiled_twice(name: str) -> None:
    """For its first value, and for all others."""
    loss, counter = SCHEDULES[name], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for n in (0.1, 0.2, 0.3, 0.4):
        x, y = batch(6)
        found, expected = compiled(x, y, n), loss(x, y, n)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (found, expected)))
    assert counter.frame_count == 2


def test_inductor_trains_a_model() -> None:
    """Whole steps through the default compiler, against the same steps as they are."""

    def losses(compile: bool) -> list[float]:
        torch.manual_seed(0)
        model, loss = nn.Linear(4, 5), xent.CrossEntropyLoss(label_smoothing=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def forward(x: Tensor, y: Tensor) -> Tensor:
            return loss(model(x), y)

        run = torch.compile(forward, fullgraph=True) if compile else forward
        values = []
        for _ in range(3):
            _, y = batch(6)
            value = run(torch.arange(24.0).view(6, 4) / 24, y)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
        return values

    assert losses(compile=True) == pytest.approx(losses(compile=False), abs=1e-6)


class Model(nn.Module):
    """A model that ends in its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.loss = nn.Linear(4, 5), xent.CrossEntropyLoss()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.head(x), y)


def test_export() -> None:
    model, rows = Model(), torch.export.Dim("rows", min=2)
    x, (_, y) = torch.randn(6, 4), batch(6)
    program = torch.export.export(model, (x, y), dynamic_shapes=({0: rows}, {0: rows}))
    for n in (6, 9):
        x, (_, y) = torch.randn(n, 4), batch(n)
        torch.testing.assert_close(program.module()(x, y), model(x, y))


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_shapes_without_numbers(where: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, y = (torch.empty_like(t, device="meta") if where == "meta" else mode.from_tensor(t) for t in batch(6))
        x = x.detach().requires_grad_()
        loss = xent.cross_entropy(x, y, reduction="none")
        assert loss.shape == (6,)
        assert loss.dtype == torch.float32
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert grad.shape == (6, 5)
        assert xent.token_stats(x, y, prediction=True).prediction.dtype == torch.int64


def test_plain_tensors_pay_for_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch(6)
    monkeypatch.setattr(torch.ops.xent, "row_statistics", pytest.fail)
    monkeypatch.setattr(torch.ops.xent, "row_gradient", pytest.fail)
    for logits in (x, nn.Parameter(x.detach())):
        (grad,) = torch.autograd.grad(xent.cross_entropy(logits, y), logits)
        assert grad.isfinite().all()
