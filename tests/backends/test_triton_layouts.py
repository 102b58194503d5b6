"""Where the triton backend finds rows in memory: logits, targets and numbers of any strides, read where they lie.

    TRITON_INTERPRET=1 XENT_BACKEND=triton python -m pytest tests/backends/test_triton_layouts.py

The interpreter does not fault at a wrong alignment, so what a kernel is told of it is checked by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import oracle
import pytest
import torch
from oracle import EVERYTHING, Upstream, assert_stats, each, rows, truth_for, upstream
from test_triton import backend, interpreted, plan
from torch import Tensor

from xent._records import RowNumbers, RowSpec, Stats, Wanted

A, B, C = 3, 13, 40  # more rows than one program takes
IGNORED = -100


class Layout(NamedTuple):
    """Strides, and where in memory the first number is."""

    strides: tuple[int, ...]
    begin: int = 0

    def hold(self, x: Tensor) -> Tensor:
        """A view that holds x, in memory that may not be read elsewhere: NaN there, or an index out of range."""
        at = torch.full(x.shape, self.begin)
        for d, stride in enumerate(self.strides):
            at += torch.arange(x.shape[d]).view([-1] + [1] * (x.dim() - 1 - d)) * stride
        memory = torch.full((int(at.max()) + 20,), torch.nan if x.is_floating_point() else 10**9, dtype=x.dtype)
        memory[at] = x
        return memory.as_strided(x.shape, self.strides, self.begin)


LAYOUTS = {  # in this order, since `test_logits` writes the gradient of each as the next, too
    "rows": Layout((B * C, C, 1)),
    "samples apart": Layout((B * C + 1, C, 1), 1),
    "images (N, C, H, W)": Layout((B * C, 1, B)),
    "logits[:, :-1]": Layout(((B + 1) * C, C, 1)),
    "logits[:, 1:]": Layout(((B + 1) * C, C, 1), C),
    "images, classes cut off": Layout(((C + 3) * B, 1, B), 2 * B),
    "time first": Layout((C, A * C, 1)),
    "rows apart": Layout((B * (C + 3), C + 3, 1)),
    "classes first": Layout((B, 1, A * B)),
    "every other class": Layout((2 * B * C, 2 * C, 2), 1),
    "classes first, then positions": Layout((1, A, A * B)),
}
OVERLAPPING = {
    "one row for all": Layout((0, 0, 1)),
    "one sample for all": Layout((0, C, 1)),
    "one position for all": Layout((C, 0, 1)),
    "one class for all": Layout((B, 1, 0)),
}
PER_ROW = {
    "dense": Layout((B, 1)),
    "labels[:, 1:]": Layout((B + 1, 1), 1),
    "time first": Layout((1, A)),
    "every other": Layout((2 * B, 2)),
    "one for all": Layout((0, 0)),
    "one for each position": Layout((0, 1)),
    "one for each sample": Layout((1, 0)),
}


def batch(dtype: torch.dtype, soft: bool = False) -> tuple[Tensor, Tensor]:
    """Logits (A, B, C) and targets, dense."""
    x, target = rows(dtype, N=A * B, C=C, soft=soft)
    return x.view(A, B, C), target.view(A, B, C) if soft else target.view(A, B)


def following(layout: str) -> str:
    """The next of `LAYOUTS`."""
    names = list(LAYOUTS)
    return names[(names.index(layout) + 1) % len(names)]


def numbers() -> Upstream:
    """One random number for each row and statistic."""
    g: Upstream = each(lambda number: number.view(A, B), upstream(A * B))
    return g


def flat(x: Tensor) -> Tensor:
    """As rows, copied if need be."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def checked_statistics(x: Tensor, target: Tensor, weight: Tensor | None = None, wanted: Wanted = EVERYTHING) -> Stats:
    """The statistics, all of them, after comparing them with the truth, for the rows that count."""
    got = backend.row_statistics(x, target, RowSpec(classes=x.shape[2]), wanted, weight)
    assert all(stat.shape == x.shape[:2] for stat in got.pack())
    keep = flat(target) != IGNORED if target.dim() == 2 else slice(None)
    truth = truth_for(flat(x)[keep], flat(target)[keep], weight)
    assert_stats(each(lambda stat: flat(stat)[keep], got), truth, flat(x)[keep], flat(target)[keep])
    return got


def gradient(
    x: Tensor, target: Tensor, stats: Stats, g: Upstream, out: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    return backend.row_gradient(x, target, RowNumbers(stats.top, stats.lse, *g), RowSpec(), weight, out)


def assert_gradient(
    got: Tensor, x: Tensor, target: Tensor, stats: Stats, g: Upstream, weight: Tensor | None = None
) -> None:
    """As close to the truth as it must be, and exactly 0 where a row does not count."""
    soft = target.dim() == 3
    keep = torch.ones(x[..., 0].numel(), dtype=torch.bool) if soft else flat(target) != IGNORED
    part = lambda number: flat(number)[keep]  # noqa: E731
    expected = oracle.gradient(part(x), part(target), each(part, stats), each(part, g), weight)
    oracle.assert_grad(part(got), expected, None if soft else part(target), slack=2)
    assert not flat(got)[~keep].any()


def assert_surroundings(view: Tensor) -> None:
    """Of the memory of `Layout.hold`, nothing was written but the view."""
    memory = view._base
    assert memory is not None
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    assert memory[outside].isnan().all()


@interpreted
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (layout, dtype)
        for number, layout in enumerate(LAYOUTS)
        for dtype in ((torch.float32, torch.bfloat16), (torch.float64, torch.float16))[number % 2]
    ],
    ids=str,
)
def test_logits(layout: str, dtype: torch.dtype) -> None:
    """Both primitives, fresh, elsewhere and in place; rows that do not count are NaN and never read."""
    x, y = batch(dtype)
    y[1, ::5] = IGNORED
    x[1, ::5] = torch.nan
    x, g = LAYOUTS[layout].hold(x), numbers()
    stats = checked_statistics(x, y)
    fresh = gradient(x, y, stats, g)
    assert_gradient(fresh, x, y, stats, g)
    for other in {"rows", following(layout)} - {layout}:
        out = LAYOUTS[other].hold(torch.full_like(x, 7))
        assert gradient(x, y, stats, g, out) is out
        assert out.equal(fresh)
        assert_surroundings(out)
    assert gradient(x, y, stats, g, out=x) is x
    assert x.equal(fresh)
    assert_surroundings(x)


@interpreted
@pytest.mark.parametrize("layout", OVERLAPPING)
def test_logits_that_overlap(layout: str) -> None:
    """Each row for itself, and a gradient in memory of its own."""
    x, y = batch(torch.float32)
    x, g = OVERLAPPING[layout].hold(x), numbers()
    stats = checked_statistics(x, y)
    assert_gradient(gradient(x, y, stats, g), x, y, stats, g)


@interpreted
@pytest.mark.parametrize(
    ("layout", "strides"),
    [
        ("rows", (B * C, C, 1)),
        ("images (N, C, H, W)", (B * C, 1, B)),
        ("logits[:, :-1]", (B * C, C, 1)),
        ("images, classes cut off", (B * C, 1, B)),
        ("time first", (C, A * C, 1)),
        ("classes first, then positions", (1, A, A * B)),
        ("every other class", (B * C, C, 1)),
    ],
)
def test_fresh_gradient_is_dense(layout: str, strides: tuple[int, ...]) -> None:
    """In the same order of memory as the logits."""
    x, y = batch(torch.float32)
    x = LAYOUTS[layout].hold(x)
    assert gradient(x, y, checked_statistics(x, y), numbers()).stride() == strides


@interpreted
@pytest.mark.parametrize("logits", ["rows", "images (N, C, H, W)"])
@pytest.mark.parametrize("layout", PER_ROW)
def test_targets(layout: str, logits: str) -> None:
    x, y = batch(torch.float32)
    x, y, g = LAYOUTS[logits].hold(x), PER_ROW[layout].hold(y), numbers()
    stats = checked_statistics(x, y)
    assert_gradient(gradient(x, y, stats, g), x, y, stats, g)


@interpreted
@pytest.mark.parametrize("logits", ["rows apart", "images (N, C, H, W)"])
@pytest.mark.parametrize("layout", [*LAYOUTS, *OVERLAPPING])
def test_probabilities(layout: str, logits: str) -> None:
    x, q = batch(torch.float32, soft=True)
    dtype = torch.bfloat16 if "images" in layout + logits else torch.float32
    x, q, g = LAYOUTS[logits].hold(x), (LAYOUTS | OVERLAPPING)[layout].hold(q.to(dtype)), numbers()
    weight = torch.rand(C, generator=torch.Generator().manual_seed(5))
    stats = checked_statistics(x, q, weight)
    assert_gradient(gradient(x, q, stats, g, weight=weight), x, q, stats, g, weight)


@interpreted
@pytest.mark.parametrize("logits", ["rows", "images (N, C, H, W)"])
@pytest.mark.parametrize("turn", [0, 3, 5])
def test_numbers(turn: int, logits: str) -> None:
    """Each of the six in a layout of its own."""
    x, y = batch(torch.float32)
    x = LAYOUTS[logits].hold(x)
    layouts = list(PER_ROW.values())[turn:] + list(PER_ROW.values())[:turn]
    stats = checked_statistics(x, y)
    given = (stats.top, stats.lse, *numbers())
    top, lse, *g = (layout.hold(number) for layout, number in zip(layouts, given, strict=False))
    stats = stats._replace(top=top, lse=lse)
    assert_gradient(gradient(x, y, stats, Upstream(*g)), x, y, stats, Upstream(*g))


@interpreted
@pytest.mark.parametrize("shape", [(1, 1, 40), (1, 5, 7), (5, 1, 7), (5, 3, 1), (1, 5, 1), (2, 3, 9)], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)], ids=str)
def test_dimensions_of_one(order: tuple[int, ...], shape: tuple[int, int, int]) -> None:
    """Whatever stride such a dimension has."""
    N = shape[0] * shape[1]
    x, y = rows(torch.float32, N=15, C=shape[2])
    x, y = x[:N].view(shape), y[:N].view(shape[:2])
    x = x.permute(order).contiguous().permute([order.index(d) for d in range(3)])
    x = x.as_strided(shape, [s if n > 1 else 10**6 for n, s in zip(shape, x.stride(), strict=True)])
    stats, g = checked_statistics(x, y), each(lambda number: number.view(shape[:2]), upstream(N))
    assert_gradient(gradient(x, y, stats, g), x, y, stats, g)


@interpreted
@pytest.mark.parametrize("layout", ["cut", "images"])
def test_rows_in_parts(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs for each row, which find it, and its target, where the one would."""
    monkeypatch.setattr(backend, "processors", lambda device: 132)
    C = {"cut": 2 * 2048 + 5, "images": 70}[layout]
    strides = {"cut": Layout((3 * C, C, 1), C), "images": Layout((2 * C, 1, 2))}[layout]
    x, y = rows(torch.float32, N=6, C=C)
    x, y = strides.hold(x.view(3, 2, C)), Layout((3, 1), 1).hold(y.view(3, 2))
    assert plan.share(config := plan.configure(x, y, None, 1.0, None), plan.stretches(config, 3, 2), C, 132)[0] > 1
    stats, g = checked_statistics(x, y), each(lambda number: number.view(3, 2), upstream(6))
    assert_gradient(gradient(x, y, stats, g), x, y, stats, g)


def test_division_only_where_rows_need_two_strides() -> None:
    """An integer division for each row is spent where no single stride leads from each to the next."""
    x, y = torch.empty(A, B, C), torch.empty(A, B)
    assert plan.batch(x, y, None) is None
    assert plan.batch(x[:1, 1:], y[:1, 1:]) is None
    assert plan.batch(x[:, :1], y[:, :1]) is None
    assert plan.row_strides(x[:, :1]) == (0, B * C)
    assert plan.batch(x, y[:1, :1].expand(A, B)) is None
    assert plan.batch(x.transpose(1, 2)) == C
    assert plan.batch(x[:, 1:], y[:, 1:]) == B - 1
    assert plan.batch(x, y[:1].expand(A, B)) == B


def starts(x: Tensor) -> Tensor:
    """The address of each row (A, B)."""
    steps = torch.arange(x.shape[0])[:, None] * x.stride(0) + torch.arange(x.shape[1]) * x.stride(1)
    return x.data_ptr() + steps * x.itemsize


@pytest.mark.parametrize("C", [40, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("other_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_alignments_are_kept(other_dtype: torch.dtype, dtype: torch.dtype, C: int) -> None:
    """What a kernel is told of vectors is true of each row, whichever stride is off; and it is told, if true."""
    told = set()
    for a, b, begin in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (8, 8, 0), (0, 0, 1), (8, 0, 8), (3, 1, 0), (2, 2, 2)]:
        x = torch.empty(2000, dtype=dtype).as_strided((3, 5, C), (5 * (C + b) + a, C + b, 1), begin)
        for other in (x.new_empty(3, 5, C), x, torch.empty_like(x, dtype=other_dtype)):
            config = plan.configure(x, other, None, 1.0, None, out=other)
            V, start = config.V, starts(x)
            whole = bool((start % 16 == 0).all())
            assert config.edges == (not whole or C % V > 0)
            head = -(start // x.itemsize) % V if config.edges else 0 * start
            assert not ((start + head * x.itemsize) % config.x_align).any()
            vectors = starts(other) + head * other.itemsize
            most = max(n for n in (other.itemsize, min(16, V * other.itemsize)) if not (vectors % n).any())
            assert config.out_align == config.q_align == most
            told.add(most)
    assert len(told) > 1
