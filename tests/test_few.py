"""The mean of few logits in one call: the same numbers as those of the two primitives, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import xent
from xent import _primitives
from xent._records import RowSpec, Upstream, Wanted

pytestmark = pytest.mark.usefixtures("unchecked")
native = _primitives.load("native")
if isinstance(native, str) and _primitives.FORCED != "native":
    pytest.skip(native, allow_module_level=True)


@pytest.fixture(autouse=True)
def on_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_primitives, "FORCED", "native")


LAYOUTS = {
    "contiguous": lambda: torch.randn(7, 33),
    "rows far apart": lambda: torch.randn(7, 50)[:, :33],
    "transposed": lambda: torch.randn(33, 7).t(),
    "few rows of many classes": lambda: torch.randn(2, 32768),
    "as many as are few": lambda: torch.randn(1 << 11, 1 << 5),
}


def problem(layout: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = LAYOUTS[layout]()
    target = torch.randint(x.shape[1], (len(x),))
    target[-1] = -100
    # Converted as it lies: `to` would make the rows of a transposed matrix contiguous.
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x), target


def by_two(x: Tensor, y: Tensor, upstream: float, divisor: float, spec: RowSpec) -> tuple[Tensor, Tensor]:
    spec = spec._replace(classes=x.shape[1])
    stats = native.row_statistics(x, y, spec, Wanted(), None)
    share = torch.tensor(upstream, dtype=torch.float64).expand(len(x)) / divisor
    grad = native.row_gradient(x, y, stats.top, stats.lse, Upstream(share, -share), spec, None, None)
    return (stats.lse - stats.picked).sum() / divisor, grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", [RowSpec(), RowSpec(3, 0.5, 2.0)], ids=["plain", "all options"])
def test_equals_the_two_primitives(layout: str, dtype: torch.dtype, spec: RowSpec) -> None:
    x, y = problem(layout, dtype)
    y[0], y[-1] = 1, spec.ignore_index
    for index in (y, y.int()):
        for divisor in (None, 2.5):
            counted = divisor or float((y != spec.ignore_index).sum())
            expected, expected_grad = by_two(x, index, 0.7, counted, spec)
            options: dict[str, Any] = {"divisor": divisor, "least": 0, "out": None}
            assert native.mean_of_few(x, index, spec, upstream=None, **options).equal(expected)
            grad = native.mean_of_few(x, index, spec, upstream=0.7, **options)
            assert grad.equal(expected_grad)
            assert grad.is_contiguous()
    over = x.as_strided(x.shape, x.stride())
    grad = native.mean_of_few(x, y, spec, upstream=0.7, out=over, divisor=2.5, least=0)
    assert grad is over
    assert x.equal(expected_grad)


@pytest.mark.parametrize(("divisor", "least", "loss"), [(None, 0, "nan"), (None, 1, "0.0"), (4.0, 0, "0.0")])
def test_nothing_counts(divisor: float | None, least: int, loss: str) -> None:
    x, y = problem("contiguous")
    x[:] = torch.nan
    found, grad = (
        _primitives.mean_of_few(x, y.fill_(-100), RowSpec(), divisor=divisor, least=least, upstream=upstream)
        for upstream in (None, 1.0)
    )
    assert str(found.item()) == loss
    assert grad.count_nonzero() == 0


def test_refusals() -> None:
    x, y = problem("contiguous")
    for shape in ((2049, 32), (0, 3)):
        many = torch.zeros(shape), torch.zeros(shape[0]).long(), RowSpec()
        assert _primitives.mean_of_few(*many, divisor=None, least=0) is None
    y[4] = 33
    with pytest.raises(IndexError, match=r"expected class indices in \[0, 33\) or ignore_index=-100, got 33 \(row 4"):
        _primitives.mean_of_few(x, y, RowSpec(), divisor=None, least=0, upstream=1.0, out=x)
    assert x.equal(problem("contiguous")[0]), "a target is checked before anything is written"
    for wrong, out, error in (
        (x, None, TypeError),  # probabilities
        (y[1:], None, TypeError),
        (y, x[1:], ValueError),
        (y, x.double(), ValueError),
    ):
        with pytest.raises(error):
            native.mean_of_few(x, wrong, RowSpec(), divisor=None, least=0, upstream=1.0, out=out)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_small_mean_is_two_calls(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in forward, one in backward, whatever the upstream gradient; neither primitive."""
    x, y = problem("contiguous")
    _, expected = by_two(x, y, 0.7, 6.0, RowSpec())
    calls = []
    one_call = native.mean_of_few
    monkeypatch.setattr(
        native, "mean_of_few", lambda *args, **kwargs: calls.append(kwargs) or one_call(*args, **kwargs)
    )
    monkeypatch.setattr(native, "row_statistics", None)
    monkeypatch.setattr(native, "row_gradient", None)
    leaf = x.clone().requires_grad_()
    loss = xent.cross_entropy(leaf * 1, y, on_empty="zero", inplace_backward=inplace)
    assert loss.dtype == torch.float32
    (loss * 0.7).backward()
    assert [call["upstream"] for call in calls] == [None, pytest.approx(0.7)]
    assert [call["out"] is not None for call in calls] == [False, inplace]
    torch.testing.assert_close(leaf.grad, expected)
