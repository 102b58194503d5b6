"""No worse than eager torch: both errors are measured against float64, on inputs that are hard and are seen to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import oracle
import pytest
import torch
from oracle import Errors, gradient_errors, loss_and_grad
from torch import Tensor
from torch.nn import functional as F

import xent

pytestmark = pytest.mark.usefixtures("backend")

N, C = 32, 1000


def noise() -> tuple[Tensor, Tensor]:
    """Unit normal logits; the first and the last class are among the targets."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=generator, dtype=torch.float64)
    y = torch.randint(C, (N,), generator=generator)
    y[:4] = torch.tensor([0, 0, C - 1, C - 1])
    return x, y


def planted_peaks() -> tuple[Tensor, Tensor]:
    """In each row one other class has nearly all of the probability, at either end or in the middle."""
    x, y = noise()
    peak = torch.arange(N) * (C - 1) // (N - 1)
    x[torch.arange(N), peak] += 20
    return x, y.where(y != peak, (y + 1) % C)


def confident_targets() -> tuple[Tensor, Tensor]:
    """The target has so much of the probability that p rounds to 1 in half precision."""
    x, y = noise()
    x[torch.arange(N), y] = 17
    return x, y


def masked(block: slice) -> tuple[Tensor, Tensor]:
    """A block of classes is -inf, and no target is in it."""
    x, y = noise()
    x[:, block] = -torch.inf
    free = x[0].isfinite().nonzero()[:, 0]
    return x, free[y % len(free)]


class Scenario(NamedTuple):
    """An input, and whether it is what its name says: judged by the softmax p, of the logits in their own dtype."""

    make: Callable[[], tuple[Tensor, Tensor]]
    matters: Callable[[Tensor, Tensor], Tensor]


SCENARIOS = {
    "noise": Scenario(noise, lambda p, y: p.amax(1) < 0.2),
    "planted peaks": Scenario(planted_peaks, lambda p, y: (p.amax(1) > 0.99) & (p.argmax(1) != y)),
    "confident targets": Scenario(confident_targets, lambda p, y: p.gather(1, y[:, None])[:, 0] > 1 - 2**-12),
    "-inf at the start": Scenario(lambda: masked(slice(None, 400)), lambda p, y: (p[:, :400] == 0).all(1)),
    "-inf at the end": Scenario(lambda: masked(slice(-400, None)), lambda p, y: (p[:, -400:] == 0).all(1)),
    "-inf but for 8 classes": Scenario(lambda: masked(slice(4, -4)), lambda p, y: (p > 0).sum(1) == 8),
}
every_scenario = pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def logits(scenario: Scenario, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scenario in a dtype, after a look at it."""
    x, y = scenario.make()
    x = x.to(dtype)
    assert scenario.matters(x.double().softmax(1), y).all(), "the input is not what it says"
    return x, y


def no_worse(ours: float, torchs: float, dtype: torch.dtype) -> bool:
    """Not beyond torch's error, or else within what one rounding to the dtype costs at most."""
    return ours <= max(1.1 * torchs, oracle.TOLERANCE[dtype])


@every_dtype
@every_scenario
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss(scenario: Scenario, label_smoothing: float, reduction: str, dtype: torch.dtype) -> None:
    x, y = logits(scenario, dtype)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    truth = oracle.cross_entropy(x, y, **options)
    if truth.isinf().any():  # smoothing gives masked classes a share
        assert xent.cross_entropy(x, y, **options).isinf().equal(truth.isinf())
        return
    errors = [
        float(((f(x, y, **options).double() - truth).abs() / truth.abs().clamp(min=1)).max())
        for f in (xent.cross_entropy, F.cross_entropy)
    ]
    assert no_worse(*errors, dtype), errors


@every_dtype
@every_scenario
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradient(scenario: Scenario, reduction: str, dtype: torch.dtype) -> None:
    """The target's entry and the rest, each on its own."""
    x, y = logits(scenario, dtype)
    _, truth = oracle.true_loss_and_grad(x, y, reduction=reduction)
    ours, torchs = (
        gradient_errors(loss_and_grad(f, x, y, reduction=reduction)[1], truth, y)
        for f in (xent.cross_entropy, F.cross_entropy)
    )
    assert no_worse(ours.target, torchs.target, dtype), (ours, torchs)
    assert no_worse(ours.rest, torchs.rest, dtype), (ours, torchs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_scenario
def test_half_precision_is_rounded_once(scenario: Scenario, dtype: torch.dtype) -> None:
    """Better than torch: with logits of half precision, no entry of the gradient is beyond its one rounding, nor is
    any loss."""
    x, y = logits(scenario, dtype)
    truth = oracle.true_loss_and_grad(x, y, reduction="none")
    loss, grad = loss_and_grad(xent.cross_entropy, x, y, reduction="none")
    oracle.assert_loss(loss, truth[0])
    # Where p is within 2^-12 of 1 on purpose, the last bits of p in float32 are a part of p - 1 that can be seen.
    left = 1 - x.double().softmax(1).gather(1, y[:, None]).max().item()
    oracle.assert_grad(grad, truth[1], y, slack=1 + 2**-20 / left / oracle.TOLERANCE[dtype])


def test_torch_loses_what_this_file_is_about() -> None:
    """Or the comparison would be an empty one: torch's gradient at a confident target, in half precision, is 0."""
    x, y = logits(SCENARIOS["confident targets"], torch.bfloat16)
    _, truth = oracle.true_loss_and_grad(x, y, reduction="sum")
    ours, torchs = (
        gradient_errors(loss_and_grad(f, x, y, reduction="sum")[1], truth, y)
        for f in (xent.cross_entropy, F.cross_entropy)
    )
    assert isinstance(ours, Errors)
    assert torchs.target > 0.5
    assert ours.target < 0.01
