"""token_stats: what losses are built from, one number per position."""

from __future__ import annotations

import oracle
import pytest
import torch
from oracle import Options, every_dtype, loss_and_grad
from pairs import pairwise
from torch import Tensor
from torch.nn import functional as F

import xent

READINGS = [{}, {"softcap": 3.0}, {"logit_scale": -0.5}, {"softcap": 3.0, "logit_scale": 1.5}]
every_reading = pytest.mark.parametrize("reading", READINGS, ids=str)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(B, T, V) logits and (B, T) targets of which two are ignored."""
    torch.manual_seed(0)
    y = torch.randint(7, (3, 5))
    y[0, 0] = y[2, 4] = -100
    return torch.randn(3, 5, 7, dtype=torch.float64).to(dtype), y


def truth_for(x: Tensor, y: Tensor, logit_scale: float = 1.0, softcap: float | None = None) -> oracle.Truth:
    """Statistics of each position, each of the target's shape."""
    z = oracle.scores(x, logit_scale, softcap).reshape(-1, 7)
    return oracle.each(lambda stat: stat.view(3, 5), oracle.statistics(z, y.reshape(-1)))


@every_dtype
@every_reading
def test_values(reading: Options, dtype: torch.dtype) -> None:
    x, y = batch(dtype)
    got, truth = xent.token_stats(x, y, entropy=True, prediction=True, **reading), truth_for(x, y, **reading)
    keep = y != -100
    expected = {
        "log_prob": (truth.picked - truth.lse).where(keep, 0),
        "lse": (truth.top + truth.lse).where(keep, 0),
        "entropy": truth.entropy.where(keep, 0),
    }
    for name, value in expected.items():
        found = getattr(got, name)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found.shape == (3, 5)
        assert not found[~keep].any()
        oracle.assert_loss(found, value)
    assert got.prediction is not None
    assert got.prediction.dtype == torch.int64
    assert got.prediction.equal(truth.argmax.where(keep, -1))
    assert not got.prediction.requires_grad


@pairwise(name=["log_prob", "lse", "entropy"], reading=READINGS, dtype=oracle.ALL_DTYPES)
def test_gradients(name: str, reading: Options, dtype: torch.dtype) -> None:
    """Each by itself: an output that nobody uses changes nothing."""
    x, y = batch(dtype)

    def truth(x: Tensor) -> Tensor:
        stats = truth_for(x, y, **reading)
        values = {"log_prob": stats.picked - stats.lse, "lse": stats.top + stats.lse, "entropy": stats.entropy}
        return values[name] * (y != -100)

    _, grad = loss_and_grad(lambda x: getattr(xent.token_stats(x, y, entropy=name == "entropy", **reading), name), x)
    oracle.assert_grad(grad, loss_and_grad(truth, x.double())[1], y)


def test_only_what_is_asked_for() -> None:
    got = xent.token_stats(*batch())
    assert got.entropy is None
    assert got.prediction is None
    assert got._fields == ("log_prob", "lse", "entropy", "prediction")


@pytest.mark.parametrize(
    ("shape", "target", "dim"),
    [
        ((7,), (), None),
        ((3, 7), (3,), None),
        ((3, 7, 5), (3, 5), None),
        ((3, 5, 7), (3, 5), None),
        ((3, 7, 7), (3, 7), 1),
    ],
)
def test_layouts(shape: tuple[int, ...], target: tuple[int, ...], dim: int | None) -> None:
    x, y = torch.randn(shape).double(), torch.randint(7, target)
    got = xent.token_stats(x, y, dim=dim, entropy=True, prediction=True)
    assert all(stat is not None and stat.shape == target for stat in got)
    torch.testing.assert_close(-got.log_prob, xent.cross_entropy(x, y, dim=dim, reduction="none"))


def test_empty() -> None:
    got = xent.token_stats(torch.empty(0, 7), torch.empty(0, dtype=torch.int64), entropy=True, prediction=True)
    assert [tuple(stat.shape) for stat in got if stat is not None] == [(0,)] * 4


def test_lowest_of_equal_predictions() -> None:
    x = torch.tensor([[0.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    got = xent.token_stats(x, torch.tensor([0, 0]), prediction=True)
    assert got.prediction is not None
    assert got.prediction.tolist() == [1, 0]


def test_ignored_row_never_poisons() -> None:
    x, y = batch()
    x[0, 0], x[2, 4] = torch.nan, torch.inf
    for name in ("log_prob", "lse", "entropy"):
        value, grad = loss_and_grad(lambda x, n=name: getattr(xent.token_stats(x, y, entropy=True), n), x)
        assert value.isfinite().all()
        assert grad.isfinite().all()
        assert not grad[0, 0].any()
        assert not grad[2, 4].any()


@every_dtype
def test_entropy_beside_minus_infinity(dtype: torch.dtype) -> None:
    """Masked classes have p log p = 0, in the gradient too."""
    x, y = batch(dtype)
    x[..., 2:4] = -torch.inf
    y = y.where((y != 2) & (y != 3), 0)
    value, grad = loss_and_grad(lambda x: xent.token_stats(x, y, entropy=True).entropy, x)
    keep = [0, 1, 4, 5, 6]
    expected, expected_grad = loss_and_grad(
        lambda x: (y != -100) * oracle.statistics(x.reshape(-1, 5), y.reshape(-1)).entropy.view(3, 5),
        x[..., keep].double(),
    )
    oracle.assert_loss(value, expected)
    oracle.assert_grad(grad[..., keep], expected_grad)
    assert not grad[..., 2:4].any()


def test_entropy_of_certainty_and_of_ignorance() -> None:
    x = torch.tensor([[200.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    entropy = xent.token_stats(x, torch.tensor([0, 0]), entropy=True).entropy
    torch.testing.assert_close(entropy, torch.tensor([0.0, 3.0]).log().clamp(min=0))


def test_preference_loss() -> None:
    """DPO: any function of the sequence's log-probability has the gradient that log_softmax and gather have."""
    x, y = batch()
    chosen = y.where(y != -100, 0)

    def preference(log_prob: Tensor) -> Tensor:
        total = log_prob.sum(1)
        return -F.logsigmoid(0.1 * (total[0] - total[1])) - F.logsigmoid(0.1 * (total[1] - total[2]))

    torch.testing.assert_close(
        loss_and_grad(lambda x: preference(xent.token_stats(x, chosen).log_prob), x),
        loss_and_grad(lambda x: preference(x.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]), x),
    )


def test_entropy_bonus_and_z_loss_together() -> None:
    """All outputs in one loss: their gradients are added in one pass."""
    x, y = batch()

    def total(stats: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        log_prob, lse, entropy = stats
        return (log_prob * entropy + lse**2).sum()

    def truth(x: Tensor) -> Tensor:
        stats = truth_for(x, y)
        values = (stats.picked - stats.lse, stats.top + stats.lse, stats.entropy)
        return total(tuple(stat * (y != -100) for stat in values))

    torch.testing.assert_close(
        loss_and_grad(lambda x: total(xent.token_stats(x, y, entropy=True)[:3]), x), loss_and_grad(truth, x)
    )
