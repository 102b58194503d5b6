"""A linear head spread over ranks: the loss and all gradients of one process, by one gather and one all-reduce."""

from __future__ import annotations

import time
import warnings
from typing import Any

import oracle
import pytest
import torch
from oracle import Options
from pairs import pairwise
from ranks import Ranks
from test_parallel import LAYOUTS, OPTIONS, C, Sizes, class_weights, part
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor.debug import CommDebugMode

import xent
from xent import _torch

D = 6
Found = tuple[Tensor, Tensor, Tensor, Tensor]


def batch(soft: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states (B, T, D), head (C, D) with bias, targets."""
    torch.manual_seed(0)
    h, W, b = torch.randn(3, 5, D).double(), torch.randn(C, D).double(), torch.randn(C).double()
    y = torch.randint(C, (3, 5))
    y[0, 1:3] = -100
    y[1, :2] = torch.tensor([0, C - 1])
    return h.to(dtype), W.to(dtype), b.to(dtype), torch.randn(3, 5, C).to(dtype).softmax(-1) if soft else y


def loss_and_grads(h: Tensor, W: Tensor, b: Tensor, y: Tensor, **options: Any) -> Found:
    leaves = [t.clone().requires_grad_() for t in (h, W, b)]
    loss = xent.linear_cross_entropy(*leaves[:2], y, linear_bias=leaves[2], **options)
    dh, dW, db = torch.autograd.grad(loss, leaves, oracle.upstream_for(loss))
    return loss.detach(), dh, dW, db


def work(group: ProcessGroup, sizes: Sizes, soft: bool, weights: str, dtype: torch.dtype, options: Options) -> Found:
    h, W, b, y = batch(soft, dtype)
    rank = group.rank()
    weight = {"none": None, "full": class_weights(), "parts": part(class_weights(), sizes, rank)}[weights]
    mine = part(W, sizes, rank, 0), part(b, sizes, rank, 0), part(y, sizes, rank) if soft else y
    return loss_and_grads(h, *mine, weight=weight, max_bytes=1500, group=group, **options)


def check(ranks: Ranks, sizes: Sizes, soft: bool, weights: str, options: Options, tolerance: float = 1e-12) -> None:
    dtype = torch.float64 if tolerance < 1e-6 else torch.bfloat16
    answers = ranks.run(work, len(sizes), sizes, soft, weights, dtype, options)
    weight = None if weights == "none" else class_weights()
    h, W, b, y = (t.double() if t.is_floating_point() else t for t in batch(soft, dtype))
    loss, dh, dW, db = loss_and_grads(h, W, b, y, weight=weight, **options)
    for found in answers:
        assert found[0].equal(answers[0][0]), "the same bits on each rank"
        assert found[1].equal(answers[0][1]), "the same bits on each rank"
        assert (found[0] - loss).norm() <= tolerance * loss.norm()
        assert (found[1] - dh).norm() <= tolerance * dh.norm()
    assert (torch.cat([found[2] for found in answers]) - dW).norm() <= tolerance * dW.norm()
    assert (torch.cat([found[3] for found in answers]) - db).norm() <= tolerance * db.norm()


@pairwise(options=OPTIONS, weights=["none", "full", "parts"], soft={"indices": False, "probabilities": True})
def test_every_option(ranks: Ranks, options: Options, weights: str, soft: bool) -> None:
    check(ranks, (20, 17), soft, weights, options)


@pairwise(sizes=LAYOUTS, soft={"indices": False, "probabilities": True}, shift={"": False, "shift": True})
def test_every_layout(ranks: Ranks, sizes: Sizes, soft: bool, shift: bool) -> None:
    check(ranks, sizes, soft, "full", {**OPTIONS["everything"], "reduction": "mean", "shift": shift})


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=str)
def test_bfloat16(ranks: Ranks, options: Options) -> None:
    check(ranks, (20, 17), False, "none", options, tolerance=2e-2)


def summed_dtypes(group: ProcessGroup) -> list[torch.dtype]:
    """Of what is added up over the ranks in a step."""
    found, all_reduce = [], _torch.all_reduce

    def watched(x: Tensor, name: str) -> Tensor:
        found.append(x.dtype)
        return all_reduce(x, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_torch, "all_reduce", watched)
        work(group, (20, 17), False, "none", torch.bfloat16, {})
    return found


def test_half_precision_is_added_up_in_float32(ranks: Ranks) -> None:
    assert ranks.run(summed_dtypes, 2) == [[torch.float32]] * 2


def again(group: ProcessGroup, sizes: Sizes) -> list[Found]:
    return [work(group, sizes, False, "parts", torch.float32, OPTIONS["everything"]) for _ in range(3)]


def test_results_repeat_to_the_bit(ranks: Ranks) -> None:
    for answers in ranks.run(again, 3, (10, 17, 10)):
        for answer in answers[1:]:
            assert all(a.equal(b) for a, b in zip(answers[0], answer, strict=True))


def count(group: ProcessGroup, frozen: bool) -> tuple[float, float]:
    """Collectives of forward and of backward, in a second step, over many blocks."""
    h, W, _, y = batch(False)
    W = W[: 10 + group.rank()].requires_grad_()
    h = h if frozen else h.requires_grad_()
    y = y.clamp(max=9)
    for _ in range(2):
        with CommDebugMode() as forward:
            loss = xent.linear_cross_entropy(h, W, y, group=group, max_bytes=200)
        with CommDebugMode() as backward:
            loss.backward()
    return forward.get_total_counts(), backward.get_total_counts()


@pytest.mark.parametrize(("frozen", "backward"), [(False, 1), (True, 0)])
@pytest.mark.parametrize("world", [2, 3])
def test_one_gather_and_one_all_reduce(ranks: Ranks, world: int, frozen: bool, backward: int) -> None:
    assert ranks.run(count, world, frozen) == [(1, backward)] * world


def tokens(group: ProcessGroup, sizes: Sizes, several: bool) -> tuple[Any, Any]:
    h, W, b, y = batch(False)
    y = torch.stack([y, y.roll(1), y], -1) if several else y
    results = []
    for mine, over in ((slice(None), None), (slice(sum(sizes[: group.rank()]), sum(sizes[: group.rank() + 1])), group)):
        leaf = h.clone().requires_grad_()
        options: Options = {"entropy": True, "prediction": True, "softcap": 4.0, "max_bytes": 2000, "group": over}
        stats = xent.linear_token_stats(leaf, W[mine], y, linear_bias=b[mine], **options)
        loss = (stats.log_prob * 2).sum() + (stats.lse * stats.entropy).sum()
        results.append((*(stat.detach() for stat in stats), torch.autograd.grad(loss, leaf)[0]))
    return results[0], results[1]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_token_stats(ranks: Ranks, sizes: Sizes, several: bool) -> None:
    for expected, got in ranks.run(tokens, len(sizes), sizes, several):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def module(group: ProcessGroup) -> tuple[Tensor, Tensor]:
    h, W, b, y = batch(False)
    mine = part(W, (20, 17), group.rank(), 0)
    criterion = xent.LinearCrossEntropyLoss(
        D, len(mine), bias=True, dtype=torch.float64, label_smoothing=0.1, group=group
    )
    criterion.linear.weight.data, criterion.linear.bias.data = mine, part(b, (20, 17), group.rank(), 0)
    return criterion(h, y).detach(), xent.linear_cross_entropy(h, W, y, linear_bias=b, label_smoothing=0.1)


def test_the_module(ranks: Ranks) -> None:
    for got, expected in ranks.run(module, 2):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


def compiled(group: ProcessGroup, sizes: Sizes, weights: str) -> None:
    warnings.simplefilter("ignore")  # the compiler warns of its own doings
    torch.compiler.reset()
    h, W, b, y = batch(False)
    mine = part(W, sizes, group.rank(), 0), part(b, sizes, group.rank(), 0)
    weight = class_weights() if weights == "full" else None

    def loss(h: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return xent.linear_cross_entropy(
            h * 2, W, y, linear_bias=b, weight=weight, label_smoothing=0.1, z_loss=0.1, group=group, max_bytes=1500
        )

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (h, *mine)]
        value = function(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("weights", ["none", "full"])
def test_compile(ranks: Ranks, weights: str) -> None:
    ranks.run(compiled, 2, (20, 17), weights)


def transforms(group: ProcessGroup) -> list[str]:
    h, W, _, y = batch(False)
    W = part(W, (20, 17), group.rank(), 0)

    def loss(h: Tensor) -> Tensor:
        return xent.linear_cross_entropy(h, W, y, group=group)

    leaf = h.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(h), torch.autograd.grad(loss(leaf), leaf)[0])
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    texts = []
    for refused in (
        lambda: torch.autograd.grad(grad.sum(), leaf),
        lambda: torch.func.jvp(loss, (h,), (h,)),
        lambda: torch.func.vmap(lambda h, y: xent.linear_cross_entropy(h, W, y, group=group))(h, y),
    ):
        with pytest.raises(NotImplementedError) as caught:
            refused()
        texts.append(str(caught.value))
    return texts


def test_what_derivatives_there_are(ranks: Ranks) -> None:
    for double, forward, vmap in ranks.run(transforms, 2):
        assert "double backward of a linear head" in double
        assert "forward-mode differentiation of a linear head" in forward
        assert "vmap of a linear head" in vmap


def fail(group: ProcessGroup, change: Options) -> tuple[str, str, float]:
    start = time.monotonic()
    h, W, _, y = batch(False)
    call: Options = {"input": h, "linear_weight": part(W, (20, 17), group.rank(), 0), "target": y, "group": group}
    with pytest.raises((ValueError, IndexError)) as caught:
        xent.linear_cross_entropy(**(call | change if group.rank() == 1 else call))
    loss = xent.linear_cross_entropy(**call)
    torch.testing.assert_close(loss, xent.linear_cross_entropy(h, W, y))
    return type(caught.value).__name__, str(caught.value), time.monotonic() - start


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (
            {"target": torch.full((3, 5), 37)},
            "IndexError",
            "rank 1 of 2: target: expected class indices in [0, 37) or ",
        ),
        ({"max_bytes": 0}, "ValueError", "rank 1 of 2: max_bytes: expected a number of bytes > 0, got 0"),
        ({"linear_weight": torch.zeros(17, 2, D).double()}, "ValueError", "rank 1 of 2: input: expected shape"),
        ({"linear_weight": torch.zeros(17, 7).double()}, "ValueError", "rank 1 of 2: input: expected 7 features"),
        (
            {"input": torch.zeros(2, 5, D).double(), "target": torch.zeros(2, 5, dtype=torch.long)},
            "ValueError",
            "group: ",
        ),
    ],
)
def test_faults(ranks: Ranks, change: Options, kind: str, text: str) -> None:
    for got, words, seconds in ranks.run(fail, 2, change):
        assert got == kind
        assert words.startswith(text)
        assert seconds < 110
