"""The suite of the two primitives, which every backend and instruction set passes: what comes out, what may go in."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from interpreter import fewer
from oracle import (
    EVERYTHING,
    Options,
    Truth,
    assert_stats,
    each,
    every_dtype,
    grad_of,
    rows,
    stats_of,
    truth_for,
    upstream,
)
from pairs import pairwise
from torch import Tensor

from xent._records import Wanted

pytestmark = pytest.mark.usefixtures("kernel")

CASES: dict[str, Options] = {
    "plain": {},
    "weight: counts in wsum, and not in an index's picked": {"weight": True},
    "probabilities: picked is a sum over the row, mass is 1": {"soft": True},
    "probabilities and weight: mass is not 1": {"soft": True, "weight": True},
    "scale: the chain rule multiplies by it": {"scale": 0.25},
    "negative scale: the largest score is the smallest logit": {"scale": -2.0},
    "softcap: the chain rule differs at each logit": {"softcap": 3.0},
    "scale before softcap": {"scale": 2.0, "softcap": 5.0, "weight": True},
    "everything on probabilities": {"scale": 2.0, "softcap": 5.0, "weight": True, "soft": True},
    "a shard: some targets are in it, some are not": {"start": 20},
}
SIZES = [37, 1061]  # classes: less than a vector is left over, and several chunks of a row
UPSTREAMS = {"lse, picked": (False, False), "and wsum": (True, False), "and entropy": (True, True)}
# What the compiled backend has of a tolerance that is every backend's.
SHARE = {torch.float64: 0.05, torch.float32: 0.2, torch.bfloat16: 1.0, torch.float16: 1.0}


def build(dtype: torch.dtype, case: Options, C: int = 37) -> tuple[Tensor, Tensor, Tensor | None, Options]:
    """Logits, target, class weight and reading (scale, softcap, start) of one of `CASES`."""
    x, target = rows(dtype, C=C, soft=case.get("soft", False))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.rand(C, generator=torch.Generator().manual_seed(1)).to(compute) if case.get("weight") else None
    return x, target, weight, {key: value for key, value in case.items() if key in ("scale", "softcap", "start")}


@pairwise(case=CASES, dtype=oracle.ALL_DTYPES, C=SIZES)
def test_statistics(case: Options, dtype: torch.dtype, C: int, kernel: str) -> None:
    x, target, weight, reading = build(dtype, case, C)
    classes = {"classes": C + 20} if "start" in case else {}
    got = stats_of(x, target, EVERYTHING, weight, **reading, **classes)
    slack = 0.2 if kernel.startswith("native") else 1
    assert_stats(got, truth_for(x, target, weight, **reading), x, target, slack)


@pairwise(case=CASES, dtype=oracle.ALL_DTYPES, given=UPSTREAMS, C=SIZES)
def test_gradient(case: Options, dtype: torch.dtype, given: tuple[bool, bool], C: int, kernel: str) -> None:
    x, target, weight, reading = build(dtype, case, C)
    stats, g = truth_for(x, target, weight, **reading), upstream(len(x), *given)
    got = grad_of(x, target, stats, g, weight, **reading)
    assert got.dtype == dtype
    assert got.is_contiguous()
    truth = oracle.gradient(x, target, stats, g, weight, **reading)
    at = None if target.is_floating_point() else target - reading.get("start", 0)
    share = SHARE[dtype] * (4 if "softcap" in reading else 1) if kernel.startswith("native") else 1
    oracle.assert_grad(got, truth, at, slack=min(1, share))


@pytest.mark.parametrize("ignored", [False, True], ids=["all rows count", "every third row ignored"])
def test_many_blocks_of_rows(ignored: bool) -> None:
    """More rows than any backend takes at once, of a real vocabulary; two whole blocks of `eager` and a row."""
    N = fewer(7, 41)
    x, y = rows(torch.float32, N=N, C=50257)
    y[::3] = y[::3].where(torch.tensor(not ignored), -100)
    got = stats_of(x, y, EVERYTHING)
    g = upstream(N)
    grad = grad_of(x, y, got, g)
    keep = y != -100
    truth = truth_for(x[keep], y[keep])
    assert_stats(each(lambda stat: stat[keep], got), truth, x, y)
    expected = oracle.gradient(x[keep], y[keep], truth, each(lambda row: row[keep], g))
    oracle.assert_grad(grad[keep], expected, y[keep])
    assert not grad[~keep].any()


@every_dtype
@pytest.mark.parametrize("names", [(), *((name,) for name in Wanted._fields)], ids=str)
def test_only_what_is_wanted(names: tuple[str, ...], dtype: torch.dtype) -> None:
    """Each statistic is the same whether the others are asked for or not, and None if it is not asked for."""
    x, y = rows(dtype)
    got, everything = stats_of(x, y, Wanted(**dict.fromkeys(names, True))), stats_of(x, y, EVERYTHING)
    for name in Wanted._fields:
        assert (getattr(got, name) is not None) == (name in names)
    for one, all_of_them in zip(got, everything, strict=True):
        assert one is None or torch.allclose(one, all_of_them, rtol=1e-6, atol=0)


@pytest.mark.parametrize("soft", [False, True])
@every_dtype
def test_one_class(dtype: torch.dtype, soft: bool) -> None:
    x = torch.tensor([[3.0], [-2.0]], dtype=dtype)
    target = torch.ones(2, 1) if soft else torch.zeros(2, dtype=torch.int64)
    got = stats_of(x, target, EVERYTHING)
    assert got.top.tolist() == [3, -2]
    assert all(stat.tolist() == [0, 0] for stat in (got.lse, got.picked, got.wsum, got.entropy, got.argmax))
    g = upstream(2, wsum=False, entropy=False)
    grad = grad_of(x, target, got, g)
    oracle.assert_grad(grad, (g.lse + g.picked)[:, None])


@pytest.mark.parametrize("soft", [False, True])
def test_no_rows(soft: bool) -> None:
    x = torch.empty(0, 5)
    target = torch.empty(0, 5) if soft else torch.empty(0, dtype=torch.int64)
    got = stats_of(x, target, EVERYTHING)
    assert (got.mass is not None) == soft
    assert all(stat.shape == (0,) for stat in got if stat is not None)
    assert grad_of(x, target, got, upstream(0)).shape == (0, 5)


def test_a_shard_without_classes() -> None:
    """The sum over no classes is 0, whose log is -inf; ignored rows stay at 0, and targets are checked as ever."""
    x, y = torch.empty(3, 0), torch.tensor([2, -100, 0])
    got = stats_of(x, y, EVERYTHING, classes=4)
    assert got.lse.tolist() == [-torch.inf, 0, -torch.inf]
    assert all(stat.tolist() == [0, 0, 0] for stat in (got.top, got.picked, got.wsum, got.entropy))
    assert got.argmax.tolist() == [-1, -1, -1]
    assert grad_of(x, y, got, upstream(3)).shape == (3, 0)
    with pytest.raises(IndexError, match=r"target: expected class indices in \[0, 4\)"):
        stats_of(x, y + 2, classes=4)
    soft = stats_of(x, torch.empty(3, 0), classes=4)
    assert soft.lse.tolist() == [-torch.inf] * 3
    assert soft.mass is not None
    assert soft.mass.tolist() == [0, 0, 0]


@every_dtype
@pytest.mark.parametrize("case", [list(CASES.values())[i] for i in (0, 1, 3, 7)], ids=[str(i) for i in (0, 1, 3, 7)])
def test_shards_add_up_to_the_whole(case: Options, dtype: torch.dtype) -> None:
    """Uneven shards, one of them of one class and one of none: the parts of each statistic give that of the whole."""
    x, target, weight, reading = build(dtype, case)
    whole = stats_of(x, target, EVERYTHING, weight, **reading)
    soft, g = target.is_floating_point(), upstream(len(x))
    w = torch.ones(37).double() if weight is None else weight.double()
    t = target.double() * w if soft else oracle.one_hot(target, 37)
    bounds = [0, 20, 21, 21, 37]
    parts, grads = [], []
    for start, stop in itertools.pairwise(bounds):
        shard = slice(start, stop)
        args = x[:, shard], target[:, shard] if soft else target
        options = {"start": start, "class_weight": None if weight is None else weight[shard], **reading}
        part = stats_of(*args, EVERYTHING, classes=37, **options)
        up = part.top - whole.top
        parts.append(
            part._replace(
                lse=part.lse + up, picked=part.picked + t[:, shard].sum(1) * up, wsum=part.wsum + w[shard].sum() * up
            )
        )
        grads.append(grad_of(*args, whole, g, **options))
    lse = torch.stack([part.lse for part in parts])
    share = (lse - whole.lse).exp()
    mean_score = (lse - torch.stack([part.entropy for part in parts])).masked_fill(share == 0, 0)  # sum_c p_c u_c
    combined = Truth(
        top=torch.stack([parts[r].top for r in (0, 1, 3)]).amax(0),  # where there are classes
        lse=lse.logsumexp(0),
        picked=sum(part.picked for part in parts),
        mass=sum(part.mass for part in parts) if soft else torch.ones(len(x)),
        wsum=sum(part.wsum for part in parts),
        entropy=whole.lse - (share * mean_score).sum(0),
        argmax=whole.argmax,
    )
    assert_stats(whole, combined, x, target, slack=2)
    torch.testing.assert_close(torch.cat(grads, 1), grad_of(x, target, whole, g, weight, **reading))


@pairwise(wrong=[-1, 57, -101, 2**40, -(2**63)], index=[torch.int64, torch.int32], start=[0, 20])
def test_out_of_range_target(index: torch.dtype, wrong: int, start: int) -> None:
    """Checked against all the classes, not those held here, and before anything is read through it."""
    if abs(wrong) > 2**31 and index == torch.int32:
        wrong = 2**31 - 1 if wrong > 0 else -(2**31)
    x, y = rows(torch.float32)
    y = y.to(index)
    stats_of(x, y.where(y != y[5], 56), start=start, classes=57)  # in range, though not here
    y[5] = wrong
    with pytest.raises(IndexError, match=rf"target: expected .*\[0, 57\).*got {wrong} \(row 5 of 13\)"):
        stats_of(x, y, start=start, classes=57)


def test_default_number_of_classes_includes_those_before_the_shard() -> None:
    x, y = rows(torch.float32)
    assert stats_of(x, y + 20, start=20).picked.equal(stats_of(x, y).picked)
    with pytest.raises(IndexError, match=r"\[0, 57\)"):
        stats_of(x, y + 21, start=20)


@every_dtype
def test_int32_targets(dtype: torch.dtype) -> None:
    x, y = rows(dtype)
    y[4] = -100
    narrow, wide = stats_of(x, y.int(), EVERYTHING), stats_of(x, y, EVERYTHING)
    assert all(a is b or a.equal(b) for a, b in zip(narrow, wide, strict=True))
    g = upstream(len(x))
    assert grad_of(x, y.int(), wide, g).equal(grad_of(x, y, wide, g))


@pytest.mark.parametrize("target_dtype", oracle.ALL_DTYPES, ids=str)
@every_dtype
def test_probabilities_of_any_dtype(dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    x, q = rows(dtype, soft=True)
    q = q.to(target_dtype)
    got = stats_of(x, q, EVERYTHING)
    assert_stats(got, truth_for(x, q), x, q)
    g = upstream(len(x))
    oracle.assert_grad(grad_of(x, q, got, g), oracle.gradient(x, q, got, g), slack=2)


@pytest.mark.parametrize("soft", [False, True])
def test_the_same_bits_twice(soft: bool) -> None:
    N = fewer(10, 40)
    x, target = rows(torch.float32, N=N, C=5000, soft=soft)
    first, second = (stats_of(x, target, EVERYTHING) for _ in range(2))
    assert all(a is b or a.equal(b) for a, b in zip(first, second, strict=True))
    g = upstream(N)
    assert grad_of(x, target, first, g).equal(grad_of(x, target, first, g))
