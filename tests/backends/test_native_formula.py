"""The compiled formula of a loss against `objective`'s, on each instruction set: values, divisors, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from pairs import pairwise
from torch import Tensor

from xent._backends import eager, native
from xent._records import Layout, LossOptions, Objective, RowSpec
from xent._rows import dispatch, loss

OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing alone": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 0.01},
    "all": {"reduction": "none", "label_smoothing": 0.2, "z_loss": 0.03},
    "zero where empty": {"on_empty": "zero"},
}
WEIGHTS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "no weight": lambda _: None,
    "float64": lambda w: w,
    "every second": lambda w: torch.stack([w, -w], 1)[:, 0],
    "float32": lambda w: w.float(),
    "bfloat16, every second": lambda w: torch.stack([w, -w], 1).bfloat16()[:, 0],
}
SHAPES = {"few classes": (2, 300, 5), "rows": (1, 21, 700), "parts of rows": (1, 3, 70_000), "empty": (1, 4, 9)}


@pytest.mark.parametrize("instructions", native._native.instruction_sets())
@pairwise(shape=SHAPES, options=OPTIONS, soft=[False, True], weights=WEIGHTS)
def test_formula(
    instructions: str,
    shape: tuple[int, int, int],
    options: dict[str, Any],
    soft: bool,
    weights: Callable[[Tensor], Tensor | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    A, B, C = shape
    x, y = oracle.rows(torch.float64, N=A * B, C=C, soft=soft)
    x[0, 1] = -torch.inf  # 0 * inf has a meaning of its own where the target's part is gone
    if not soft:
        y[:: 1 if shape == SHAPES["empty"] else 3] = -100
    x, y = x.view(shape), y.view(A, B, -1) if soft else y.view(A, B)
    objective, spec = Objective(dtype=torch.float64, **options), RowSpec(classes=C)
    weight = weights(torch.rand(C, dtype=torch.float64))
    call = LossOptions(Layout(2, A, B), spec, objective, False)
    g = torch.rand(A, B, dtype=torch.float64) if objective.reduction == "none" else torch.tensor(0.7)

    def find(module: Any) -> tuple[Tensor, Tensor, Tensor]:
        value, divisor, *numbers = module.losses(x, y, weight, None, call)
        grad = module.losses_gradient(x, y, *numbers, weight, g, divisor, call)
        return value, torch.tensor(1.0 if divisor is None else float(divisor)), grad

    before = native._native.use(instructions)
    found = find(native if x.numel() else loss)
    native._native.use(before)
    monkeypatch.setattr(dispatch, "backend_for", lambda *_: eager)
    torch.testing.assert_close(found, find(loss), rtol=1e-12, atol=1e-13, equal_nan=True)
