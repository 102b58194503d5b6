"""The two primitives where kernels break: strides, storage, infinities, ignored rows, confident targets."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from interpreter import fewer
from oracle import EVERYTHING, Options, assert_stats, each, every_dtype, grad_of, rows, stats_of, truth_for, upstream
from pairs import pairwise
from torch import Tensor

from xent._records import Wanted, compute_dtype

pytestmark = pytest.mark.usefixtures("kernel")

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "rows far apart": lambda x: x.new_zeros(len(x), 3 * x.shape[1])[:, : x.shape[1]].copy_(x),
    "storage begins elsewhere": lambda x: x.new_zeros(len(x), x.shape[1] + 1)[:, 1:].copy_(x),
    "every other class": lambda x: x.new_zeros(len(x), 2 * x.shape[1])[:, ::2].copy_(x),
    "every other row": lambda x: x.new_zeros(2 * len(x), x.shape[1])[::2].copy_(x),
    "one row for all": lambda x: x[:1].expand_as(x),
    "one class for all": lambda x: x[:, :1].expand_as(x),
}


# Less than a vector, a chunk and a tile of rows; and several of each.
SHAPES = {"small": {}, "large": {"N": fewer(7, 37), "C": fewer(300, 1061)}}


@pairwise(layout=LAYOUTS.keys(), dtype=oracle.ALL_DTYPES, ignored=[False, True], shape=SHAPES)
def test_any_strides(layout: str, dtype: torch.dtype, ignored: bool, shape: dict[str, int]) -> None:
    x, y = rows(dtype, **shape)
    x = LAYOUTS[layout](x)
    assert not x.is_contiguous()
    keep = torch.arange(len(x)) % 4 > 0 if ignored else torch.ones(len(x), dtype=torch.bool)
    y = y.where(keep, -100)
    got = stats_of(x, y, EVERYTHING)
    truth = truth_for(x, y)
    assert_stats(each(lambda stat: stat[keep], got), each(lambda stat: stat[keep], truth), x, y)
    g = upstream(len(x))
    expected = oracle.gradient(x, y, truth, g) * keep[:, None]
    grad = grad_of(x, y, got, g)
    assert grad.stride() == torch.empty_like(x).stride(), "in the memory order of the logits"
    oracle.assert_grad(grad, expected, y)


@every_dtype
@pytest.mark.parametrize("layout", list(LAYOUTS)[:5])
def test_probabilities_of_any_strides(layout: str, dtype: torch.dtype) -> None:
    x, q = rows(dtype, soft=True)
    view = LAYOUTS[layout](q)
    plain, strided = stats_of(x, q), stats_of(x, view)
    torch.testing.assert_close(strided.picked, plain.picked)
    torch.testing.assert_close(strided.mass, plain.mass)
    g = upstream(len(x))
    torch.testing.assert_close(grad_of(x, view, plain, g), grad_of(x, q, plain, g))


def test_index_targets_of_any_strides() -> None:
    x, y = rows(torch.float32)
    wide = torch.full((len(y), 2), 10**9)
    wide[:, 1] = y
    stats, g = stats_of(x, y), upstream(len(x))
    assert stats_of(x, wide[:, 1]).picked.equal(stats.picked)
    assert grad_of(x, wide[:, 1], stats, g).equal(grad_of(x, y, stats, g))
    same, apart = y[:1].expand_as(y), each(lambda row: torch.stack([row, row + 1], 1)[:, 0], g)
    assert stats_of(x, same).picked.equal(stats_of(x, same.clone()).picked)
    assert grad_of(x, y, stats, apart).equal(grad_of(x, y, stats, g))
    one = each(lambda row: row[:1].expand_as(row), g)  # stride 0, as sum() delivers it
    assert grad_of(x, y, stats, one).equal(grad_of(x, y, stats, each(Tensor.clone, one)))


@pairwise(
    dtype=oracle.ALL_DTYPES,
    layout=["contiguous", "rows far apart", "every other class", "transposed"],
    reading=[{}, {"scale": 0.5, "softcap": 4.0}],
    soft=[False, True],
    ignored=[False, True],
    shape=SHAPES,
)
def test_in_place_equals_fresh(
    dtype: torch.dtype, layout: str, reading: Options, soft: bool, ignored: bool, shape: dict[str, int]
) -> None:
    """Bit for bit, the target's entry included: its logit is read before the row is overwritten."""
    x, target = rows(dtype, soft=soft, **shape)
    if ignored and not soft:
        target[::4] = -100
    stats, g = stats_of(x, target, **reading), upstream(len(x))
    fresh = grad_of(x, target, stats, g, **reading)
    own = x.clone() if layout == "contiguous" else LAYOUTS[layout](x)
    assert grad_of(own, target, stats, g, out=own, **reading).data_ptr() == own.data_ptr()
    assert own.equal(fresh)
    if own._base is not None:  # nothing is written beside it
        assert own._base.count_nonzero() == fresh.count_nonzero()
    other = torch.full_like(own, torch.nan)
    grad_of(x, target, stats, g, out=other, **reading)
    assert other.equal(fresh)


@pairwise(dtype=oracle.ALL_DTYPES, soft=[False, True], ignored=[False, True])
def test_inputs_are_never_written_to(dtype: torch.dtype, soft: bool, ignored: bool) -> None:
    x, target = rows(dtype, soft=soft)
    if ignored and not soft:
        target[::4] = -100
    weight, g = (
        torch.rand(x.shape[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32),
        upstream(len(x)),
    )
    truth = truth_for(x, target)
    inputs = [x, target, weight, truth.top, truth.lse, *g]
    before = [tensor.clone() for tensor in inputs]
    stats_of(x, target, EVERYTHING, weight)
    grad_of(x, target, truth, g, weight)
    assert all(new.equal(old) for new, old in zip(inputs, before, strict=True))


@pairwise(ignore_index=[-100, -1, 5, 36], dtype=oracle.ALL_DTYPES, poison=[torch.nan, torch.inf, -torch.inf])
def test_ignored_rows_are_not_read(ignore_index: int, dtype: torch.dtype, poison: float) -> None:
    """An ignore_index in [0, C) drops the rows of that class; the class itself stays in the others' denominator."""
    x, y = rows(dtype)
    y = y.where(y != ignore_index, 1)
    y[[0, 6, -1]] = ignore_index
    x[[0, 6, -1]] = poison
    got = stats_of(x, y, EVERYTHING, ignore_index=ignore_index)
    grad = grad_of(x, y, got, upstream(len(x)), ignore_index=ignore_index)
    ignored = y == ignore_index
    for stat in (got.top, got.lse, got.picked, got.wsum, got.entropy, grad):
        assert not stat[ignored].any()
    assert (got.argmax[ignored] == -1).all()
    alone = each(lambda row: row[~ignored], upstream(len(x)))
    truth = truth_for(x[~ignored], y[~ignored])
    assert_stats(each(lambda stat: stat[~ignored], got), truth, x, y)
    oracle.assert_grad(grad[~ignored], oracle.gradient(x[~ignored], y[~ignored], truth, alone), y[~ignored])
    own = x.clone()
    assert grad_of(own, y, got, upstream(len(x)), ignore_index=ignore_index, out=own).equal(grad)


@pairwise(block=[1, 8, 1024, 16384, 32768], dtype=oracle.ALL_DTYPES, end=["first", "last"])
def test_block_of_minus_infinity(block: int, dtype: torch.dtype, end: str) -> None:
    """A running maximum that starts at -inf makes exp(-inf - -inf) of it: NaN in four well-known kernels."""
    x, y = rows(dtype, N=3, C=block + 40)
    masked = slice(None, block) if end == "first" else slice(-block, None)
    x[:, masked] = -torch.inf
    y = torch.tensor([block, block + 39, block + 7]) if end == "first" else torch.tensor([0, 39, 7])
    got = stats_of(x, y, Wanted(entropy=True, argmax=True))
    assert_stats(got, truth_for(x, y), x, y)
    g = upstream(3, wsum=False)
    grad = grad_of(x, y, got, g)
    oracle.assert_grad(grad, oracle.gradient(x, y, got, g), y)
    assert not grad[:, masked].any()


@every_dtype
def test_minus_infinity_at_the_target(dtype: torch.dtype) -> None:
    x, y = rows(dtype)
    x[4, y[4]] = -torch.inf
    got = stats_of(x, y)
    assert got.picked[4] == -torch.inf
    g = upstream(len(x), wsum=False, entropy=False)
    oracle.assert_grad(grad_of(x, y, got, g), oracle.gradient(x, y, got, g), y)


@every_dtype
def test_rows_that_have_no_finite_lse(dtype: torch.dtype) -> None:
    """A whole row of -inf has log 0; a +inf or NaN that counts makes NaN; the rows beside them are what they were."""
    x, y = rows(dtype)
    clean = stats_of(x, y)
    x[2], x[5, 1], x[7, -1] = -torch.inf, torch.inf, torch.nan
    got = stats_of(x, y, EVERYTHING)
    assert got.lse[2] == -torch.inf
    assert got.top[2] == got.argmax[2] == 0
    assert got.lse[[5, 7]].isnan().all()
    others = [0, 1, 3, 4, 6, *range(8, 13)]
    assert all(now[others].equal(before[others]) for now, before in zip(got[:3], clean, strict=False))
    g = upstream(len(x))
    grad = grad_of(x, y, got, g)
    assert grad[[5, 7]].isnan().any(1).all()
    assert grad[others].isfinite().all()


@pytest.mark.parametrize("weighted", [False, True])
@every_dtype
def test_coefficient_of_zero_at_an_infinite_logit(dtype: torch.dtype, weighted: bool) -> None:
    """0 * inf is 0 here: a class that is masked out and has no probability, or no weight, changes nothing."""
    x, q = rows(dtype, soft=True)
    x[:, 3] = -torch.inf
    weight = torch.ones(37, dtype=compute_dtype(x))
    (weight if weighted else q.t())[3] = 0
    got = stats_of(x, q, Wanted(wsum=weighted), weight)
    truth = truth_for(x, q, weight)
    assert truth.picked.isfinite().all()
    assert_stats(got, truth, x, q)


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e12, -1e30])
def test_common_offset(offset: float) -> None:
    """Far from 0 a dtype has few numbers, and none of their digits is lost: all statistics are relative to the top."""
    x, y = rows(torch.float32)
    step = torch.finfo(torch.float32).eps * abs(offset)
    x = x * max(1, step) + offset
    got, truth = stats_of(x, y, EVERYTHING), truth_for(x, y)
    assert got.top.equal(x.amax(1).double())
    assert_stats(got, truth, x, y, slack=0.25)
    g = upstream(len(x))
    oracle.assert_grad(grad_of(x, y, got, g), oracle.gradient(x, y, truth, g), y)


@pytest.mark.parametrize("level", ["min", "max"])
@every_dtype
def test_the_ends_of_the_range(dtype: torch.dtype, level: str) -> None:
    """A row full of the lowest or of the highest number has lse = log C, and a gradient of 1/C - one-hot."""
    x = torch.full((3, 37), getattr(torch.finfo(dtype), level), dtype=dtype)
    y = torch.tensor([0, 36, 5])
    got = stats_of(x, y, EVERYTHING)
    assert got.top.equal(x[:, 0].double())
    assert not got.picked.any()
    assert not got.wsum.any()
    log_c = torch.full((3,), 37.0, dtype=torch.float64).log()
    torch.testing.assert_close((got.lse, got.entropy), (log_c, log_c), rtol=1e-7, atol=0)
    g = upstream(3)
    oracle.assert_grad(grad_of(x, y, got, g), oracle.gradient(x, y, truth_for(x, y), g), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_huge_finite_logits(dtype: torch.dtype) -> None:
    x = torch.tensor([[1e30, 0, -1e30], [1e30, 1e30, -1e30], [-1e30, -1e30, -1e30]], dtype=dtype)
    y = torch.tensor([0, 1, 2])
    got = stats_of(x, y, EVERYTHING)
    assert_stats(got, truth_for(x, y), x, y)
    log = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).log()
    torch.testing.assert_close((got.lse - got.picked, got.entropy), (log, log))
    assert got.argmax.tolist() == [0, 0, 0]
    ones = torch.ones(3).double()
    g = oracle.Upstream(ones, -ones)
    grad = grad_of(x, y, got, g)
    assert grad[0].tolist() == [0, 0, 0]
    oracle.assert_grad(grad, oracle.gradient(x, y, truth_for(x, y), g), y)


@every_dtype
@pytest.mark.parametrize("in_place", [False, True])
def test_confident_target_keeps_its_bits(dtype: torch.dtype, in_place: bool) -> None:
    """p = 0.99988 rounds to 1 in half precision, and p - 1 would be 0: the difference is taken before the rounding."""
    x = torch.zeros(4, 8, dtype=dtype)
    y = torch.tensor([0, 3, 6, 7])
    x[torch.arange(4), y] = 11
    stats, ones = truth_for(x, y), torch.ones(4).double()
    g = oracle.Upstream(ones, -ones)
    truth = oracle.gradient(x, y, stats, g)
    at_target = truth.gather(1, y[:, None])
    assert (at_target.abs() < torch.finfo(torch.float16).eps / 2).all(), "or there is nothing to see"
    got = grad_of(x, y, stats, g, out=x if in_place else None).gather(1, y[:, None])
    relative = (got.double() / at_target - 1).abs().max()
    assert relative < max(1e-3, torch.finfo(dtype).eps)  # of p - 1, though p itself is in float32


@every_dtype
def test_lowest_of_equal_scores(dtype: torch.dtype) -> None:
    x = torch.zeros(4, 5000, dtype=dtype)
    x[1, [17, 18, 4999]] = x[2, [4998, 4999]] = x[3, [0, 2500]] = 2
    got = stats_of(x, torch.zeros(4, dtype=torch.int64), Wanted(argmax=True))
    assert got.argmax.tolist() == [0, 17, 4998, 0]


@every_dtype
def test_a_target_in_another_shard_has_no_entry_here(dtype: torch.dtype) -> None:
    x, y = rows(dtype)
    ones = torch.ones(len(x)).double()
    for start in (-37, 37, 1000):
        assert not grad_of(x, y, truth_for(x, y), oracle.Upstream(0 * ones, ones), start=start).any()
    assert not stats_of(x, y, start=37, classes=100).picked.any()
