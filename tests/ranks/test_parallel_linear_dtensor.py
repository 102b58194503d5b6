"""A linear head that is a DTensor, sharded over its classes: nothing else to say."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from oracle import Options
from pairs import pairwise
from ranks import Ranks, mesh_of
from test_parallel_dtensor import Placements, R, S, full
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import xent

C, D = 11, 6


def batch(soft: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    y = torch.randint(C, (4, 5))
    y[:2, 1:3] = -100
    q = torch.randn(4, 5, C).double().softmax(-1)
    weight = torch.rand(C).double() + 0.1
    return torch.randn(4, 5, D).double(), torch.randn(C, D).double(), torch.randn(C).double(), q if soft else y, weight


def run(group: ProcessGroup, hidden: Placements, head: Placements, weights: str, soft: bool, options: Options) -> Any:
    mesh = mesh_of(group, len(head))
    h, W, b, y, w = batch(soft)
    rows = [S(2) if soft and p == S(0) else q for p, q in zip(head, hidden, strict=True)]
    rows = rows if soft else [R if p == S(0) else q for p, q in zip(head, hidden, strict=True)]

    def place(t: Tensor, placements: Any) -> Any:
        return distribute_tensor(t, mesh, placements, src_data_rank=None)

    leaves = [place(h, hidden), place(W, head), place(b, head)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    weight: Any = {"none": None, "plain": w, "sharded": place(w, head)}[weights]
    loss = xent.linear_cross_entropy(*leaves[:2], place(y, rows), linear_bias=leaves[2], weight=weight, **options)
    whole = [t.clone().requires_grad_() for t in (h, W, b)]
    weight = None if weights == "none" else w
    expected = xent.linear_cross_entropy(*whole[:2], y, linear_bias=whole[2], weight=weight, **options)
    torch.testing.assert_close(loss.full_tensor(), expected, rtol=1e-12, atol=1e-13)
    upstream = oracle.upstream_for(expected)
    grads = torch.autograd.grad(loss, leaves, place(upstream, [R] * len(head)))
    for grad, leaf, truth in zip(grads, leaves, torch.autograd.grad(expected, whole, upstream), strict=True):
        torch.testing.assert_close(grad.full_tensor(), truth, rtol=1e-11, atol=1e-12)
        assert grad.shape == leaf.shape
    return loss.placements


PLACED: list[tuple[Placements, Placements]] = [  # hidden states, head
    ((R,), (S(0),)),
    ((S(1),), (S(0),)),
    ((R,), (R,)),
    ((S(0), R), (R, S(0))),
    ((S(0), S(1)), (R, S(0))),
]


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pairwise(
    placed=PLACED,
    weights=["none", "plain", "sharded"],
    options=[{"reduction": r, "shift": shift} for r in ("mean", "none") for shift in (False, True)],
)
def test_placements(
    ranks: Ranks, placed: tuple[Placements, Placements], weights: str, options: Options, soft: bool
) -> None:
    hidden, head = placed
    for got in ranks.run(run, 2 * len(head), hidden, head, weights, soft, {"label_smoothing": 0.1, **options}):
        rows = tuple(p if p == S(0) else R for p in hidden)
        assert got == (rows if options["reduction"] == "none" else tuple(Partial() if p == S(0) else R for p in rows))


class Model(nn.Module):
    """A body, and a head whose logits are never computed."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, C)


def train(group: ProcessGroup) -> tuple[float, float]:
    torch.manual_seed(0)
    model, alone = Model().double(), Model().double()
    alone.load_state_dict(model.state_dict())
    mesh = mesh_of(group, 1)
    parallelize_module(model, mesh, {"head": ColwiseParallel()})
    x, _, _, y, _ = batch(False)
    for m in (alone, model):
        h = m.body(x).tanh()
        h = h if m is alone else DTensor.from_local(h, mesh, [R])
        loss = xent.linear_cross_entropy(h, m.head.weight, y, linear_bias=m.head.bias)
        loss.backward()
    assert isinstance(loss, DTensor)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(p.grad), q.grad, rtol=1e-11, atol=1e-13)
    hidden = DTensor.from_local(model.body(x).detach(), mesh, [R]).requires_grad_()
    with CommDebugMode() as forward:
        loss = xent.linear_cross_entropy(hidden, model.head.weight, y, linear_bias=model.head.bias)
    with CommDebugMode() as backward:
        loss.backward()
    return forward.get_total_counts(), backward.get_total_counts()


def test_column_parallel_head(ranks: Ranks) -> None:
    assert ranks.run(train, 2) == [(1, 1)] * 2


def tokens(group: ProcessGroup, several: bool) -> None:
    mesh = mesh_of(group, 1)
    h, W, b, y, _ = batch(False)
    y = torch.stack([y, y.flip(0), y.flip(1)], -1) if several else y
    target = DTensor.from_local(y, mesh, [R]) if several else y
    head = [distribute_tensor(t, mesh, [S(0)], src_data_rank=None) for t in (W, b)]
    stats = xent.linear_token_stats(
        DTensor.from_local(h, mesh, [R]), head[0], target, linear_bias=head[1], entropy=True, prediction=True
    )
    expected = xent.linear_token_stats(h, W, y, linear_bias=b, entropy=True, prediction=True)
    torch.testing.assert_close([full(stat) for stat in stats], list(expected))


@pytest.mark.parametrize("several", [False, True])
def test_token_stats(ranks: Ranks, several: bool) -> None:
    ranks.run(tokens, 2, several)


def refused(group: ProcessGroup) -> list[str]:
    mesh = mesh_of(group, 2)
    h, W, _, y, _ = batch(False)

    def place(t: Tensor, *placements: Any) -> Any:
        return distribute_tensor(t, mesh, placements, src_data_rank=None)

    texts = []
    for arguments, options in [
        ((place(h, R, R), W, y), {}),
        ((h, place(W, R, S(0)), y), {}),
        ((h, place(W, R, S(1)), y), {}),
        ((place(h, S(2), R), place(W, R, S(0)), y), {}),
        ((place(h, S(1), R), place(W, R, S(0)), place(y, S(1), R)), {"shift": True}),
        ((place(h, S(0), R), place(W, R, S(0)), y), {}),
        ((h, place(W, R, S(0)), y), {"group": group}),
    ]:
        with pytest.raises((ValueError, TypeError)) as caught:
            xent.linear_cross_entropy(*arguments, **options)
        texts.append(str(caught.value))
    return texts


def test_what_is_refused(ranks: Ranks) -> None:
    starts = [
        "linear_weight: expected a DTensor like the other arguments, got a plain tensor",
        "input: expected a DTensor beside a linear_weight that is sharded",
        "linear_weight: expected (C, D) placed Shard(0) or Replicate, got ",
        "input: expected whole features, and whole sequences beside shift, got ",
        "input: expected whole features, and whole sequences beside shift, got ",
        "target: expected a DTensor placed (Shard(dim=0), Replicate()) beside logits",
        "group: expected None beside DTensors, which know theirs",
    ]
    for texts in ranks.run(refused, 4):
        for text, start in zip(texts, starts, strict=True):
            assert text.startswith(start), text


class Gathered(Model):
    """A model that ends in its loss: within its forward, FSDP has gathered the head."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return xent.linear_cross_entropy(self.body(x).tanh(), self.head.weight, y, linear_bias=self.head.bias)


def fully_sharded(group: ProcessGroup) -> str:
    torch.manual_seed(0)
    model, alone = Gathered().double(), Gathered().double()
    alone.load_state_dict(model.state_dict())
    fully_shard(model, mesh=mesh_of(group, 1))
    x, _, _, y, _ = batch(False)
    model(x, y).backward()
    alone(x, y).backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(p.grad), q.grad, rtol=1e-11, atol=1e-13)
    model.reshard()
    with pytest.raises(TypeError) as caught:
        xent.linear_cross_entropy(x, model.head.weight, y)
    return str(caught.value)


def test_fully_shard(ranks: Ranks) -> None:
    """Right within the forward of the module that owns the head; outside of it an error that says so."""
    for text in ranks.run(fully_sharded, 2):
        assert "in the forward of the module that owns it" in text
