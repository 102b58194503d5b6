"""What is kept of a row, and the products of what is kept, on every backend: bounds, averages, exactness."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from interpreter import fewer
from pairs import pairwise
from torch import Tensor

from xent._backends import eager
from xent._head.entries import uniform
from xent._records import RowSpec, Samples, Wanted
from xent._rows import dispatch

pytestmark = pytest.mark.usefixtures("kernel")
R = 1 / 64
DRAWS = fewer(20, 20_000)


def spread(C: int, sd: float) -> Tensor:
    return torch.randn(C, generator=torch.Generator().manual_seed(C)).double() * sd


ROWS = {
    "flat": torch.zeros(300).double(),
    "entropy of 4 nats": spread(250, 1.8),
    "peaked": spread(150, 5.0),
    "all just under r": torch.zeros(65).double(),
    "all at r": torch.zeros(64).double(),
    "ties at r beside small ones": torch.tensor([R] * 32 + [R / 3] * 96).double().log(),
    "a masked half": spread(100, 1.0).index_fill(0, torch.arange(0, 100, 2), -torch.inf),
    "sorted": spread(130, 2.0).sort(descending=True)[0],
    "all but one are masked": torch.tensor([-torch.inf, 0, -torch.inf]).double(),
    "one class": torch.zeros(1).double(),
}
DTYPES = {str(dtype): dtype for dtype in oracle.ALL_DTYPES}


def sample(x: Tensor, y: Tensor, u: Tensor, r: float = R, **spec: Any) -> Samples:
    """Of rows (N, C), from their own statistics."""
    reading = RowSpec(**{"classes": x.shape[1]} | spec)
    stats = dispatch.row_statistics(x[None], y[None], reading, Wanted())
    return dispatch.row_samples(x[None], y[None], stats.top, stats.lse, u, reading, r)


def dense(samples: Samples, C: int, values: Tensor) -> Tensor:
    rows = torch.arange(len(samples.counts)).repeat_interleave(samples.counts)
    found = torch.zeros(len(samples.counts), C, dtype=values.dtype)
    return found.index_put_((rows, samples.classes.long()), values)


@pairwise(row=ROWS, dtype=DTYPES)
def test_each_class_is_its_probability_on_average(row: Tensor, dtype: torch.dtype) -> None:
    """Within 4.5 standard errors in 20,000 draws; the target, and p >= r, in every draw; never more than the bound."""
    x, C = row.to(dtype), len(row)
    p, y = x.double().softmax(0), int(x.argmin()) if C > 64 else int(x.argmax())
    u = uniform(torch.tensor(1), torch.arange(DRAWS))
    found = sample(x.expand(DRAWS, C), torch.full((DRAWS,), y), u)
    assert found.counts.max() <= 1 / R + 2
    assert found.p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    times = torch.bincount(found.classes, minlength=C).double() / DRAWS
    own = torch.arange(C) == y
    assert times[own | (p > R * 1.00001)].eq(1).all()
    rate = (p / R).clamp(max=1)
    error = 4.5 * (rate * (1 - rate) / DRAWS).sqrt() + 2 / DRAWS
    assert ((times - rate).abs() <= error)[~own].all()
    torch.testing.assert_close(found.p.double(), p[found.classes], rtol=1e-5, atol=0)


@pairwise(sd=[0.5, 2.0, 6.0], dtype=DTYPES, r=[1 / 4, 1 / 64, 1e-7], C=[5, 64, 700, 2000])
def test_backends_keep_the_same(sd: float, dtype: torch.dtype, r: float, C: int, monkeypatch: Any) -> None:
    """As the specification in float64 says, but where a sum is within rounding of a step."""
    torch.manual_seed(0)
    N = fewer(12, 40)
    x, y, u = (torch.randn(N, C) * sd).to(dtype), torch.randint(C, (N,)), torch.rand(N).double()
    y[::7] = -100
    x[y == -100] = torch.nan
    reading: dict[str, Any] = {"scale": 0.7, "softcap": 9.0} if C == 64 else {}
    found = sample(x, y, u, r, **reading)
    monkeypatch.setattr(dispatch, "FORCED_BACKEND", "eager")
    expected = sample(x.double(), y, u, r, **reading)
    assert found.counts[y == -100].eq(0).all()
    assert found.counts.max() <= 1 / r + 2
    assert (found.counts - expected.counts).abs().sum() <= 3
    ours, theirs = dense(found, C, found.p.double()), dense(expected, C, expected.p)
    assert ((ours > 0) != (theirs > 0)).sum() <= 6
    both = (ours > 0) & (theirs > 0)
    torch.testing.assert_close(ours[both], theirs[both], rtol=2e-5, atol=0)


def test_a_shard_samples_its_own_softmax() -> None:
    """Targets held elsewhere are not kept for being that."""
    x, y, u = torch.randn(6, 50), torch.tensor([0, 9, 10, 59, 60, 99]), torch.rand(6).double()
    found = sample(x, y, u, 0.05, start=10, classes=100)
    free = sample(x, torch.full((6, 50), 0.02), u, 0.05, start=10, classes=100)
    ours, theirs = (dense(some, 50, some.p) for some in (found, free))
    assert torch.equal(ours[[0, 1, 4, 5]], theirs[[0, 1, 4, 5]])
    assert ours[[2, 3], [0, 49]].gt(0).all()


def test_numbers_that_lie_apart_are_read_as_they_are() -> None:
    torch.manual_seed(0)
    x, y, u = torch.randn(6, 50), torch.arange(6), torch.rand(6).double()
    stats = dispatch.row_statistics(x[None], y[None], RowSpec(classes=50), Wanted())
    rest = y[None], stats.top, stats.lse, u, RowSpec(classes=50), R
    found, expected = (dispatch.row_samples(t[None], *rest) for t in (x.t().contiguous().t(), x))
    torch.testing.assert_close(tuple(found), tuple(expected))
    ends, classes = expected.counts.cumsum(0), expected.classes
    apart = torch.randn(3, 50).t()
    sums = [dispatch.gather_sums(ends, classes, expected.p, t, torch.float32) for t in (apart, apart.contiguous())]
    torch.testing.assert_close(*sums)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_keeps_its_target_alone(value: float) -> None:
    x, y = torch.zeros(2, 600), torch.tensor([3, 3])
    x[0, 500] = value
    found = sample(x, y, torch.full((2,), 0.5).double())
    assert found.counts[0] == 1
    assert found.p[0].isnan()
    assert found.counts[1] > 1


def csr(N: int, C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    S = torch.randn(N, C, dtype=dtype) * (torch.rand(N, C) < 0.2)
    S[::5] = 0
    S[:, ::3] = 0
    rows, classes = S.nonzero(as_tuple=True)
    return S, (S != 0).sum(1).cumsum(0), classes.int(), S[rows, classes]


@pytest.mark.parametrize("D", [1, 7, 64, 1100])
@pytest.mark.parametrize("dtype", oracle.ALL_DTYPES, ids=str)
def test_products(dtype: torch.dtype, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sparse matrix, and of its transpose, with a dense one: each rounded once. `eager` takes 100 at a time."""
    monkeypatch.setattr(eager, "CACHE_BYTES", 1600)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    S, ends, classes, coefficient = csr(40, 90, compute)
    for left, entries, rows in (
        (S, (ends, classes, coefficient), 90),
        (S.t(), dispatch.transpose(ends, classes, coefficient, 90), 40),
    ):
        B = torch.randn(rows, D).to(dtype)
        found = dispatch.gather_sums(*entries, B, dtype)
        exact = left.double() @ B.double()
        assert found.dtype == dtype
        size = (left.double().abs() @ B.double().abs()).norm(dim=1)
        assert ((found - exact).norm(dim=1) <= 2 * oracle.TOLERANCE[dtype] * size).all()
    nothing = dispatch.gather_sums(torch.zeros(3).long(), classes[:0], coefficient[:0], B, dtype)
    assert nothing.eq(0).all()
    assert nothing.shape == (3, D)


def test_a_nan_reaches_the_sums_that_have_its_row_alone() -> None:
    S, ends, classes, coefficient = csr(40, 90, torch.float32)
    B = torch.randn(90, 7).index_fill(0, torch.tensor(31), torch.nan)
    found = dispatch.gather_sums(ends, classes, coefficient, B, torch.float32)
    assert torch.equal(found.isnan(), (S[:, 31:32] != 0).expand(-1, 7))


def test_the_uniform_numbers() -> None:
    """In [0, 1), of mean 1/2 and variance 1/12, uncorrelated with the next row and with the next seed."""
    rows = torch.arange(200_000)
    u = torch.stack([uniform(torch.tensor(seed), rows) for seed in (0, 1, 2**62)])
    assert u.min() >= 0
    assert u.max() < 1
    noise = 5 * len(rows) ** -0.5
    assert (u.mean(1) - 0.5).abs().max() < noise * 0.29
    assert (u.var(1) - 1 / 12).abs().max() < noise * 0.1
    others = torch.cat([u[:, 1:], u[:, :1]], 1)[:1]
    assert torch.corrcoef(torch.cat([u, others])).sub(torch.eye(4)).abs().max() < noise
