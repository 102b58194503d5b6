"""The compiled backend where inputs are awkward: infinities, ignored rows, strides, shards, wrong calls."""

from __future__ import annotations

import re

import pytest
import torch
from test_native import (
    DTYPES,
    EVERYTHING,
    GRAD_ERROR,
    STATS_ERROR,
    check_gradient,
    close,
    expected,
    grad,
    instruction_set,
    native,
    problem,
    rows_close,
    stats,
)

from xent._records import Wanted

assert instruction_set  # a fixture: every test here runs on every instruction set
INF, NAN = float("inf"), float("nan")


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_count_nothing_whatever_they_hold(dtype):
    x, y, g = problem(dtype, torch.int64)
    x[3] = torch.tensor([NAN, INF] * x.shape[1])[: x.shape[1]]
    assert y[3] == -100
    found = stats(x, y, EVERYTHING)
    assert [f[3].item() for f in found if f is not None] == [0, 0, 0, 0, 0, -1]
    assert found.lse.isfinite().all()
    for out in (None, x.clone()):
        d = grad(x, y, found, *g, out=out)
        assert d[3].eq(0).all()
        assert d.isfinite().all()


@pytest.mark.parametrize("kind", [torch.int64, "same"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_equals_fresh(dtype, kind):
    for options in ({}, {"scale": 0.5}, {"softcap": 5.0}):
        x, y, g = problem(dtype, kind)
        found = stats(x, y, **options)
        fresh = grad(x, y, found, *g, **options)
        assert grad(x, y, found, *g, out=x, **options) is x
        assert torch.equal(x, fresh)


@pytest.mark.parametrize("shape", [(6, 2100), (3, 70_000)], ids=str)  # several chunks of a row; several parts
def test_blocks_of_minus_infinity(shape):
    x, y, g = problem(torch.float32, torch.int64, (shape[0], shape[1]))
    half = shape[1] * 2 // 3
    x[0, :half] = x[1, half:] = x[2, 5:] = -INF
    y[:3] = torch.tensor([shape[1] - 1, 0, 3])
    truth = expected(x, y)[0]
    found = stats(x, y, Wanted(entropy=True, argmax=True))
    assert (found.lse - truth.lse).abs().max() < 1e-5
    assert (found.entropy - truth.entropy).abs().max() < 1e-5
    assert torch.equal(found.argmax, truth.argmax)
    truth = expected(x, y, g * double(1, 1, 0, 1)[:, None])[1]
    rows_close(grad(x, y, found, g[0], g[1], None, g[3]), truth, 2e-6, "gradient")


@pytest.mark.parametrize("shape", [(2, 1500), (2, 70_000)], ids=str)
def test_rows_that_are_infinite_or_nan(shape):
    x = torch.randn(shape)
    x[0] = -INF
    y = torch.tensor([0, 1])
    assert stats(x, y).lse[0] == -INF
    assert stats(x, y).lse[1].isfinite()
    for bad in (INF, NAN):
        for place in (0, 700, shape[1] - 1):
            x[1] = -INF if place else 0.0
            x[1, place] = bad
            assert stats(x, y, EVERYTHING).lse[1].isnan()


@pytest.mark.parametrize("shape", [(40, 1500), (5, 70_000)], ids=str)
def test_argmax_is_torchs(shape):
    x = torch.randint(-9, 9, shape).float()  # full of ties
    x[0] = -INF
    x[1, [600, 601, shape[1] - 1]] = NAN
    x[2, 700:] = 50.0
    x[2, 900] = NAN
    x[3, 300], x[3, 1400] = 50.0, 50.0
    x[4, shape[1] - 2] = NAN
    assert torch.equal(stats(x, torch.zeros(len(x)).long(), EVERYTHING).argmax, x.argmax(1))


def test_a_coefficient_of_zero_beats_infinity():
    x = torch.tensor([[-INF, 1.0, 2.0] * 10])
    q = torch.tensor([[0.0, 0.5, 0.5] * 10])
    found = stats(x, q, Wanted(wsum=True), q[0])
    assert (found.top.item(), found.picked.item(), found.mass.item(), found.wsum.item()) == (2.0, -2.5, 5.0, -5.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("far", [False, True], ids=["a large offset", "half of what the dtype can hold"])
def test_a_common_offset_costs_no_digits(dtype, far):
    offset = torch.finfo(dtype).min / 2 if far else 1e4 if dtype in (torch.float32, torch.float64) else 100
    x, y, g = problem(dtype, torch.int64)
    x = (x.double() + offset).to(dtype)
    truth, d_truth, sizes = expected(x, y, g)
    found = stats(x, y, EVERYTHING)
    for name in ("top", "lse", "picked", "wsum", "entropy"):
        close(getattr(found, name), getattr(truth, name), getattr(sizes, name), STATS_ERROR[dtype], name)
    check_gradient(grad(x, y, found, *g), d_truth, y, GRAD_ERROR[dtype])


def test_a_confident_target_keeps_its_gradient():
    x = torch.zeros(2, 1000)
    x[:, 7] = double(20.0, 30.0)
    y = torch.tensor([7, 7])
    # 1 - p is 2e-6, and 1e-10: p rounded to float32 has one digit of the first, and nothing of the second.
    d = grad(x, y, expected(x, y)[0], double(1, 1), double(-1, -1))
    truth = expected(x, y, double(1, 1, -1, -1, 0, 0, 0, 0).view(4, 2))[1]
    assert (d[:, 7] / truth[:, 7] - 1).abs().max() < 1e-5  # what float64 itself has left of 1e-10


# ------------------------------------------------------------------------------------------------- layout


def test_shards_add_up():
    x, y, _ = problem(torch.float32, torch.int64)
    y[3] = 5
    cut, C = 400, x.shape[1]
    a, b = stats(x[:, :cut], y, classes=C), stats(x[:, cut:], y, start=cut, classes=C)
    whole = stats(x, y)
    assert torch.equal(torch.where(y < cut, a.top + a.picked, b.top + b.picked), whole.top + whole.picked)
    assert (a.picked[y >= cut] == 0).all()
    assert (b.picked[y < cut] == 0).all()
    assert (torch.logaddexp(a.top + a.lse, b.top + b.lse) - (whole.top + whole.lse)).abs().max() < 1e-6
    g = torch.randn(2, len(y), dtype=torch.float64)
    parts = [grad(x[:, :cut], y, whole, *g), grad(x[:, cut:], y, whole, *g, start=cut)]
    assert torch.equal(torch.cat(parts, 1), grad(x, y, whole, *g))


def test_any_row_stride():
    x, y, g = problem(torch.float32, torch.int64)
    q = problem(torch.float32, "same")[1]
    truth, d = stats(x, y), grad(x, y, stats(x, y), *g)
    wide, wide_q = torch.full((len(x), 2000), NAN), torch.full((len(x), 1500), NAN)
    wide[:, 3 : 3 + x.shape[1]], wide_q[:, : x.shape[1]] = x, q
    view, q_view = wide[:, 3 : 3 + x.shape[1]], wide_q[:, : x.shape[1]]
    y_view, g_view = torch.stack([y, y + 1], 1)[:, 0], g.t().contiguous().t()
    assert torch.equal(stats(view, y_view).lse, truth.lse)
    assert torch.equal(stats(view, q_view).picked, stats(x, q).picked)
    assert torch.equal(grad(view, y_view, truth, *g_view), d)
    assert grad(view, y_view, truth, *g_view, out=view) is view
    assert torch.equal(view, d)
    assert wide[:, :3].isnan().all()
    assert wide[:, 3 + x.shape[1] :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_class_stride(dtype):
    x, y, g = problem(dtype, torch.int64, (37, 1061))
    apart, weight = x.new_zeros(len(x), 3 * x.shape[1])[:, ::3].copy_(x), torch.rand(x.shape[1])
    for view in (x.t().contiguous().t(), apart):
        options = {"softcap": 5.0, "class_weight": weight}
        found, expected = stats(view, y, EVERYTHING, **options), stats(x, y, EVERYTHING, **options)
        for a, b in zip(found, expected, strict=True):
            if a is not None:  # the chunks' maxima, and so their sums, are found in another order
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        d = grad(x, y, expected, *g, **options)
        assert torch.equal(grad(view, y, expected, *g, **options), d)
        assert torch.equal(grad(x, y, expected, *g, out=torch.empty_like(view), **options), d)
        assert grad(view, y, expected, *g, out=view, **options) is view
        assert torch.equal(view, d)
    assert apart._base.view(len(x), -1, 3)[:, :, 1:].eq(0).all()


@pytest.mark.parametrize("of_target", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_probabilities_of_any_dtype_and_stride(dtype, of_target):
    x, q, g = problem(dtype, "float32")
    q = q.to(of_target)
    converted = q.to(torch.float64 if dtype == torch.float64 else torch.float32)
    found = stats(x, converted)
    for view in (q, q.t().contiguous().t(), q.new_zeros(len(x), 3 * x.shape[1])[:, ::3].copy_(q)):
        assert torch.equal(stats(x, view).picked, found.picked)
        assert torch.equal(stats(x, view).mass, found.mass)
        assert torch.equal(grad(x, view, found, *g[:2]), grad(x, converted, found, *g[:2]))


def test_stride_0_is_read():
    row, one = torch.randn(1, 700), double(0.5)
    x, y = row.expand(5, -1), torch.tensor([1, 2, 3, 4, 5])
    found = stats(x, y)
    assert torch.equal(found.lse, stats(x.contiguous(), y).lse)
    d = grad(x, y, found, one.expand(5), -one.expand(5))
    assert torch.equal(d, grad(x.contiguous(), y, found, one.repeat(5), -one.repeat(5)))


def test_a_row_in_parts_is_the_same_row():
    x, y, g = problem(torch.float32, torch.int64, (7, 140_001))
    few, many = stats(x, y, EVERYTHING), stats(x.repeat(3, 1), y.repeat(3), EVERYTHING)  # more than 16 rows: no parts
    for a, b in zip(few, many, strict=True):
        if a is not None:
            assert (a - b[:7]).abs().max() <= 1e-7 * b.abs().max()
    d = grad(x.repeat(3, 1), y.repeat(3), (few.top.repeat(3), few.lse.repeat(3)), *g.repeat(1, 3))
    assert torch.equal(grad(x, y, few, *g), d[:7])


def test_few_rows_of_very_many_classes():
    x = torch.randn(1, 600_000).expand(16, -1)  # as many rows and parts as there may be
    found = stats(x, torch.arange(16))
    u = x[0].double() - x[0].max()
    assert (found.lse - torch.logsumexp(u, 0)).abs().max() < 1e-6
    assert torch.equal(found.top + found.picked, x[0, :16].double())


@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (0, 1), (3, 0)], ids=str)
def test_empty_and_single(shape):
    x, y = torch.ones(shape), torch.full((shape[0],), -100)
    found = stats(x, y, EVERYTHING)
    assert found.top.tolist() == found.lse.tolist() == [0.0] * shape[0]
    assert grad(x, y, found, found.lse, found.lse).shape == shape


# ------------------------------------------------------------------------------------------------- wrong calls


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_targets_out_of_range(dtype):
    x, y = torch.randn(4, 5), torch.tensor([0, -100, 4, 7], dtype=dtype)
    with pytest.raises(IndexError, match=r"expected class indices in \[0, 5\) or ignore_index=-100, got 7"):
        stats(x, y)
    y[3] = -1
    with pytest.raises(IndexError, match="got -1"):
        stats(x, y)
    assert stats(x, torch.tensor([8, 3, 5, 9], dtype=dtype), start=5, classes=10).picked[1] == 0


x, y = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
negated = torch.complex(x, -x).conj().imag


@pytest.mark.parametrize(
    ("logits", "target", "reason"),
    [
        (x.to("meta"), y, "CPU"),
        (x, y.to("meta"), "CPU"),
        (x.to_sparse(), y, "strided"),
        (x.to(torch.complex64), y, "float32, bfloat16"),
        (x.int(), y, "float32, bfloat16"),
        (x[0], y, r"shape \(N, C\)"),
        (negated, y, "negated"),
        (x, y[:3], r"shape \(4,\)"),
        (x, y[:, None], r"shape \(4,\)"),
        (x, y.short(), "int64 and int32"),
        (x, x[:, :3], r"shape of the logits \(4, 5\)"),
        (x, x.to(torch.float8_e4m3fn), "probabilities in the dtypes of logits"),
        (x, negated, "negated"),
    ],
)
def test_refusals(logits, target, reason):
    assert re.search(reason, native.refusal(logits, target))
    with pytest.raises(TypeError, match=reason):
        stats(logits, target)
    with pytest.raises(TypeError, match=reason):
        grad(logits, target, (v, v), v, v)


v = double(1, 2, 3, 4)
big = torch.randn(8, 10)


@pytest.mark.parametrize(
    ("arguments", "options", "reason"),
    [
        (((v[:3], v), v, v), {}, "top: expected"),
        (((v, v[:3]), v, v), {}, "lse: expected"),
        (((v, v), v[:, None], v), {}, "g_lse: expected"),
        (((v, v), v, v.to("meta")), {}, "g_picked: expected"),
        (((v, v), v, v, v[:1]), {}, "g_wsum: expected"),
        (((v, v), v, v, None, v[:1]), {}, "g_entropy: expected"),
        (((v, v), v, v), {"class_weight": torch.ones(4)}, "class_weight: expected"),
        (((v, v), v, v), {"out": x.double()}, "out: expected"),
        (((v, v), v, v), {"out": x[:3]}, "out: expected"),
        (((v, v), v, v), {"out": x.to("meta")}, "out: expected"),
        (((v, v), v, v), {"out": x[:1].expand(4, 5)}, "apart from each other"),
        (((v, v), v, v), {"out": x[:, :1].expand(4, 5)}, "apart from each other"),
        (((v, v), v, v), {"out": torch.as_strided(torch.randn(30), (4, 5), (3, 1))}, "apart from each other"),
    ],
)
def test_wrong_arguments_raise(arguments, options, reason):
    with pytest.raises(ValueError, match=reason):
        grad(x, y, *arguments, **options)


def test_overlapping_memory_is_refused():
    with pytest.raises(ValueError, match="memory of its own"):
        grad(big[:4, :5], y, (v, v), v, v, out=big[1:5, :5])
    with pytest.raises(ValueError, match="memory of its own"):
        grad(big[:4, :5], y, (v, v), v, v, out=big.view(-1)[:20].view(4, 5))  # the same start, other rows
    with pytest.raises(ValueError, match="memory of its own"):
        grad(x, big[:4, :5], (v, v), v, v, out=big[:4, :5])


def test_a_tensor_without_storage_raises():
    freed = torch.randn(4, 5)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="storage"):
        stats(freed, y)
    with pytest.raises(ValueError, match="storage"):
        grad(freed, y, (v, v), v, v)
    with pytest.raises(ValueError, match="storage"):
        grad(x, y, (v, v), v, v, out=freed)
    freed.untyped_storage().resize_(80)  # torch itself crashes when pytest prints such a tensor


def test_other_dtypes_of_row_vectors_are_converted():
    found = stats(x, y)
    assert torch.equal(grad(x, y, found, v.float(), -v.half()), grad(x, y, found, v, -v))
    assert torch.equal(grad(x, y, found, v, torch.complex(v, v).conj().imag), grad(x, y, found, v, -v))


def test_the_module_checks_its_own_arguments():
    module = native._native
    with pytest.raises(TypeError, match="expected 24 arguments, got 1"):
        module.statistics(1)
    with pytest.raises(TypeError, match="expected 33 arguments, got 0"):
        module.gradient()
    with pytest.raises(TypeError):
        module.statistics(*["?"] * 24)
    with pytest.raises(ValueError, match="expected an instruction set of this machine, got 'mmx'"):
        module.use("mmx")
