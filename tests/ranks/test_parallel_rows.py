"""Classes spread over ranks: rows that are special, layouts, the module, and the statistics of tokens."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from oracle import Options
from ranks import Ranks
from test_parallel import Sizes, class_weights, inputs, layouts, part, work
from torch import Tensor
from torch.distributed import ProcessGroup

import xent
from xent._rows import dispatch as _primitives

# Rows that are special


def special(group: ProcessGroup, x: Tensor, y: Tensor, sizes: Sizes, options: Options) -> tuple[Tensor, Tensor]:
    y = part(y, sizes, group.rank()) if y.is_floating_point() else y
    return oracle.loss_and_grad(xent.cross_entropy, part(x, sizes, group.rank()), y, dim=1, group=group, **options)


def as_one(ranks: Ranks, x: Tensor, y: Tensor, sizes: Sizes, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient over ranks; asserts that they are those of one process."""
    answers = ranks.run(special, len(sizes), x, y, sizes, options)
    loss, grad = answers[0][0], torch.cat([dx for _, dx in answers], 1)
    alone = oracle.loss_and_grad(xent.cross_entropy, x, y, dim=1, **options)
    torch.testing.assert_close((loss, grad), alone, rtol=1e-13, atol=1e-14, equal_nan=True)
    return loss, grad


@pytest.mark.parametrize("on_empty", ["nan", "zero"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_ignored(ranks: Ranks, on_empty: str, reduction: str) -> None:
    x, y = torch.full((4, 6), torch.nan).double(), torch.full((4,), -100)
    _, grad = as_one(ranks, x, y, (4, 2), on_empty=on_empty, reduction=reduction)
    assert grad.count_nonzero() == 0


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_rows(ranks: Ranks, reduction: str) -> None:
    as_one(ranks, torch.zeros(0, 6).double(), torch.zeros(0, dtype=torch.long), (4, 2), reduction=reduction)


def test_an_ignored_class_weighs_nothing(ranks: Ranks) -> None:
    x, y, weight = torch.randn(5, 6).double(), torch.tensor([0, 3, 5, 3, 4]), torch.arange(1.0, 7.0)
    as_one(ranks, x, y, (4, 2), weight=weight, ignore_index=3)


@pytest.mark.parametrize("sizes", [(4, 2), (3, 3), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_infinite_logits(ranks: Ranks, sizes: Sizes, smoothing: float) -> None:
    inf = torch.inf
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)).double()
    x[0, :4] = x[1, 4:] = x[6, :4] = -inf  # a whole shard of the first layout
    x[2] = -inf
    x[3, 1] = inf
    x[4, 5] = torch.nan
    x[5] *= 1e30
    x[6, 4:] = -1e30  # the largest, however far from 0
    loss, _ = as_one(ranks, x, torch.tensor([5, 0, 1, 2, 2, 3, 4]), sizes, reduction="none", label_smoothing=smoothing)
    assert loss[2:5].isnan().all()
    assert smoothing > 0 or loss[:2].isfinite().all()


def test_probabilities_of_zero_at_infinite_logits(ranks: Ranks) -> None:
    x, q = torch.zeros(1, 4).double(), torch.tensor([[0.5, 0.5, 0, 0]]).double()
    x[0, 2:] = -torch.inf
    loss, _ = as_one(ranks, x, q, (2, 2))
    assert loss.isfinite()


def test_shift_by_a_large_number(ranks: Ranks) -> None:
    x = torch.randn(5, 6).double()
    y = torch.arange(5)
    near, far = (ranks.run(special, 2, x + c, y, (4, 2), {})[0][0] for c in (0, 2.0**30))
    torch.testing.assert_close(near, far, rtol=1e-6, atol=0)


def test_gradient_rows_sum_to_zero(ranks: Ranks) -> None:
    _, grad = as_one(ranks, torch.randn(5, 9).double(), torch.arange(5), (4, 2, 3), reduction="none")
    torch.testing.assert_close(grad.sum(1), torch.zeros(5).double(), rtol=0, atol=1e-14)


def in_place(group: ProcessGroup, sizes: Sizes) -> tuple[bool, Tensor]:
    x, y = inputs(torch.float64, False)
    x = part(x, sizes, group.rank()).requires_grad_()
    z = x * 1
    version = z._version
    loss = xent.cross_entropy(z, y, group=group, inplace_backward=True)
    (grad,) = torch.autograd.grad(loss, z, oracle.upstream_for(loss))
    return grad.data_ptr() == z.data_ptr() and z._version > version, grad


def test_in_place(ranks: Ranks) -> None:
    sizes = (20, 17)
    expected = [dx for _, dx, _ in ranks.run(work, 2, sizes, torch.float64, False, "none", {})]
    for (same, grad), dx in zip(ranks.run(in_place, 2, sizes), expected, strict=True):
        assert same
        assert grad.equal(dx)


def module(group: ProcessGroup, sizes: Sizes) -> tuple[Tensor, Tensor]:
    x, y = inputs(torch.float64, False)
    x = part(x, sizes, group.rank())
    criterion = xent.CrossEntropyLoss(class_weights(), label_smoothing=0.1, group=group)
    return criterion(x, y), xent.cross_entropy(x, y, class_weights(), label_smoothing=0.1, group=group)


def test_the_module(ranks: Ranks) -> None:
    for a, b in ranks.run(module, 2, (20, 17)):
        assert a.equal(b)


def layouts_of_logits(group: ProcessGroup) -> list[Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 8).double(), torch.randint(8, (2, 3))
    mine = part(x, (5, 3), group.rank())
    results = [xent.cross_entropy(mine, y, group=group, dim=-1)]
    results.append(xent.cross_entropy(mine.movedim(-1, 1), y, group=group, dim=1))
    results.append(xent.cross_entropy(mine.movedim(-1, 0), y, group=group, dim=0))
    return [*results, xent.cross_entropy(x, y, dim=-1)]


def test_any_class_dimension(ranks: Ranks) -> None:
    for *results, alone in ranks.run(layouts_of_logits, 2):
        for result in results:
            torch.testing.assert_close(result, alone, rtol=1e-14, atol=0)


# Statistics of tokens


def tokens(
    group: ProcessGroup, x: Tensor, y: Tensor, sizes: Sizes, reading: Options, backend: str | None = None
) -> tuple[Any, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_primitives, "FORCED_BACKEND", backend)
        return tokens_of(group, x, y, sizes, reading)


def tokens_of(group: ProcessGroup, x: Tensor, y: Tensor, sizes: Sizes, reading: Options) -> tuple[Any, Tensor]:
    mine = part(x, sizes, group.rank()).requires_grad_()
    stats = xent.token_stats(mine, y, dim=1, entropy=True, prediction=True, group=group, **reading)
    loss = (stats.log_prob * 2 + stats.lse * stats.entropy).sum()
    return tuple(stat.detach() for stat in stats), torch.autograd.grad(loss, mine)[0]


@pytest.mark.parametrize("reading", [{}, {"softcap": 4.0, "logit_scale": -0.8}], ids=["plain", "softcap and scale"])
@layouts
def test_token_stats(ranks: Ranks, sizes: Sizes, reading: Options) -> None:
    x, y = inputs(torch.float64, False)
    answers = ranks.run(tokens, len(sizes), x, y, sizes, reading)
    alone = x.clone().requires_grad_()
    stats = xent.token_stats(alone, y, dim=1, entropy=True, prediction=True, **reading)
    (grad,) = torch.autograd.grad((stats.log_prob * 2 + stats.lse * stats.entropy).sum(), alone)
    for got, _ in answers:
        torch.testing.assert_close(got, tuple(stat.detach() for stat in stats), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.cat([dx for _, dx in answers], 1), grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_token_stats_of_a_part_without_probability(ranks: Ranks, backend: str) -> None:
    """All the logits of one rank are -inf: its entropy is not a number, and must not count."""
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).double()
    x[0, :4] = x[1, 4:] = -torch.inf
    stats = xent.token_stats(x, torch.tensor([5, 0, 1]), entropy=True, prediction=True)
    for got, _ in ranks.run(tokens, 2, x, torch.tensor([5, 0, 1]), (4, 2), {}, backend=backend):
        torch.testing.assert_close(got, tuple(stats), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 5), (0, 6), (5, 0, 1)], ids=str)
def test_the_lowest_of_equal_classes_is_predicted(ranks: Ranks, sizes: Sizes) -> None:
    x = torch.zeros(5, 6)
    x[1, 1:] = x[2, 3:] = x[3, 5] = 1.0
    x[4] = -torch.inf
    for stats, _ in ranks.run(tokens, len(sizes), x, torch.tensor([0, 0, 0, -100, 0]), sizes, {}):
        assert stats[3].tolist() == [0, 1, 3, -1, 0]


def test_predictions_beyond_what_float32_counts(ranks: Ranks) -> None:
    """Class indices are exact to 2^53 on their way."""
    sizes = (2**24, 3)
    assert ranks.run(far_prediction, 2, sizes) == [[2**24 + 1]] * 2


def far_prediction(group: ProcessGroup, sizes: Sizes) -> Any:
    x = torch.zeros(1, sizes[group.rank()])
    if group.rank() == 1:
        x[0, 1] = 1
    prediction = xent.token_stats(x, torch.tensor([2]), group=group, prediction=True, dim=1).prediction
    return None if prediction is None else prediction.tolist()
