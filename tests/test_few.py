"""The mean of few logits in one call: the same numbers as those of the two primitives, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import xent
from xent import _primitives

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


def by_two(x: Tensor, y: Tensor, upstream: float, divisor: float, **reading: Any) -> tuple[Tensor, Tensor]:
    stats = native.lse_and_pick(
        x, y, start=0, classes=x.shape[1], class_weight=None, want_wsum=False, want_entropy=False, want_argmax=False,
        **reading,
    )  # fmt: skip
    share = torch.tensor(upstream, dtype=torch.float64) / divisor
    grad = native.logits_grad(
        x, y, stats.lse, share.expand(len(x)), (-share).expand(len(x)), None, None, start=0, class_weight=None,
        out=None, **reading,
    )  # fmt: skip
    return (stats.lse - stats.picked).sum() / divisor, grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reading", [{}, {"scale": 0.5, "softcap": 2.0, "ignore_index": 3}], ids=str)
def test_equals_the_two_primitives(layout: str, dtype: torch.dtype, reading: dict[str, Any]) -> None:
    x, y = problem(layout, dtype)
    reading = {"ignore_index": -100, "scale": 1.0, "softcap": None} | reading
    y[0], y[-1] = 1, reading["ignore_index"]
    for index in (y, y.int()):
        for divisor in (None, 2.5):
            counted = divisor or float((y != reading["ignore_index"]).sum())
            expected, expected_grad = by_two(x, index, 0.7, counted, **reading)
            options = {"divisor": divisor, "least": 0, **reading}
            assert native.mean_of_few(x, index, upstream=None, out=None, **options).equal(expected)
            grad = native.mean_of_few(x, index, upstream=0.7, out=None, **options)
            assert grad.equal(expected_grad)
            assert grad.is_contiguous()
    over = x.as_strided(x.shape, x.stride())
    grad = native.mean_of_few(x, y, upstream=0.7, out=over, divisor=2.5, least=0, **reading)
    assert grad is over
    assert x.equal(expected_grad)


@pytest.mark.parametrize(("divisor", "least", "loss"), [(None, 0, "nan"), (None, 1, "0.0"), (4.0, 0, "0.0")])
def test_nothing_counts(divisor: float | None, least: int, loss: str) -> None:
    x, y = problem("contiguous")
    x[:] = torch.nan
    found, grad = (
        _primitives.mean_of_few(x, y.fill_(-100), divisor=divisor, least=least, upstream=upstream)
        for upstream in (None, 1.0)
    )
    assert str(found.item()) == loss
    assert grad.count_nonzero() == 0


def test_refusals() -> None:
    x, y = problem("contiguous")
    assert _primitives.mean_of_few(torch.zeros(2049, 32), torch.zeros(2049).long(), divisor=None, least=0) is None
    assert _primitives.mean_of_few(torch.zeros(0, 3), torch.zeros(0).long(), divisor=None, least=0) is None
    y[4] = 33
    with pytest.raises(IndexError, match=r"expected class indices in \[0, 33\) or ignore_index=-100, got 33 \(row 4"):
        _primitives.mean_of_few(x, y, divisor=None, least=0, upstream=1.0, out=x)
    assert x.equal(problem("contiguous")[0]), "a target is checked before anything is written"
    others = {"divisor": None, "least": 0, "ignore_index": -100, "scale": 1.0, "softcap": None}
    for wrong, out, error in (
        (x, None, TypeError),  # probabilities
        (y[1:], None, TypeError),
        (y, x[1:], ValueError),
        (y, x.double(), ValueError),
    ):
        with pytest.raises(error):
            native.mean_of_few(x, wrong, upstream=1.0, out=out, **others)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_small_mean_is_two_calls(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in forward, one in backward, whatever the upstream gradient; neither primitive."""
    x, y = problem("contiguous")
    _, expected = by_two(x, y, 0.7, 6.0, ignore_index=-100, scale=1.0, softcap=None)
    calls = []
    one_call = native.mean_of_few
    monkeypatch.setattr(
        native, "mean_of_few", lambda *args, **kwargs: calls.append(kwargs) or one_call(*args, **kwargs)
    )
    monkeypatch.setattr(native, "lse_and_pick", None)
    monkeypatch.setattr(native, "logits_grad", None)
    leaf = x.clone().requires_grad_()
    loss = xent.cross_entropy(leaf * 1, y, on_empty="zero", inplace_backward=inplace)
    assert loss.dtype == torch.float32
    (loss * 0.7).backward()
    assert [call["upstream"] for call in calls] == [None, pytest.approx(0.7)]
    assert [call["out"] is not None for call in calls] == [False, inplace]
    torch.testing.assert_close(leaf.grad, expected)
