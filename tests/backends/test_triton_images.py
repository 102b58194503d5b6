"""The triton backend where positions lie side by side, as in images: vectors hold the same class of several rows.

TRITON_INTERPRET=1 XENT_BACKEND=triton python -m pytest tests/backends/test_triton_images.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import each, rows, upstream
from test_triton import backend, interpreted, plan
from test_triton_layouts import (
    IGNORED,
    Layout,
    assert_gradient,
    assert_surroundings,
    checked_statistics,
    gradient,
    starts,
)
from torch import Tensor

# Of (2, B, C): the layout, and whether whole vectors of 16 bytes lie in it, however few positions there are.
LAYOUTS: dict[str, tuple[int, Callable[[int, int], Layout], bool]] = {
    "images": (24, lambda B, C: Layout((B * C, 1, B)), True),
    "classes cut off": (24, lambda B, C: Layout(((C + 3) * B, 1, B), 2 * B), True),
    "classes first": (24, lambda B, C: Layout((B, 1, 2 * B)), True),
    "off by one": (24, lambda B, C: Layout((B * C, 1, B), 1), False),
    "samples off by one": (24, lambda B, C: Layout((B * C + 1, 1, B)), False),
    "classes off by one": (24, lambda B, C: Layout((8 * C * (B + 1), 1, B + 1)), False),
    "an odd size": (23, lambda B, C: Layout((B * C, 1, B)), False),
    "an odd size, padded": (23, lambda B, C: Layout((24 * C, 1, 24)), False),
}


def images(layout: str, C: int, dtype: torch.dtype, soft: bool = False) -> tuple[Tensor, Tensor]:
    """Logits and targets (2, B, C): positions ignored one by one, and side by side, with NaN in them."""
    B, make, _ = LAYOUTS[layout]
    x, target = rows(dtype, N=2 * B, C=C, soft=soft)
    x, target = x.view(2, B, C), target.view(2, B, -1) if soft else target.view(2, B)
    if not soft:
        for ignored in (slice(None, None, 3), slice(8, 16)):
            target[:, ignored], x[:, ignored] = IGNORED, torch.nan
    return make(B, C).hold(x), target


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few positions are many, and a second program takes the rest."""
    monkeypatch.setattr(plan, "TILE", 16)


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("C", "dtype"), [(3, torch.bfloat16), (9, torch.float32), (5, torch.float64)], ids=str)
def test_images(layout: str, C: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both primitives, fresh and in place; what does not count has no part in it, although it may be read. Rows of 9
    classes are shared by several programs."""
    monkeypatch.setattr(backend, "processors", lambda device: 4 if C == 9 else 0)
    x, y = images(layout, C, dtype)
    stats, g = checked_statistics(x, y), each(lambda number: number.view(y.shape), upstream(y.numel()))
    fresh = gradient(x, y, stats, g)
    assert_gradient(fresh, x, y, stats, g)
    out = torch.empty_like(fresh, memory_format=torch.contiguous_format)
    assert gradient(x, y, stats, g, out).equal(fresh)
    assert gradient(x, y, stats, g, out=x).equal(fresh)
    assert_surroundings(x)


@interpreted
def test_probabilities() -> None:
    x, q = images("images", 5, torch.float32, soft=True)
    q, weight = Layout((5 * 24, 1, 24)).hold(q.bfloat16()), torch.arange(1, 6) / 4
    stats, g = checked_statistics(x, q, weight), each(lambda number: number.view(2, 24), upstream(48))
    assert_gradient(gradient(x, q, stats, g, weight=weight), x, q, stats, g, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vectors_of_positions(layout: str, dtype: torch.dtype) -> None:
    """What a kernel is told of them is true of each class and sample; and it is told, if true."""
    x, y = images(layout, 5, dtype)
    config = plan.configure(x, y, None, 1.0, None, out=x)
    assert config.side_by_side
    assert config.together * x.itemsize == config.x_align == config.out_align
    assert config.x_align >= (16 if LAYOUTS[layout][2] else x.itemsize)
    begin = starts(x)[:, :: config.together, None] + torch.arange(5) * x.stride(2) * x.itemsize
    assert not (begin % config.x_align).any()
    assert x.shape[1] % config.together == 0


@pytest.mark.parametrize(("B", "expected"), [(257, True), (256, False)])
def test_few_positions_are_rows_among_others(B: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that takes the positions of one sample only would have too little to do."""
    monkeypatch.undo()
    x = torch.empty(3, 5, B).transpose(1, 2)
    config = plan.configure(x, torch.empty(3, B, dtype=torch.int64), None, 1.0, None)
    assert config.across
    assert config.side_by_side == expected
    assert plan.stretches(config, 3, B) == (3 if expected else -(-3 * B // config.R))
