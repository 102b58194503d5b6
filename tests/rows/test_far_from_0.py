"""Rows whose logits all lie far from 0, to the end of the range: no common offset eats a digit that the dtype has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from oracle import every_dtype
from ranks import Ranks
from torch import Tensor
from torch.distributed import ProcessGroup

import xent

C = 7
STEPS = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [3, 3, 3, 3, 3, 3, 3], [6, 0, 1, 0, 0, 2, 0]])
TARGET = torch.tensor([0, 3, 2])


def by_statistics(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    return -xent.token_stats(x, y, **options).log_prob.sum()


def sum_of_losses(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    return xent.cross_entropy(x, y, reduction="sum", **options)


def linear(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Each row's logits are the bias of a head of its own, beside a hidden state of 0."""
    h, W = torch.zeros(1, 1, dtype=x.dtype), torch.zeros(C, 1, dtype=x.dtype)
    rows = zip(x, y[:, None], strict=True)
    losses = [
        xent.linear_cross_entropy(h, W, target, linear_bias=row, reduction="sum", **options) for row, target in rows
    ]
    return torch.stack(losses).sum()


def linear_statistics(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    h, W = torch.zeros(1, 1, dtype=x.dtype), torch.zeros(C, 1, dtype=x.dtype)
    rows = zip(x, y[:, None], strict=True)
    found = [xent.linear_token_stats(h, W, target, linear_bias=row, **options).log_prob for row, target in rows]
    return -torch.stack(found).sum()


FUNCTIONS = {
    "cross_entropy, mean": lambda x, y, **options: xent.cross_entropy(x, y, **options) * len(y),
    "cross_entropy, sum": sum_of_losses,
    "token_stats": by_statistics,
    "linear_cross_entropy": linear,
    "linear_token_stats": linear_statistics,
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def value_and_grad(function: Callable[..., Tensor], x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = function(x, y, **options)
    return loss.detach(), *torch.autograd.grad(loss, x)


def assert_true(name: str, x: Tensor, y: Tensor) -> None:
    """As the formula says, in float64, of the logits that x holds."""
    loss, grad = value_and_grad(FUNCTIONS[name], x, y)
    truth, true_grad = value_and_grad(oracle.cross_entropy, x.double(), y, reduction="sum")
    # Of a head in half precision the block of logits may be float32, and the gradient's sum is.
    tolerance = max(oracle.TOLERANCE[x.dtype], 0.0 if x.dtype == torch.float64 else oracle.TOLERANCE[torch.float32])
    torch.testing.assert_close(loss.double(), truth, rtol=2 * tolerance, atol=2 * tolerance)
    torch.testing.assert_close(grad.double(), true_grad, rtol=2 * tolerance, atol=2 * tolerance)


@every_function
@every_dtype
@pytest.mark.usefixtures("backend")
def test_rows_filled_with_the_end_of_the_range(name: str, dtype: torch.dtype) -> None:
    """log C, and a gradient of 1/C - one-hot: what lies beyond float64's 2**53 is no less a difference of 0."""
    for level in (torch.finfo(dtype).min, torch.finfo(dtype).max):
        x = torch.full((3, C), level, dtype=dtype)
        loss, grad = value_and_grad(FUNCTIONS[name], x, TARGET)
        torch.testing.assert_close(loss, (3 * torch.tensor(float(C)).log()).to(loss))
        torch.testing.assert_close(grad, (1 / C - oracle.one_hot(TARGET, C)).to(dtype))


@every_function
@every_dtype
@pytest.mark.usefixtures("backend")
def test_offsets(name: str, dtype: torch.dtype) -> None:
    """Logits that differ by the smallest steps that there are from 1e1 to 1e30, on either side of 0: below and above
    2**24, 2**53 and 2**63, and about every third power of ten."""
    info = torch.finfo(dtype)
    for exponent in (1, 2, 4, 7, 8, 11, 15, 16, 18, 19, 22, 26, 30) if info.max > 1e30 else range(1, 5):
        base = torch.tensor(10.0**exponent, dtype=dtype)
        step = (base.double().log2().floor().exp2() * info.eps).to(dtype)  # one unit in the last place of base
        x = (base.double() + step.double() * STEPS).to(dtype)
        assert (x.double() - base.double()).equal(step.double() * STEPS), "all of these have their place in the dtype"
        assert_true(name, x, TARGET)
        assert_true(name, -x, TARGET)


@pytest.mark.parametrize("shape", [(2, 1000), (64, 40), (2, 40, 3, 4)], ids=str)
@pytest.mark.usefixtures("backend")
def test_sums_over_masked_classes(shape: tuple[int, ...]) -> None:
    """Logits that are the lowest number, with which people mask classes: their sum is no float32, its share is."""
    x = torch.randn(shape)
    x[:, 5:] = torch.finfo(torch.float32).min
    target = x.argmax(1)
    even = torch.full(shape, 1e-3)
    weight = torch.linspace(0.5, 100, shape[1])
    for y, options in ((target, {"label_smoothing": 1e-3}), (even, {}), (even, {"weight": weight})):
        loss = xent.cross_entropy(x, y, dim=1, loss_dtype=torch.float64, **options)
        truth = oracle.cross_entropy(x.double(), y if y is target else y.double(), dim=1, **options)
        torch.testing.assert_close(loss, truth, rtol=1e-6, atol=0)


def over_ranks(group: ProcessGroup) -> None:
    for dtype in oracle.ALL_DTYPES:
        x = torch.full((3, C), torch.finfo(dtype).min, dtype=dtype)
        mine = slice(0, 4) if group.rank() == 0 else slice(4, C)
        for name in ("cross_entropy, sum", "token_stats"):
            loss, grad = value_and_grad(FUNCTIONS[name], x[:, mine], TARGET, group=group)
            torch.testing.assert_close(loss, (3 * torch.tensor(float(C)).log()).to(loss))
            torch.testing.assert_close(grad, (1 / C - oracle.one_hot(TARGET, C))[:, mine].to(dtype))


def test_over_ranks(ranks: Ranks) -> None:
    ranks.run(over_ranks, 2)
