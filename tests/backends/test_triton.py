"""What is the triton backend's own: rows cut into vectors, shared among programs; what it refuses; the range check.

How rows may lie in memory is in test_triton_layouts.py.

The rest is the suite of the primitives, which it passes in Triton's interpreter:

    TRITON_INTERPRET=1 XENT_BACKEND=triton python -m pytest tests/backends/test_primitives{,_edges}.py
"""

from __future__ import annotations

import os
from typing import Any

import oracle
import pytest
import torch
from oracle import EVERYTHING, NOTHING, Upstream, assert_stats, each, every_dtype, rows, truth_for, upstream
from pairs import pairwise
from test_primitives import CASES, build
from torch import Tensor

if os.environ.get("XENT_BACKEND") != "triton":  # where it is asked for and missing, that is a failure
    pytest.importorskip("triton")

from xent._backends import eager
from xent._backends import triton as backend
from xent._backends.triton import plan
from xent._records import RowNumbers, RowSpec, Samples, Stats, Wanted

interpreted = pytest.mark.skipif(
    not (backend.INTERPRETED and os.environ.get("XENT_BACKEND") == "triton"),
    reason="needs TRITON_INTERPRET=1 XENT_BACKEND=triton",
)


def stats_of(x: Tensor, target: Tensor, wanted: Wanted = NOTHING, **spec: Any) -> Stats:
    """The statistics of rows (N, C)."""
    found = backend.row_statistics(x[None], target[None], RowSpec(classes=x.shape[1], **spec), wanted, None)
    stats: Stats = each(lambda stat: stat[0], found)
    return stats


def grad_of(x: Tensor, target: Tensor, stats: Stats, g: Upstream, out: Tensor | None = None) -> Tensor:
    """The gradient of rows (N, C)."""
    numbers = each(lambda number: number[None], RowNumbers(stats.top, stats.lse, *g))
    out = None if out is None else out[None]
    return backend.row_gradient(x[None], target[None], numbers, RowSpec(), None, out)[0]


def agree(x: Tensor, target: Tensor, out: Tensor | None = None) -> None:
    """Both primitives, all of their results, against the truth."""
    got, truth = stats_of(x, target, EVERYTHING), truth_for(x, target)
    assert_stats(got, truth, x, target)
    g = upstream(len(x))
    expected = oracle.gradient(x, target, truth, g)
    grad = grad_of(x, target, got, g, out=out)
    oracle.assert_grad(grad, expected, None if target.is_floating_point() else target, slack=2)


@interpreted
@every_dtype
@pytest.mark.parametrize("C", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_every_footing(offset: int, C: int, dtype: torch.dtype) -> None:
    """Rows that begin and end anywhere within a vector, and rows that are shorter than one."""
    x, y = rows(dtype, N=9, C=C)
    memory = torch.full((offset + x.numel() + 16,), torch.nan, dtype=dtype)
    own = memory[offset : offset + x.numel()].view_as(x).copy_(x)
    agree(own, y)
    agree(own, y, out=own)
    assert memory[:offset].isnan().all()
    assert memory[offset + x.numel() :].isnan().all()


@interpreted
@pytest.mark.parametrize("steps", [(1, 0), (0, 1), (3, 2)], ids=str)
@every_dtype
def test_gradient_out_of_step(steps: tuple[int, int], dtype: torch.dtype) -> None:
    """The result's rows begin elsewhere within their vectors than the logits' do, by base address or by stride."""
    x, y = rows(dtype, N=5, C=40)
    wide = torch.full((5 * (40 + steps[1]) + 8,), torch.nan, dtype=dtype)
    out = wide[steps[0] :].as_strided((5, 40), (40 + steps[1], 1), steps[0])
    agree(x, y, out=out)
    assert wide.isnan().sum() == len(wide) - 200


@interpreted
@pytest.mark.parametrize("target_dtype", oracle.ALL_DTYPES, ids=str)
@pytest.mark.parametrize("step", [0, 1])
@every_dtype
def test_probabilities_out_of_step(step: int, dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    x, q = rows(dtype, N=3, C=41, soft=True)
    memory = torch.empty(q.numel() + step, dtype=target_dtype)
    agree(x, memory[step:].view_as(q).copy_(q))


@interpreted
@pytest.mark.parametrize("processors", [1, 7, 132])
@pytest.mark.parametrize("soft", [False, True])
def test_rows_in_parts(processors: int, soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many programs share a row, and whatever is in their parts: -inf, the target, the first of the largest."""
    monkeypatch.setattr(backend, "processors", lambda device: processors)
    x, target = rows(torch.float32, N=3, C=12 * 2048 + 5, soft=soft)
    x[0, 100:9000] = -torch.inf
    x[1, [5000, 20000, 24000]] = 40
    x[2, :20000] = -torch.inf
    if soft:
        target = target.masked_fill(x == -torch.inf, 0)
        got, truth = stats_of(x, target, Wanted(entropy=True, argmax=True)), truth_for(x, target)
        assert_stats(got, truth, x, target)
        return
    target = torch.tensor([x.shape[1] - 1, 5000, 20001])
    got, truth = stats_of(x, target, Wanted(entropy=True, argmax=True)), truth_for(x, target)
    assert_stats(got, truth, x, target)
    assert got.argmax is not None
    assert got.argmax[1] == 5000
    g = upstream(3, wsum=False)
    expected = oracle.gradient(x, target, truth, g)
    oracle.assert_grad(grad_of(x, target, got, g, out=x), expected, target)  # in place: no two programs share a logit


@interpreted
@pairwise(case=CASES, dtype=oracle.ALL_DTYPES, layout=["rows", "images"], ignored=[False, True])
def test_parts_of_every_case(
    case: oracle.Options, dtype: torch.dtype, layout: str, ignored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is asked of a row, against eager: with -inf in it, and the last of its parts shorter."""
    monkeypatch.setattr(backend, "processors", lambda device: 132)
    monkeypatch.setattr(plan, "TILE", 32)
    C = {"rows": 301, "images": 45}[layout]
    x, target, weight, reading = build(dtype, case, C)
    x, target = x[:3].view(1, 3, C), target[:3][None]
    x[0, 2, C // 2 :] = -torch.inf / reading.get("scale", 1)
    if ignored and not target.is_floating_point():
        target[0, 1] = -100
        x[0, 1] = torch.nan
    x = x.mT.contiguous().mT if layout == "images" else x
    config = plan.configure(x, target, weight, 1.0, None)
    assert plan.share(config, plan.stretches(config, 1, 3), C, 132)[0] > 1
    spec = RowSpec(classes=C + 20, **reading)
    found, truth = (module.row_statistics(x, target, spec, EVERYTHING, weight) for module in (backend, eager))
    rough = {"rtol": 1e-5, "atol": 1e-5} if dtype != torch.float64 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found.pack(), truth.pack(), equal_nan=True, **rough)
    numbers = RowNumbers(truth.top, truth.lse, *each(lambda number: number[None], upstream(3)))
    grad, expected = (m.row_gradient(x, target, numbers, spec, weight, None).double() for m in (backend, eager))
    tolerance = oracle.TOLERANCE[dtype]
    torch.testing.assert_close(grad, expected, equal_nan=True, rtol=8 * tolerance, atol=tolerance)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_softcap_near_zero(dtype: torch.dtype) -> None:
    """Relative to the score itself, where (1 - e) / (1 + e) alone would have lost its digits; and across the seam."""
    x = torch.tensor([1e-6, -1e-4, 0.01, -0.3, 1.79, 1.81, 5, -80, 0], dtype=dtype)[:, None].repeat(1, 3)
    got = stats_of(x, torch.ones(len(x), dtype=torch.int64), softcap=3.0)
    assert not got.picked.any()
    torch.testing.assert_close(got.top, 3 * (x[:, 1].double() / 3).tanh(), rtol=oracle.TOLERANCE[dtype], atol=0)


@interpreted
def test_peak_at_the_end_of_the_range() -> None:
    """From the lowest number to such a peak is farther than float32 reaches; empty sums that move there stay 0."""
    x = torch.tensor([[3e38, 0.0]])
    got = stats_of(x, torch.tensor([0]), EVERYTHING)
    assert got.wsum is not None
    assert got.entropy is not None
    assert got.top.item() == x[0, 0].item()
    assert got.lse.item() == got.picked.item() == 0
    assert got.wsum.item() == pytest.approx(-3e38)
    assert got.entropy.item() == 0


@pytest.mark.parametrize("N", [1, 2, 3, 31, 32, 33, 131, 1055, 1056, 100_000])
@pytest.mark.parametrize("C", [1, 40, 2048, 2049, 12345, 50257, 262144])
def test_shares(N: int, C: int) -> None:
    """Every vector is somebody's, nobody's share is empty of tiles, and where rows are few the device is filled."""
    x, y = torch.empty(1, 1, C).expand(1, N, C), torch.zeros(1, N, dtype=torch.int64)
    config = plan.configure(x, y, None, 1.0, None)
    splits, span = plan.share(config, plan.stretches(config, 1, N), C, processors=132)
    assert splits & (splits - 1) == 0
    assert span % config.K == 0
    vectors = -(-C // config.V) if config.across else C // config.V
    assert splits * span >= vectors
    tiles = -(-vectors // config.K)
    programs = -(-N // config.R) * splits
    assert splits == 1 or programs <= plan.PROGRAMS * 132
    assert 2 * programs > plan.PROGRAMS * 132 or 2 * splits > tiles


@interpreted
@pytest.mark.parametrize("wrong", [-1, 37, 2**40, -(2**40)])
@every_dtype
def test_target_out_of_range(wrong: int, dtype: torch.dtype) -> None:
    """Nothing is read through it, and the interpreter's tensors, being the CPU's, raise at once."""
    x, y = rows(dtype)
    y[7] = wrong
    with pytest.raises(IndexError, match=rf"\[0, 37\).*got {wrong} \(row 7 of 13\)"):
        stats_of(x, y)


@interpreted
def test_the_flag_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device the kernel's own flag goes into an assertion there, without a look from here."""
    flags: list[Tensor] = []
    monkeypatch.setattr(backend, "assert_on_device", lambda flag, *_: flags.append(flag))
    monkeypatch.setattr(backend, "_on_device", lambda logits: True)
    x, y = rows(torch.float32)
    stats_of(x, y)
    y[3] = 37
    stats_of(x, y)
    y[3] = -100
    stats_of(x, y)
    assert [bool(flag) for flag in flags] == [True, False, True]


@interpreted
def test_samples_of_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several tiles each, in the order of rows, however many of them have slots at once."""
    x, y = rows(torch.float32, N=7, C=2500)
    u, numbers = torch.rand(7).double(), stats_of(x, y)
    top, lse = numbers.top[None], numbers.lse[None]

    def samples() -> Samples:
        return backend.row_samples(x[None], y[None], top, lse, u, RowSpec(classes=2500), 1 / 64)

    whole = samples()
    expected = eager.row_samples(x[None], y[None], top, lse, u, RowSpec(classes=2500), 1 / 64)
    assert (whole.counts - expected.counts).abs().sum() <= 1
    monkeypatch.setattr(backend, "SLOTS", 3 * 67)
    assert all(map(torch.equal, samples(), whole))


def test_refusals() -> None:
    """It takes what is on a device, and the CPU's tensors only where the interpreter was asked for by name."""
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    reason = backend.refusal(x, y)
    if backend.INTERPRETED and os.environ.get("XENT_BACKEND") == "triton":
        assert reason is None
        assert "float8" in str(backend.refusal(x.to(torch.float8_e4m3fn), y))
        assert "int16" in str(backend.refusal(x, y.short()))
        assert "sparse" in str(backend.refusal(x.to_sparse(), y))
        assert "negated" in str(backend.refusal(torch.zeros(2, 3, dtype=torch.complex64).conj().imag, y))
        assert "meta" in str(backend.refusal(x.to("meta"), y))
    else:
        assert reason is not None
        assert "cpu" in reason or "interpreter" in reason
