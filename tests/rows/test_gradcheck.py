"""Analytical derivatives against finite differences in float64, first and second, over the whole grid of options."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from oracle import Options
from pairs import pairwise
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import xent
from xent._rows import derivatives

# Thousands of calls with the same few shapes: the run-time checks have seen them all elsewhere.
pytestmark = pytest.mark.usefixtures("unchecked")

SMOOTHING: list[Options] = [{}, {"label_smoothing": 0.2}]
Z_LOSS: list[Options] = [{}, {"z_loss": 0.3}]
READINGS: list[Options] = [{}, {"logit_scale": -0.7}, {"softcap": 2.0, "logit_scale": 1.5}]
REDUCTIONS: list[Options] = [{"reduction": "mean"}, {"reduction": "sum"}, {"reduction": "none"}, {"normalizer": 3.5}]
# For second derivatives: each option by itself, and all together.
some_options: list[Options] = [
    {},
    {"label_smoothing": 0.2},
    {"z_loss": 0.3, "reduction": "none"},
    {"logit_scale": -0.7, "reduction": "sum"},
    {"softcap": 2.0},
    {"label_smoothing": 0.2, "z_loss": 0.3, "softcap": 2.0, "logit_scale": 1.5},
]
LAYOUTS = {"(N, C)": (3, 4), "(B, T, V)": (2, 2, 3)}
either_target = pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])


def tensors(layout: str, soft: bool = False, weighted: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, target and weight. Index targets ignore one row; beside them a weight is a constant."""
    torch.manual_seed(0)
    shape = LAYOUTS[layout]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(shape[-1]).double().requires_grad_(soft) if weighted else None
    if soft:
        return x, torch.rand(shape).double().requires_grad_(), weight
    y = torch.randint(shape[-1], shape[:-1])
    y.view(-1)[0] = -100
    return x, y, weight


def checked(layout: str, soft: bool, weighted: bool, options: Options) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The loss as a function of the tensors to differentiate it by: all but class indices and what goes with them."""
    x, target, weight = tensors(layout, soft, weighted)
    if soft:
        given = [x, target] if weight is None else [x, target, weight]
        return lambda *args: xent.cross_entropy(*args, dim=-1, **options), given
    return lambda x: xent.cross_entropy(x, target, weight, dim=-1, **options), [x]


@either_target
@pairwise(
    reduction=REDUCTIONS, reading=READINGS, smoothing=SMOOTHING, z_loss=Z_LOSS, layout=LAYOUTS.keys(), weighted=[0, 1]
)
def test_first_derivatives(
    reduction: Options, reading: Options, smoothing: Options, z_loss: Options, layout: str, weighted: int, soft: bool
) -> None:
    function, given = checked(layout, soft, bool(weighted), reduction | reading | smoothing | z_loss)
    assert gradcheck(function, given)


@either_target
@pairwise(options=some_options, layout=LAYOUTS.keys(), weighted=[0, 1])
def test_second_derivatives(options: Options, layout: str, weighted: int, soft: bool) -> None:
    function, given = checked(layout, soft, bool(weighted), options)
    assert gradgradcheck(function, given)


@pairwise(reading=READINGS, layout=LAYOUTS.keys(), entropy=[False, True], check=[gradcheck, gradgradcheck])
def test_token_stats(layout: str, reading: Options, entropy: bool, check: Callable[..., bool]) -> None:
    """All outputs at once: gradcheck gives each an upstream of its own."""
    x, y, _ = tensors(layout)

    def stats(x: Tensor) -> tuple[Tensor, ...]:
        got = xent.token_stats(x, y, dim=-1, entropy=entropy, prediction=True, **reading)
        return tuple(stat for stat in got[:3] if stat is not None)

    assert len(stats(x)) == 2 + entropy
    assert check(stats, [x])


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_focal_loss(check: Callable[..., bool]) -> None:
    """A loss built on token_stats is as differentiable as its parts."""
    x, y, _ = tensors("(B, T, V)")

    def focal(x: Tensor) -> Tensor:
        log_p = xent.token_stats(x, y, dim=-1).log_prob
        return -((1 - log_p.exp()) ** 2 * log_p).mean()

    assert check(focal, [x])


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": xent.cross_entropy,
    "z-loss": functools.partial(xent.cross_entropy, z_loss=0.3),
    "entropy": lambda x, y: xent.token_stats(x, y, entropy=True).entropy,
}


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_beside_minus_infinity(loss: Callable[[Tensor, Tensor], Tensor], check: Callable[..., bool]) -> None:
    """Masked logits are constants; all the others have their derivatives."""
    x, y, _ = tensors("(N, C)")
    mask = torch.zeros(3, 4).double()
    mask[:, 1] = -torch.inf
    y = y.where(y != 1, 2)
    assert check(lambda x: loss(x + mask, y), [x])


def test_second_derivatives_of_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to the class weights is a sum over the blocks."""
    monkeypatch.setattr(derivatives, "CACHE_BYTES", 1)
    function, given = checked("(B, T, V)", True, True, {"label_smoothing": 0.2})
    assert gradgradcheck(function, given)
