"""A seeded differential test: on anything that both take, xent gives what F.cross_entropy gives in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import ALL_DTYPES, loss_and_grad
from torch import Tensor
from torch.nn import functional as F

import xent

pytestmark = pytest.mark.usefixtures("backend")

STRIDES = ("contiguous", "permuted", "sliced", "expanded", "offset")
LOGITS = ("normal", "large", "offset", "lowest", "peaked", "masked", "huge", "zero")


class Case(NamedTuple):
    """One call. The numbers come from `seed`, everything else is here to be read in a failure."""

    seed: int
    dtype: torch.dtype
    batch: tuple[int, ...]  # the target's shape
    C: int
    axis: int  #              the class dimension
    name_axis: bool  #        by dim=, or leave it to be inferred (where that is possible)
    strides: str
    logits: str
    soft: bool
    weighted: bool
    ignored: float  #         the share of rows that are
    ignore_index: int
    reduction: str
    label_smoothing: float


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any shape with up to three dimensions beside the classes, empty ones included, in any layout."""
    batch = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    C = draw(st.integers(1, 9))
    soft = draw(st.booleans())
    axis = draw(st.sampled_from(sorted({min(1, len(batch)), len(batch)})))
    shape = (*batch[:axis], C, *batch[axis:])
    readings = {dim for dim in {min(1, len(batch)), len(batch)} if soft or shape[:dim] + shape[dim + 1 :] == batch}
    weighted = draw(st.booleans())
    # Where torch multiplies 0 by inf, xent differs on purpose: no infinite logits beside weights of 0 or 1 - 1.
    logits = draw(st.sampled_from([kind for kind in LOGITS if not (weighted and kind == "masked")]))
    return Case(
        seed=draw(st.integers(0, 2**16)),
        dtype=draw(st.sampled_from(ALL_DTYPES)),
        batch=batch,
        C=C,
        axis=axis,
        name_axis=len(readings) > 1 or draw(st.booleans()),
        strides=draw(st.sampled_from(STRIDES)),
        logits=logits,
        soft=soft,
        weighted=weighted,
        ignored=draw(st.sampled_from([0.0, 0.4, 1.0])),
        ignore_index=-100 if soft else draw(st.sampled_from([-100, -1, C - 1])),
        reduction=draw(st.sampled_from(["none", "mean", "sum"])),
        label_smoothing=draw(st.sampled_from([0.0, 0.1] if logits == "masked" else [0.0, 0.1, 1.0])),
    )


def restrided(x: Tensor, strides: str) -> Tensor:
    """The same shape in other storage; "expanded" has one number all along the first dimension."""
    if strides == "permuted":
        return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    if strides == "sliced":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if strides == "offset":
        return torch.cat([x, x], dim=-1)[..., x.shape[-1] :]
    if strides == "expanded" and x.shape[0] > 0 and x.dim() > 1:
        return x[:1].expand(x.shape)
    return x


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, target and weight of a case."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (*case.batch[: case.axis], case.C, *case.batch[case.axis :])
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if case.logits == "large":
        x *= 300
    elif case.logits == "offset":
        x += 1e4
    elif case.logits == "lowest":
        x = torch.full_like(x, torch.finfo(case.dtype).min)
    elif case.logits == "peaked":
        x += 20 * (torch.rand(shape, generator=generator) < 0.2)
    elif case.logits == "masked":
        x[torch.rand(shape, generator=generator) < 0.4] = -torch.inf
        x = x.where(x.amax(case.axis, keepdim=True) > -torch.inf, 0)  # a whole row of it, ignored, is NaN in torch
    elif case.logits == "huge":
        x *= 1e4 if case.dtype == torch.float16 else 1e30
    elif case.logits == "zero":
        x *= 0
    x = restrided(x.to(case.dtype), case.strides)
    weight = torch.tensor([0.5, 1, 2, 3, 0, 1, 2, 3, 0.5])[: case.C] if case.weighted else None
    if case.soft:
        q = torch.rand(shape, generator=generator) + 0.01
        return x, restrided(q.to(case.dtype), case.strides), weight
    y = torch.randint(case.C, case.batch, generator=generator)
    y[torch.rand(case.batch, generator=generator) < case.ignored] = case.ignore_index
    return x, y, weight


# The run-time checks and the backend are the same for every example: nothing to set up again between them.
@settings(
    max_examples=600,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=cases())
def test_as_torch(case: Case) -> None:
    x, target, weight = tensors(case)
    options = {
        "reduction": case.reduction,
        "label_smoothing": case.label_smoothing,
        "ignore_index": case.ignore_index,
    }
    dim = {"dim": case.axis} if case.name_axis else {}
    loss, grad = loss_and_grad(xent.cross_entropy, x, target, weight, **dim, **options)

    def torchs(x: Tensor) -> Tensor:
        there = min(1, len(case.batch))  # torch's place for the classes
        q = target.double().movedim(case.axis, there) if case.soft else target
        w = None if weight is None else weight.double()
        return F.cross_entropy(x.movedim(case.axis, there), q, w, **options)

    truth, true_grad = loss_and_grad(torchs, x.double())
    assert loss.shape == truth.shape
    assert grad.shape == x.shape
    assert loss.dtype == grad.dtype == case.dtype
    # One rounding at the end; before it arithmetic in float32 (float64 for float64) on numbers near 1, and statistics
    # in float64, relative to the row's largest score. The weights go up to 3, the upstream up to 4.
    final = torch.finfo(case.dtype).eps
    unit = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps
    rows = max(1, target.numel() // (case.C if case.soft else 1))
    torch.testing.assert_close(
        loss.double(),
        truth.to(case.dtype).double(),
        rtol=final + 8 * unit,
        atol=24 * rows * unit,
        equal_nan=True,
    )
    if not case.soft and bool((target == case.ignore_index).all()):
        assert not grad.any()  # exactly 0, where torch may divide 0 by 0
        return
    smallest = torch.finfo(case.dtype).smallest_normal * final
    torch.testing.assert_close(
        grad.double(), true_grad, rtol=final + 32 * unit, atol=64 * unit + smallest, equal_nan=True
    )
