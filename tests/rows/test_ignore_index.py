"""Targets of every integer dtype beside every `ignore_index`: what the dtype cannot hold is the target of no row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from ranks import Ranks
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

import xent

C, D = 6, 4
DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
IGNORED = (-100, -1, 0, 255, 2**31, 2**40 + 3, -(2**40))  # in 32 bits, the last two are the classes 3 and 0
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5, 3.0], dtype=torch.float64)


def problem(dtype: torch.dtype, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and targets: each class, and the ignored one where the dtype holds it."""
    torch.manual_seed(0)
    info = torch.iinfo(dtype)
    y = [0, 3, *range(C)] + [ignore_index] * (2 if info.min <= ignore_index <= info.max else 0)
    h, W = torch.randn(len(y), D).double(), torch.randn(C, D).double()
    return h.requires_grad_(), W, torch.tensor(y, dtype=dtype)


def dense(h: Tensor, W: Tensor, y: Tensor, **options: Any) -> Tensor:
    return xent.cross_entropy(F.linear(h, W), y, **options)


def statistics(h: Tensor, W: Tensor, y: Tensor, **options: Any) -> Tensor:
    return -xent.token_stats(F.linear(h, W), y, **options).log_prob


def linear_statistics(h: Tensor, W: Tensor, y: Tensor, **options: Any) -> Tensor:
    return -xent.linear_token_stats(h, W, y, **options).log_prob


FUNCTIONS = {
    "cross_entropy": dense,
    "linear_cross_entropy": xent.linear_cross_entropy,
    "token_stats": statistics,
    "linear_token_stats": linear_statistics,
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def check(name: str, dtype: torch.dtype, ignore_index: int, group: ProcessGroup | None) -> None:
    function: Callable[..., Tensor] = FUNCTIONS[name]
    h, W, y = problem(dtype, ignore_index)
    every: list[dict[str, Any]] = [
        {"reduction": "mean"},
        {"reduction": "none", "weight": WEIGHT, "label_smoothing": 0.1},
    ]
    every = [{}] if "stats" in name else [*every, {"reduction": "mean", "weight": WEIGHT}]
    for options in every:
        arguments = options | ({"group": group} if group else {})
        found = function(h, W, y, ignore_index=ignore_index, **arguments)
        options = options or {"reduction": "none"}
        expected = oracle.cross_entropy(F.linear(h, W), y.long(), dim=-1, ignore_index=ignore_index, **options)
        g = oracle.upstream_for(expected)
        both = [(loss.detach(), *torch.autograd.grad(loss, h, g)) for loss in (found, expected)]
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-13, msg=lambda m: f"{dtype}, {ignore_index=}: {m}")


@every_function
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("backend")
def test_every_dtype(name: str, dtype: torch.dtype) -> None:
    for ignore_index in IGNORED:
        check(name, dtype, ignore_index, None)


def over_a_group(group: ProcessGroup, name: str) -> None:
    for dtype in DTYPES:
        for ignore_index in IGNORED:
            check(name, dtype, ignore_index, group)


@every_function
def test_over_a_group(ranks: Ranks, name: str) -> None:
    ranks.run(over_a_group, 1, name)
