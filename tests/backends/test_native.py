"""The compiled backend, on each instruction set of this machine: its arithmetic, and rows of more than one part.

What it shares with the other backends is in test_primitives.py and test_primitives_edges.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import oracle
import pytest
import torch
from oracle import EVERYTHING, Upstream, assert_stats, grad_of, stats_of, truth_for, upstream
from torch import Tensor

import xent
from xent._records import RowNumbers, RowSpec, Wanted
from xent._rows import dispatch as _primitives

native = _primitives.load("native")
assert not isinstance(native, str), native
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=native._native.instruction_sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(_primitives, "FORCED_BACKEND", "native")
    before = native._native.use(request.param)
    yield request.param
    native._native.use(before)


# One number


def native_exp(t: Tensor) -> Tensor:
    """e^t: a row's gradient, p, where top and lse are taken to be 0; the target's own is computed in another way."""
    zero, x = torch.zeros(1, 1, dtype=torch.float64), torch.cat([t, t.new_zeros(1)])
    numbers = RowNumbers(zero, zero, zero + 1, zero)
    return _primitives.row_gradient(x[None, None], zero.long() + len(t), numbers, RowSpec(classes=len(x)))[0, 0, :-1]


def test_exp32() -> None:
    negative = torch.arange(0x80000000 - 2**32, 0xC2AF5C29 - 2**32, 499, dtype=torch.int32).view(torch.float32)
    positive = torch.arange(0, 0x42B00000, 499, dtype=torch.int32).view(torch.float32)
    assert negative.min() < -87.67  # where e^t is subnormal
    assert positive.max() > 87.9
    for t in (negative, positive):
        truth = torch.exp(t.double())
        ulp = (2.0 ** (torch.frexp(truth).exponent - 24.0)).clamp(min=2.0**-149)
        assert ((native_exp(t).double() - truth).abs() / ulp).max() <= 1.3


def test_exp64() -> None:
    if np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("no type here is more precise than float64")
    t = torch.cat([torch.linspace(-708.73, 709, 1_000_001), -torch.logspace(-300, 2, 100_001)]).double()
    t += torch.rand(len(t), dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * t * 1e-9
    truth = np.exp(t.numpy().astype(np.longdouble))
    ulp = np.spacing(truth.astype(np.float64)).astype(np.longdouble)
    assert (np.abs(native_exp(t).numpy() - truth) / ulp).max() <= 1.8


@pytest.mark.parametrize(("dtype", "lowest"), [(torch.float32, -87.68), (torch.float64, -708.74)])
def test_exp_of_special_numbers(dtype: torch.dtype, lowest: float) -> None:
    inf, nan = float("inf"), float("nan")
    t = torch.tensor([-0.0, 0.0, -inf, lowest - 0.01, -1e30, nan, -nan] * 5, dtype=dtype)  # in the tail of a vector too
    assert native_exp(t).nan_to_num(7).tolist() == [1, 1, 0, 0, 0, 7, 7] * 5
    smallest = native_exp(torch.tensor([lowest + 0.001], dtype=dtype)).item()
    assert smallest > 0.7 * torch.finfo(dtype).tiny  # below, all digits would be gone


def test_logarithm() -> None:
    n, y = torch.arange(1, 701), torch.zeros(700, dtype=torch.int64)
    x = torch.zeros(700, 700, dtype=torch.float64).masked_fill(torch.arange(700) >= n[:, None], -INF)
    truth = n.double().log()  # of sums that are exact
    assert ((stats_of(x, y).lse - truth).abs() <= 2 * torch.finfo(x.dtype).eps * truth).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_exactly(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    found = stats_of(torch.stack([x, 0 * x.nan_to_num()], 1), torch.zeros(2**16, dtype=torch.int64))
    assert torch.equal((found.top + found.picked).nan_to_num(1e9), x.double().nan_to_num(1e9))
    assert torch.equal(found.top, torch.where(x.isfinite(), x.double(), 0).clamp(min=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_results_are_rounded_to_even(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**31), 2**31, 2**12 - 1, dtype=torch.int64).to(torch.int32).view(torch.float32)
    exact = torch.arange(-(2**15), 2**15 - 1, dtype=torch.int16).view(dtype).float()
    ties = (exact[:-1] + exact[1:]) / 2
    v = torch.cat([numbers, exact, ties[ties.isfinite()], torch.tensor([65519.99, 65520.0, -65520.0])])
    x = torch.zeros(len(v), 1, dtype=dtype)
    y = torch.zeros(len(v), dtype=torch.int64)
    d = grad_of(x, y, stats_of(x, y), Upstream(torch.zeros(len(v)).double(), v.double()))[:, 0]
    assert torch.equal(d.isnan(), v.isnan())
    assert torch.equal(d.nan_to_num(7), v.to(dtype).nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_softcap_keeps_the_digits_of_small_logits(dtype: torch.dtype) -> None:
    x = torch.logspace(-6, 2, 4001, dtype=torch.float64).to(dtype)[:, None] * torch.tensor([[1, -1]], dtype=dtype)
    top, _, picked, *_ = stats_of(x, torch.ones(len(x), dtype=torch.int64), softcap=5.0)
    truth = 5 * torch.tanh(x[:, 0].double() / 5)
    assert torch.equal(picked, -2 * top)
    assert (top / truth - 1).abs().max() < 4 * torch.finfo(dtype).eps


# Rows in several pieces, and in parts for several threads


def problem(N: int, C: int) -> tuple[Tensor, Tensor]:
    """Logits with planted peaks; targets at both ends of a row."""
    x, y = oracle.rows(torch.float32, N=N, C=C)
    x[torch.arange(N), torch.arange(N) * 97 % C] += 12
    return x, y


@pytest.mark.parametrize("image", [False, True], ids=["rows", "image"])
@pytest.mark.parametrize("shape", [(6, 2100), (4, 70_000)], ids=str)  # several pieces of a row; several parts
def test_blocks_of_minus_infinity(shape: tuple[int, int], image: bool) -> None:
    (x, y), half = problem(*shape), shape[1] * 2 // 3
    x[0, :half] = x[1, half:] = x[2, 5:] = -INF
    y[:3] = torch.tensor([shape[1] - 1, 0, 3])
    x[3] -= 50  # all scores are negative, and the largest is the last
    x[3, -1] = -20
    x = x.T.contiguous().T if image else x
    found, truth, g = stats_of(x, y, oracle.Wanted(entropy=True, argmax=True)), truth_for(x, y), upstream(len(x), False)
    assert_stats(found, truth, x, y)
    oracle.assert_grad(grad_of(x, y, found, g), oracle.gradient(x, y, truth, g), y)


@pytest.mark.parametrize("shape", [(2, 1500), (2, 70_000)], ids=str)
def test_rows_that_are_infinite_or_nan(shape: tuple[int, int]) -> None:
    x, y = torch.randn(shape), torch.tensor([0, 1])
    x[0] = -INF
    assert stats_of(x, y).lse[0] == -INF
    assert stats_of(x, y).lse[1].isfinite()
    minus = grad_of(x, y, stats_of(x, y), Upstream(torch.ones(2).double(), -torch.ones(2).double()))
    assert minus[0].isnan().all()  # as torch has it: no distribution is left
    assert minus[1].isfinite().all()
    for bad in (INF, NAN):
        for at in (0, 700, shape[1] - 1):
            x[1] = -INF if at else 0.0
            x[1, at] = bad
            assert stats_of(x, y, EVERYTHING).lse[1].isnan()


@pytest.mark.parametrize("image", [False, True], ids=["rows", "image"])
@pytest.mark.parametrize("shape", [(40, 1500), (5, 70_000)], ids=str)
def test_argmax_is_torchs(shape: tuple[int, int], image: bool) -> None:
    x = torch.randint(-9, 9, shape).float()  # full of ties
    x[0] = -INF
    x[1, [600, 601, shape[1] - 1]] = NAN
    x[2, 700:] = 50.0
    x[2, 900] = NAN
    x[3, 300], x[3, 1400] = 50.0, 50.0
    x[4, shape[1] - 2] = NAN
    x = x.T.contiguous().T if image else x
    assert torch.equal(stats_of(x, torch.zeros(len(x)).long(), EVERYTHING).argmax, x.argmax(1))


def test_a_row_in_parts_is_the_same_row() -> None:
    x, y = problem(7, 140_001)
    x3, y3, g = x.repeat(3, 1), y.repeat(3), upstream(7)  # more than 16 rows: no parts
    few, many = stats_of(x, y, EVERYTHING), stats_of(x3, y3, EVERYTHING)
    for a, b in zip(few, many, strict=True):
        if a is not None:
            assert (a - b[:7]).abs().max() <= 1e-7 * b.abs().max()
    three = oracle.each(lambda row: row.repeat(3), few), oracle.each(lambda row: row.repeat(3), g)
    assert torch.equal(grad_of(x, y, few, g), grad_of(x3, y3, *three)[:7])


def test_few_rows_of_very_many_classes() -> None:
    x = torch.randn(1, 600_000).expand(16, -1)  # as many rows and parts as there may be
    found, u = stats_of(x, torch.arange(16)), x[0].double() - x[0].max()
    assert (found.lse - torch.logsumexp(u, 0)).abs().max() < 1e-6
    assert torch.equal(found.top + found.picked, x[0, :16].double())


# Short rows, which go through registers


@pytest.mark.parametrize("dtype", oracle.ALL_DTYPES, ids=str)
@pytest.mark.parametrize("C", [3, 10, 61])  # less than a tile, two that overlap, and more than are taken in tiles
def test_rows_that_lie_apart_in_place(C: int, dtype: torch.dtype) -> None:
    """What lies between them is not written. Their targets lie apart, too."""
    whole, y = oracle.rows(dtype, N=41, C=64)[0], torch.stack([torch.arange(41) % C, -torch.ones(41).long()], 1)[:, 0]
    x, rest = whole[:, :C], whole[:, C:].clone()
    truth, g = truth_for(x, y), upstream(len(x))
    expected = oracle.gradient(x, y, truth, g)
    assert_stats(stats_of(x, y, EVERYTHING), truth, x, y)
    oracle.assert_grad(grad_of(x, y, truth, g, out=x), expected, y)
    assert whole[:, C:].equal(rest)


@pytest.mark.parametrize(("N", "C"), [(6, 5), (6, 300), (40, 5)])
def test_a_class_without_weight_may_be_impossible(N: int, C: int) -> None:
    x, y = oracle.rows(torch.float32, N=N, C=C)
    x[:, 1], y[:], w = -INF, 0, torch.ones(C)
    w[1] = 0
    found, rest = stats_of(x, y, EVERYTHING, w), [0, *range(2, C)]
    assert_stats(found._replace(argmax=None), truth_for(x[:, rest], y, w[rest]), x, y)


def test_more_candidates_than_are_taken_at_once() -> None:
    x, y, q = torch.randn(2, 700, requires_grad=True), torch.randint(700, (2, 300)), torch.rand(2, 300)
    losses = xent.cross_entropy(x, y, target_prob=q), xent.cross_entropy(x, torch.zeros(2, 700).scatter_add(1, y, q))
    found, expected = ((loss, torch.autograd.grad(loss, x)[0]) for loss in losses)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Better than all backends must be


@pytest.mark.parametrize("dtype", oracle.ALL_DTYPES, ids=str)
def test_an_offset_of_half_of_what_the_dtype_can_hold(dtype: torch.dtype) -> None:
    x, y = oracle.rows(dtype)
    x = (x.double() + torch.finfo(dtype).min / 2).to(dtype)
    found, truth, g = stats_of(x, y, EVERYTHING), truth_for(x, y), upstream(len(x))
    assert_stats(found, truth, x, y, slack=0.2)
    oracle.assert_grad(grad_of(x, y, found, g), oracle.gradient(x, y, truth, g), y)


def test_a_confident_target_keeps_its_gradient() -> None:
    """1 - p is 2e-6, and 1e-10: p rounded to float32 has one digit of the first, and nothing of the second."""
    x, y, one = torch.zeros(2, 1000), torch.tensor([7, 7]), torch.ones(2).double()
    x[:, 7] = torch.tensor([20.0, 30.0])
    truth, g = truth_for(x, y), Upstream(one, -one)
    d, expected = grad_of(x, y, truth, g), oracle.gradient(x, y, truth, g)
    assert (d[:, 7] / expected[:, 7] - 1).abs().max() < 1e-5  # what float64 itself has left of 1e-10


@pytest.mark.parametrize("dtype", oracle.ALL_DTYPES, ids=str)
def test_more_classes_than_16_bits_count(dtype: torch.dtype) -> None:
    """The last 3 classes of an image are compared with the targets as numbers: of 17 rows, 341 classes are a step."""
    C = 341 * 205 + 3
    x = torch.randn(C, 17).to(dtype).T[None]
    y = (C - 1 - torch.arange(17) % 4 - 65536 * (torch.arange(17) % 3 == 0))[None]
    y[0, 16] = 65535
    top, lse, picked = _primitives.row_statistics(x, y, RowSpec(), Wanted()).pack()
    assert picked.equal(x.gather(2, y[..., None])[..., 0].double() - top)
    grad = _primitives.row_gradient(x, y, RowNumbers(top, lse, torch.zeros_like(lse), torch.ones_like(lse)), RowSpec())
    assert grad.equal(torch.nn.functional.one_hot(y, C).to(dtype))
