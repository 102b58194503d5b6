"""The compiled backend against float64, for each instruction set of this machine: arithmetic, and all options."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from xent import _primitives
from xent._records import RowSpec, Stats, Upstream, Wanted

native = _primitives.load("native")
assert not isinstance(native, str), native
SETS = native._native.instruction_sets()
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Rounding of one result, and of the arithmetic before it.
STATS_ERROR = {torch.float32: 8e-7, torch.bfloat16: 8e-7, torch.float16: 8e-7, torch.float64: 4e-15}
GRAD_ERROR = {torch.float32: 6e-7, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float64: 2e-15}


@pytest.fixture(params=SETS, autouse=True)
def instruction_set(request):
    before = native._native.use(request.param)
    yield request.param
    native._native.use(before)


EVERYTHING = Wanted(True, True, True)


def stats(x, y, wanted=Wanted(), class_weight=None, **spec) -> Stats:  # noqa: B008
    spec = {"classes": spec.get("start", 0) + x.shape[-1]} | spec
    return native.row_statistics(x, y, RowSpec(**spec), wanted, class_weight)


def grad(x, y, found, *g, class_weight=None, out=None, **spec):
    """`found` is what `stats` returns, or begins with it: top and lse."""
    return native.row_gradient(x, y, *found[:2], Upstream(*g), RowSpec(**spec), class_weight, out)


def expected(x, y, g=None, *, start=0, scale=1.0, softcap=None, class_weight=None, ignore_index=-100):
    """(statistics, gradient, sizes) in float64, from the definitions; g holds the four upstream vectors.

    The size of a statistic is what its rounding errors are relative to: for a sum, the sum of magnitudes.
    """
    z = scale * x.double()
    slope = torch.full_like(z, scale)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
        slope = scale * (1 - (z / softcap) ** 2)
    w = torch.ones(x.shape[1], dtype=torch.float64) if class_weight is None else class_weight.double()
    keep = torch.ones(len(x), dtype=torch.bool)
    if y.is_floating_point():
        t = y.double() * w
    else:
        keep = y != ignore_index
        t = (torch.arange(x.shape[1]) + start == y[:, None]).double()
    top = z.amax(1)
    u = z - top[:, None]
    lse = u.exp().sum(1).log()
    log_p = u - lse[:, None]
    p = log_p.exp()
    p_log_p = torch.where(p > 0, p * log_p, 0)
    picked = torch.where(t != 0, t * u, 0).sum(1)
    wsum = torch.where(w != 0, w * u, 0).sum(1)
    mass = t.sum(1) if y.is_floating_point() else None
    found = [top, lse, picked, mass, wsum, -p_log_p.sum(1), z.argmax(1)]
    found = Stats(*[None if f is None else torch.where(keep, f, -(i == 6)) for i, f in enumerate(found)])
    sizes = Stats(*[None if f is None else f.abs().clamp(min=1) for f in found])
    sizes = sizes._replace(picked=1 + picked.abs(), wsum=1 + wsum.abs())
    if g is None:
        return found, None, sizes
    a, b, c, d = (v[:, None] for v in g)
    return found, torch.where(keep[:, None], (a * p - d * p_log_p + b * t + c * w) * slope, 0), sizes


def close(actual, truth, size, tolerance, what):
    assert actual.isfinite().all(), what
    error = (actual.double() - truth).abs() / size
    assert error.max() <= tolerance, f"{what}: {error.max():.2e} > {tolerance:.2e}"


def rows_close(actual, truth, tolerance, what):
    """The norm of each row's error relative to that of the row."""
    assert actual.isfinite().all(), what
    error = (actual.double() - truth).norm(dim=1) / truth.norm(dim=1).clamp(min=1e-30)
    assert error.max() <= tolerance, f"{what}: {error.max():.2e} > {tolerance:.2e}"


# ------------------------------------------------------------------------------------------------- one number


def native_exp(t):
    out = torch.empty_like(t)
    native._native.exp(t.data_ptr(), out.data_ptr(), t.numel(), t.itemsize)
    return out


def test_exp32():
    negative = torch.arange(0x80000000 - 2**32, 0xC2AEA8F6 - 2**32, 499, dtype=torch.int32).view(torch.float32)
    positive = torch.arange(0, 0x42B00000, 499, dtype=torch.int32).view(torch.float32)
    assert negative.min() < -87.3
    assert positive.max() > 87.9
    for t in (negative, positive):
        truth = torch.exp(t.double())
        ulp = 2.0 ** (torch.frexp(truth).exponent - 24.0)
        assert ((native_exp(t).double() - truth).abs() / ulp).max() <= 1.3


def test_exp64():
    if np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("no type here is more precise than float64")
    t = torch.cat([torch.linspace(-708.3, 709, 1_000_001), -torch.logspace(-300, 2, 100_001)]).double()
    t += torch.rand(len(t), dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * t * 1e-9
    truth = np.exp(t.numpy().astype(np.longdouble))
    ulp = np.spacing(truth.astype(np.float64)).astype(np.longdouble)
    assert (np.abs(native_exp(t).numpy() - truth) / ulp).max() <= 1.8


@pytest.mark.parametrize(("dtype", "lowest"), [(torch.float32, -87.33), (torch.float64, -708.39)])
def test_exp_of_special_numbers(dtype, lowest):
    inf, nan = float("inf"), float("nan")
    t = torch.tensor([-0.0, 0.0, -inf, lowest - 0.01, -1e30, nan, -nan] * 5, dtype=dtype)  # in the tail of a vector too
    assert native_exp(t).nan_to_num(7).tolist() == [1, 1, 0, 0, 0, 7, 7] * 5
    smallest = native_exp(torch.tensor([lowest + 0.001], dtype=dtype)).item()
    assert smallest >= torch.finfo(dtype).tiny


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_exactly(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    found = stats(torch.stack([x, 0 * x.nan_to_num()], 1), torch.zeros(2**16, dtype=torch.int64))
    assert torch.equal((found.top + found.picked).nan_to_num(1e9), x.double().nan_to_num(1e9))
    assert torch.equal(found.top, torch.where(x.isfinite(), x.double(), 0).clamp(min=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_results_are_rounded_to_even(dtype):
    numbers = torch.arange(-(2**31), 2**31, 2**12 - 1, dtype=torch.int64).to(torch.int32).view(torch.float32)
    exact = torch.arange(-(2**15), 2**15 - 1, dtype=torch.int16).view(dtype).float()
    ties = (exact[:-1] + exact[1:]) / 2
    v = torch.cat([numbers, exact, ties[ties.isfinite()], torch.tensor([65519.99, 65520.0, -65520.0])])
    x = torch.zeros(len(v), 1, dtype=dtype)
    zeros = torch.zeros(len(v), dtype=torch.float64)
    d = grad(x, zeros.long(), (zeros, zeros), zeros, v.double())[:, 0]
    assert torch.equal(d.isnan(), v.isnan())
    assert torch.equal(d.nan_to_num(7), v.to(dtype).nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_softcap_keeps_the_digits_of_small_logits(dtype):
    x = torch.logspace(-6, 2, 4001, dtype=torch.float64).to(dtype)[:, None] * torch.tensor([[1, -1]], dtype=dtype)
    top, _, picked, *_ = stats(x, torch.ones(len(x), dtype=torch.int64), softcap=5.0)
    truth = 5 * torch.tanh(x[:, 0].double() / 5)
    assert torch.equal(picked, -2 * top)
    assert (top / truth - 1).abs().max() < 4 * torch.finfo(dtype).eps


# ------------------------------------------------------------------------------------------------- all options


def problem(dtype, kind, shape=(7, 1061), seed=0):
    """Logits of a spread that matters, with planted peaks; targets on a peak, off it, first and last class."""
    N, C = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    x[torch.arange(N), torch.arange(N) * 97 % C] += 12
    y = torch.randint(0, C, (N,), generator=generator)
    y[:5] = torch.tensor([0, 97 % C, C - 1, -100, 0])[:N]
    if kind in (torch.int32, torch.int64):
        return x.to(dtype), y.to(kind), torch.randn(4, N, generator=generator, dtype=torch.float64)
    q = torch.rand(shape, generator=generator) ** 8
    q[:, ::3] = 0
    q = (q / q.sum(1, keepdim=True)).to(dtype if kind == "same" or dtype == torch.float64 else torch.float32)
    return x.to(dtype), q, torch.randn(4, N, generator=generator, dtype=torch.float64)


OPTIONS = [{}, {"scale": 0.37}, {"softcap": 5.0}, {"scale": 1.7, "softcap": 30.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, "same", "float32"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, kind, options):
    for weighted, all_wanted in itertools.product((False, True), (False, True)):
        x, y, g = problem(dtype, kind)
        weight = torch.rand(x.shape[1]).to(x.double().dtype if dtype == torch.float64 else torch.float32)
        weight[::5] = 0
        chosen = options | ({"class_weight": weight} if weighted else {})
        truth, d_truth, sizes = expected(x, y, g if all_wanted else g * torch.tensor([1, 1, 0, 0])[:, None], **chosen)
        found = stats(x, y, Wanted(all_wanted, all_wanted, all_wanted), **chosen)
        for name, value, true, size in zip(Stats._fields, found, truth, sizes, strict=True):
            if value is not None:
                close(value, true, size, STATS_ERROR[dtype], name)
        assert (found.wsum is None) == (found.entropy is None) == (found.argmax is None) == (not all_wanted)
        d = grad(x, y, found, *(g if all_wanted else g[:2]), **chosen)
        assert d.dtype == dtype
        assert d.is_contiguous()
        check_gradient(d, d_truth, y, GRAD_ERROR[dtype] * (4 if "softcap" in options else 1))


def check_gradient(d, truth, y, tolerance):
    if y.is_floating_point():
        return rows_close(d, truth, tolerance, "gradient")
    row, column = (y != -100).nonzero()[:, 0], y[y != -100].long()
    at_target, true = d[row, column].double(), truth[row, column]
    assert ((at_target - true).abs() <= tolerance * true.abs()).all(), "at the target"
    rest, true = d[row].clone(), truth[row].clone()
    rest[torch.arange(len(row)), column] = true[torch.arange(len(row)), column] = 0
    rows_close(rest, true, tolerance, "besides the target")
    assert (d[y == -100] == 0).all()
    return None
