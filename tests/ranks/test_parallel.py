"""Classes spread over ranks: with every option the loss and the gradients are those of one process."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from oracle import Options, every_dtype
from pairs import pairwise
from ranks import Ranks
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor.debug import CommDebugMode

import xent
from xent._rows import dispatch as _primitives

Sizes = tuple[int, ...]
C = 37
LAYOUTS = [(37,), (20, 17), (36, 1), (0, 37), (37, 0), (10, 17, 10), (13, 0, 24), (0, 0, 37), (9, 9, 10, 9)]
layouts = pytest.mark.parametrize("sizes", LAYOUTS, ids=str)

OPTIONS: dict[str, Options] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "label smoothing": {"label_smoothing": 0.3},
    "all smoothing": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 0.1},
    "softcap and scale": {"softcap": 5.0, "logit_scale": 0.7},
    "negative scale": {"logit_scale": -1.5},
    "normalizer": {"normalizer": 4.5},
    "everything": {"label_smoothing": 0.2, "z_loss": 0.05, "softcap": 9.0, "logit_scale": 1.3, "reduction": "none"},
}


def part(tensor: Tensor, sizes: Sizes, rank: int, dim: int = -1) -> Tensor:
    """What a rank holds of it; contiguous, as if nobody had ever seen the rest."""
    return tensor.split(sizes, dim)[rank].clone()


def class_weights() -> Tensor:
    weight = torch.rand(C, generator=torch.Generator().manual_seed(3)).double() + 0.1
    weight[5] = 0
    return weight


def inputs(dtype: torch.dtype, soft: bool) -> tuple[Tensor, Tensor]:
    """The oracle's rows; some of the targets are ignored, and an ignored row holds NaN."""
    x, y = oracle.rows(dtype, C=C, soft=soft)
    if not soft:
        y[4] = y[7] = -100
        x[7] = torch.nan
    return x, y


def work(
    group: ProcessGroup, sizes: Sizes, dtype: torch.dtype, soft: bool, weights: str, options: Options
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, this rank's part of the logits' gradient, and of that of probabilities, on each rank."""
    x, y = inputs(dtype, soft)
    rank = group.rank()
    weight = {"none": None, "full": class_weights(), "parts": part(class_weights(), sizes, rank)}[weights]
    x, y = part(x, sizes, rank).requires_grad_(), part(y, sizes, rank).requires_grad_() if soft else y
    loss = xent.cross_entropy(x, y, weight, dim=1, group=group, **options)
    grads = torch.autograd.grad(loss, [x, y] if soft else [x], oracle.upstream_for(loss))
    return loss.detach(), grads[0], grads[1] if soft else None


def check(ranks: Ranks, sizes: Sizes, dtype: torch.dtype, soft: bool, weights: str, options: Options) -> None:
    answers = ranks.run(work, len(sizes), sizes, dtype, soft, weights, options)
    x, y = inputs(dtype, soft)
    q = y.double().requires_grad_() if soft else y
    x = x.double().requires_grad_()
    truth = oracle.cross_entropy(x, q, None if weights == "none" else class_weights(), dim=1, **options)
    losses = [loss for loss, *_ in answers]
    assert all(loss.equal(losses[0]) for loss in losses), "the same bits on each rank"
    oracle.assert_loss(losses[0], truth.detach())
    grads = torch.autograd.grad(truth, [x, q] if soft else [x], oracle.upstream_for(truth))
    oracle.assert_grad(torch.cat([dx for _, dx, _ in answers], 1), grads[0], None if soft else y)
    if soft:
        oracle.assert_grad(torch.cat([dq for *_, dq in answers], 1), grads[1], slack=8)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pairwise(options=OPTIONS, sizes=[(37,), (20, 17), (10, 17, 10)], weights=["none", "full", "parts"])
def test_every_option(ranks: Ranks, options: Options, sizes: Sizes, weights: str, soft: bool) -> None:
    check(ranks, sizes, torch.float64, soft, weights, options)


@layouts
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_every_layout(ranks: Ranks, sizes: Sizes, soft: bool) -> None:
    check(ranks, sizes, torch.float64, soft, "full", OPTIONS["everything"])


@every_dtype
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_every_dtype(ranks: Ranks, dtype: torch.dtype, options: str) -> None:
    check(ranks, (20, 17), dtype, False, "parts", OPTIONS[options])


def candidates(group: ProcessGroup, sizes: Sizes, weighted: bool) -> None:
    x, y = inputs(torch.float64, soft=False)
    generator = torch.Generator().manual_seed(5)
    several = torch.cat([y[:, None], torch.randint(C, (len(y), 3), generator=generator), y[:, None]], 1)
    several[7] = several[2, 1] = -100
    q = torch.rand(several.shape, generator=generator).double().requires_grad_()
    weight, options = class_weights() if weighted else None, OPTIONS["everything"] | {"reduction": "mean"}
    answers = []
    for held in (x, part(x, sizes, group.rank())):
        leaf = held.detach().requires_grad_()
        over = {"group": group} if held is not x else {}
        loss = xent.cross_entropy(leaf, several, weight, target_prob=q, dim=1, **options, **over)
        stats = xent.token_stats(leaf, several, dim=1, entropy=True, **over)
        total = loss + stats.log_prob.square().sum() + stats.entropy.sum()  # type: ignore[union-attr]
        dx, dq = torch.autograd.grad(total, [leaf, q])
        answers.append((loss, stats.log_prob, dx if over else part(dx, sizes, group.rank()), dq))
    for alone, of_ranks in zip(*answers, strict=True):
        torch.testing.assert_close(of_ranks, alone, rtol=1e-11, atol=1e-13)


@layouts
@pytest.mark.parametrize("weighted", [False, True])
def test_candidates(ranks: Ranks, sizes: Sizes, weighted: bool) -> None:
    ranks.run(candidates, len(sizes), sizes, weighted)


def on_backend(group: ProcessGroup, name: str, *args: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    before, _primitives.FORCED_BACKEND = _primitives.FORCED_BACKEND, name
    try:
        return work(group, *args)
    finally:
        _primitives.FORCED_BACKEND = before


def test_backends_agree(ranks: Ranks, backend: str) -> None:
    arguments = ((20, 17), torch.float64, False, "full", OPTIONS["everything"])
    for got, other in zip(ranks.run(on_backend, 2, backend, *arguments), ranks.run(work, 2, *arguments), strict=True):
        torch.testing.assert_close(got, other, rtol=1e-12, atol=1e-13)


# The same as one process, to the bit where nothing is left to round


def again(group: ProcessGroup, sizes: Sizes) -> list[tuple[Any, ...]]:
    return [work(group, sizes, torch.float32, False, "parts", OPTIONS["everything"]) for _ in range(3)]


@layouts
def test_results_repeat_to_the_bit(ranks: Ranks, sizes: Sizes) -> None:
    for answers in ranks.run(again, len(sizes), sizes):
        for answer in answers[1:]:
            assert all(a is b is None or a.equal(b) for a, b in zip(answers[0], answer, strict=True))


def one_rank(group: ProcessGroup, dtype: torch.dtype, options: Options) -> list[tuple[Tensor, Tensor]]:
    x, y = inputs(dtype, soft=False)
    return [oracle.loss_and_grad(xent.cross_entropy, x, y, group=g, **options) for g in (group, None)]


@pairwise(options=OPTIONS, dtype=oracle.ALL_DTYPES)
def test_one_rank_is_one_process(ranks: Ranks, dtype: torch.dtype, options: Options) -> None:
    """The loss to the bit; the gradient's factors are rounded in another order, once or twice in float64."""
    [(alone, without)] = ranks.run(one_rank, 1, dtype, options)
    assert alone[0].equal(without[0])
    torch.testing.assert_close(alone[1], without[1], rtol=4 * torch.finfo(dtype).eps, atol=0)


# Communication


def count(group: ProcessGroup, sizes: Sizes, N: int, options: Options) -> list[tuple[float, float]]:
    """Collectives of forward and of backward, in each of three steps."""
    torch.manual_seed(0)
    x, y = torch.randn(N, sizes[group.rank()], requires_grad=True), torch.randint(sum(sizes), (N,))
    counts = []
    for _ in range(3):
        with CommDebugMode() as forward:
            loss = xent.cross_entropy(x, y, group=group, dim=1, **options)
        with CommDebugMode() as backward:
            loss.sum().backward()
        counts.append((forward.get_total_counts(), backward.get_total_counts()))
    return counts


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("world", [2, 3])
def test_one_collective_in_forward_none_in_backward(ranks: Ranks, world: int, options: Options) -> None:
    assert ranks.run(count, world, (5,) * world, 8, options, fresh=120) == [[(1, 0)] * 3] * world


@pytest.mark.parametrize(("sizes", "N"), [((6, 5), 8), ((5, 5), 2000), ((0, 5, 1), 2000)])
def test_the_first_call_may_need_a_second_gather(ranks: Ranks, sizes: Sizes, N: int) -> None:
    """Uneven shards, and more rows than the first message can hold: the ranks have to hear of it first."""
    assert ranks.run(count, len(sizes), sizes, N, {}, fresh=120) == [[(2, 0), (1, 0), (1, 0)]] * len(sizes)


def longer_and_shorter(group: ProcessGroup) -> list[int]:
    counts = []
    for N in [8, 3000, 8, 2500, 3000, 3001, *[8] * 64, 3001]:
        with CommDebugMode() as forward:
            xent.cross_entropy(torch.zeros(N, 5), torch.zeros(N, dtype=torch.long), group=group)
        counts.append(int(forward.get_total_counts()))
    return counts


def test_only_a_batch_longer_than_all_the_last_needs_a_second_gather(ranks: Ranks) -> None:
    expected = [1, 2, 1, 1, 1, 2, *[1] * 64, 2]
    assert ranks.run(longer_and_shorter, 2, fresh=120) == [expected] * 2
