"""DTensor logits: nothing else to say, the loss is that of one process, and the gradient lies where the logits lie."""

from __future__ import annotations

import warnings
from typing import Any

import oracle
import pytest
import torch
from oracle import Options
from pairs import pairwise
from ranks import Ranks, mesh_of
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import xent

Placements = tuple[Any, ...]
R, S = Replicate(), Shard


def data(shape: tuple[int, ...], dim: int) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which every third is ignored, but none of the last."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) * 3
    y = torch.randint(shape[dim], (*shape[:dim], *shape[dim:][1:]))
    y.view(-1)[: -y.numel() // 3 : 3] = -100
    return x, y


def without(placements: Placements, dim: int) -> Placements:
    """Those of a tensor without the class dimension."""
    return tuple(R if p == R or p.dim == dim else S(p.dim - (p.dim > dim)) for p in placements)


def full(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def run(
    group: ProcessGroup, shape: tuple[int, ...], dim: int, placements: Placements, weights: str, options: Options
) -> tuple[Any, ...]:
    mesh = mesh_of(group, len(placements))
    x, y = data(shape, dim)
    weight: Any = torch.rand(shape[dim]).double() + 0.1 if weights != "none" else None
    logits = distribute_tensor(x, mesh, placements, src_data_rank=None).requires_grad_()
    target = distribute_tensor(y, mesh, without(placements, dim), src_data_rank=None)
    if weights == "replicated":
        weight = distribute_tensor(weight, mesh, [R] * len(placements), src_data_rank=None)
    if weights == "sharded":
        of_classes = [S(0) if p == S(dim) else R for p in placements]
        weight = distribute_tensor(weight, mesh, of_classes, src_data_rank=None)
    loss = xent.cross_entropy(logits, target, weight, dim=dim, **options)
    upstream = distribute_tensor(
        oracle.upstream_for(loss.full_tensor()), mesh, [R] * len(placements), src_data_rank=None
    )
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    alone = x.requires_grad_()
    expected = xent.cross_entropy(alone, y, full(weight), dim=dim, **options)
    (dx,) = torch.autograd.grad(expected, alone, upstream.full_tensor())
    torch.testing.assert_close(loss.full_tensor(), expected, rtol=1e-13, atol=1e-14, equal_nan=True)
    torch.testing.assert_close(grad.full_tensor(), dx, rtol=1e-12, atol=1e-14)
    assert grad.placements == placements
    return loss.placements, loss.to_local().shape


CASES: dict[str, tuple[tuple[int, ...], int, Placements]] = {
    "rows": ((8, 7), 1, (S(1),)),
    "B, T, V": ((3, 4, 7), 2, (S(2),)),
    "N, C, d1": ((3, 4, 4), 1, (S(1),)),
    "one class, no batch": ((1,), 0, (S(0),)),
    "replicated": ((8, 7), 1, (R,)),
    "the batch alone": ((8, 7), 1, (S(0),)),
    "data x tensor": ((8, 7), 1, (S(0), S(1))),
    "tensor x data": ((8, 7), 1, (S(1), S(0))),
    "replicated x tensor": ((8, 7), 1, (R, S(1))),
    "uneven data x tensor": ((3, 5, 7), 2, (S(0), S(2))),
    "sequence x tensor": ((3, 5, 7), 2, (S(1), S(2))),
    "sequence after the classes": ((3, 7, 5), 1, (S(2), S(1))),
    "data x sequence": ((4, 6, 7), 2, (S(0), S(1))),
    "empty parts": ((1, 1), 1, (S(0), S(1))),
}


@pairwise(case=CASES, reduction=["none", "mean", "sum"], weights=["none", "plain", "replicated", "sharded"])
def test_placements(ranks: Ranks, case: tuple[tuple[int, ...], int, Placements], reduction: str, weights: str) -> None:
    shape, dim, placements = case
    options = {"reduction": reduction, "label_smoothing": 0.1}
    world = 2 if len(placements) == 1 else 4
    expected = without(placements, dim)
    if reduction != "none":
        expected = tuple(R if p == R else Partial() for p in expected)
    for got, _ in ranks.run(run, world, shape, dim, placements, weights, options):
        assert got == expected


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("options", [{"softcap": 5.0, "z_loss": 0.1, "loss_dtype": torch.float64}, {"normalizer": 3.0}])
def test_options(ranks: Ranks, world: int, options: Options) -> None:
    ranks.run(run, world, (8, 37), 1, (S(1),), "plain", options)


@pytest.mark.parametrize("placements", [(S(0), S(1)), (R, S(1))], ids=str)
def test_normalizer_and_no_second_collective(ranks: Ranks, placements: Placements) -> None:
    ranks.run(run, 4, (8, 7), 1, placements, "none", {"normalizer": 3.0})


def all_ignored(group: ProcessGroup, on_empty: str) -> float:
    mesh = mesh_of(group, 2)
    x = distribute_tensor(torch.randn(4, 6), mesh, (S(0), S(1)), src_data_rank=None)
    y = torch.full((4,), -100)
    some = y.clone()
    some[3] = 1  # on the second half of the batch alone
    losses = [
        xent.cross_entropy(x, distribute_tensor(t, mesh, (S(0), R), src_data_rank=None), on_empty=on_empty)
        for t in (y, some)
    ]
    whole = x.full_tensor()
    torch.testing.assert_close(losses[1].full_tensor(), xent.cross_entropy(whole, some))
    options = {"weight": torch.arange(6.0).remainder(5) - 1, "label_smoothing": 0.1, "on_empty": on_empty}
    for t in (some, torch.ones(4).long(), some.where(some < 0, 2)):  # in a class of weight 0, and one of weight 1
        weighted = xent.cross_entropy(x, distribute_tensor(t, mesh, (S(0), R), src_data_rank=None), **options)
        torch.testing.assert_close(weighted.full_tensor(), xent.cross_entropy(whole, t, **options), equal_nan=True)
    return losses[0].full_tensor().item()


@pytest.mark.parametrize(("on_empty", "expected"), [("nan", "nan"), ("zero", "0.0")])
def test_a_part_of_the_batch_may_be_ignored(ranks: Ranks, on_empty: str, expected: str) -> None:
    """A mean over the whole batch is empty only where the whole batch is."""
    assert {str(value) for value in ranks.run(all_ignored, 4, on_empty)} == {expected}


def probabilities(group: ProcessGroup, dims: int, options: Options) -> None:
    mesh = mesh_of(group, dims)
    placements = (S(1),) if dims == 1 else (S(0), S(1))
    x, q = torch.randn(6, 7).double(), torch.rand(6, 7).double().softmax(1)
    torch.distributed.broadcast(x, 0, group)
    torch.distributed.broadcast(q, 0, group)
    parts = [distribute_tensor(t, mesh, placements, src_data_rank=None).requires_grad_() for t in (x, q)]
    loss = xent.cross_entropy(*parts, **options)
    grads = torch.autograd.grad(loss, parts)
    alone = [t.requires_grad_() for t in (x, q)]
    expected = xent.cross_entropy(*alone, **options)
    torch.testing.assert_close(loss.full_tensor(), expected)
    for grad, dx in zip(grads, torch.autograd.grad(expected, alone), strict=True):
        assert grad.placements == placements
        torch.testing.assert_close(grad.full_tensor(), dx)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dims", [1, 2])
def test_probabilities(ranks: Ranks, dims: int, reduction: str) -> None:
    ranks.run(probabilities, 2 * dims, dims, {"reduction": reduction, "label_smoothing": 0.1})


def tokens(group: ProcessGroup, placements: Placements) -> None:
    mesh = mesh_of(group, len(placements))
    x, y = data((5, 7, 3), 1)
    logits = distribute_tensor(x, mesh, placements, src_data_rank=None).requires_grad_()
    target = distribute_tensor(y, mesh, without(placements, 1), src_data_rank=None)
    stats = xent.token_stats(logits, target, entropy=True, prediction=True)
    expected = xent.token_stats(x, y, entropy=True, prediction=True)
    for got, stat in zip(stats, expected, strict=True):
        assert got.placements == without(placements, 1)
        torch.testing.assert_close(got.full_tensor(), stat)
    assert xent.token_stats(logits, target).entropy is None
    (-stats.log_prob.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.placements == placements
    several = torch.stack([y, y.flip(0)], 1)  # K classes per position lie where the logits have theirs
    at = tuple(R if p == S(1) else p for p in placements)
    target, q = (distribute_tensor(t, mesh, at, src_data_rank=None) for t in (several, several.abs().double()))
    found = xent.token_stats(logits, target, dim=1)
    assert [stat.placements for stat in found[:2]] == [at, without(placements, 1)]
    torch.testing.assert_close(found.log_prob.full_tensor(), xent.token_stats(x, several, dim=1).log_prob)
    loss = xent.cross_entropy(logits, target, dim=1, target_prob=q)
    torch.testing.assert_close(loss.full_tensor(), xent.cross_entropy(x, several, dim=1, target_prob=q.full_tensor()))


@pytest.mark.parametrize("placements", [(S(1),), (S(0), S(1)), (S(1), S(2))], ids=str)
def test_token_stats(ranks: Ranks, placements: Placements) -> None:
    ranks.run(tokens, 2 * len(placements), placements)


def collectives(group: ProcessGroup, placements: Placements, options: Options) -> tuple[float, float]:
    mesh = mesh_of(group, len(placements))
    x, y = data((8, 6), 1)
    logits = distribute_tensor(x, mesh, placements, src_data_rank=None).requires_grad_()
    target = distribute_tensor(y, mesh, without(placements, 1), src_data_rank=None)
    xent.cross_entropy(logits, target, **options)  # tells the ranks how many classes each holds
    with CommDebugMode() as forward:
        loss = xent.cross_entropy(logits, target, **options)
    with CommDebugMode() as backward:
        loss.backward()
    return forward.get_total_counts(), backward.get_total_counts()


@pytest.mark.parametrize(
    ("placements", "options", "expected"),
    [
        ((S(1),), {}, (1, 0)),
        ((R, S(1)), {}, (1, 0)),
        ((S(0), S(1)), {"reduction": "sum"}, (1, 0)),
        ((S(0), S(1)), {"normalizer": 5.0}, (1, 0)),
        ((S(0), S(1)), {}, (2, 0)),  # the number of targets in the whole batch
    ],
    ids=str,
)
def test_collectives(ranks: Ranks, placements: Placements, options: Options, expected: tuple[int, int]) -> None:
    world = 2 * len(placements)
    assert ranks.run(collectives, world, placements, options) == [expected] * world


def compiled(group: ProcessGroup, placements: Placements) -> None:
    warnings.simplefilter("ignore")  # the compiler warns of its own doings
    torch.compiler.reset()
    mesh = mesh_of(group, len(placements))
    x, y = data((8, 6), 1)
    logits = distribute_tensor(x, mesh, placements, src_data_rank=None).requires_grad_()
    target = distribute_tensor(y, mesh, without(placements, 1), src_data_rank=None)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return xent.cross_entropy(x * 2, y, label_smoothing=0.1)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(logits, target)
        (grad,) = torch.autograd.grad(value, logits)
        assert grad.placements == placements
        results.append((value.full_tensor(), grad.full_tensor()))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("placements", [(S(1),), (S(0), S(1))], ids=str)
def test_compile(ranks: Ranks, placements: Placements) -> None:
    ranks.run(compiled, 2 * len(placements), placements)


# What is refused


def refused(group: ProcessGroup) -> list[str]:
    mesh = mesh_of(group, 2)
    x, y = data((8, 6), 1)

    def place(t: Tensor, *placements: Any) -> Any:
        return distribute_tensor(t, mesh, placements, src_data_rank=None)

    def partial(t: Tensor) -> Any:
        return DTensor.from_local(t, mesh, (Partial(), S(1)))

    texts = []
    for arguments, options in [
        ((place(x, S(0), S(1)), y), {}),
        ((place(x, S(0), S(1)), place(y, R, S(0))), {}),
        ((place(x, S(1), S(1)), y), {}),
        ((partial(x), y), {}),
        ((x, place(y, R, R)), {}),
        ((place(x, R, S(1)), y), {"group": group}),
        ((place(x, R, S(1)), DTensor.from_local(y, mesh["tp"], [R])), {}),
        ((place(x, R, S(1)), y, place(torch.ones(6), S(0), R)), {}),
    ]:
        with pytest.raises((ValueError, TypeError)) as caught:
            xent.cross_entropy(*arguments, **options)
        texts.append(str(caught.value))
    return texts


def test_what_is_refused(ranks: Ranks) -> None:
    starts = [
        "target: expected a DTensor placed (Shard(dim=0), Replicate()) beside logits placed (Shard(dim=0), Shard(",
        "target: expected placements (Shard(dim=0), Replicate()) or Replicate beside logits",
        "input: expected a DTensor of which one mesh dimension at most shards the classes (tensor dimension 1)",
        "input: expected a DTensor of which one mesh dimension at most shards the classes (tensor dimension 1)",
        "input: expected a DTensor like the other arguments, got a plain tensor",
        "group: expected None beside DTensors, which know theirs",
        "target: expected a DTensor on the mesh of the classes, ",
        "weight: expected placements (Replicate(), Replicate()) or Replicate beside logits",
    ]
    for texts in ranks.run(refused, 4):
        for text, start in zip(texts, starts, strict=True):
            assert text.startswith(start), text
