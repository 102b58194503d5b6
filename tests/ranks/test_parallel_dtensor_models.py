"""Models whose head is split over ranks, which end in a DTensor: each step is that of one process."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks, mesh_of
from test_parallel_dtensor import full
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import xent


class Model(nn.Module):
    """Hidden states and a head, biased."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


def train(group: ProcessGroup, sequence: bool, data_parallel: bool) -> None:
    torch.manual_seed(0)
    model, alone = Model().double(), Model().double()
    alone.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    x, y = torch.randn(4, 6, 6).double(), torch.randint(11, (4, 6))
    y[:2, :4] = -100
    mesh = mesh_of(group, 1 + data_parallel)
    tensor = mesh["tp"] if data_parallel else mesh
    layout = Shard(1) if sequence else Replicate()
    head = ColwiseParallel(input_layouts=layout, output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, tensor, {"head": head})
    mine, options = slice(None), {}
    if data_parallel:
        fully_shard(model, mesh=mesh["dp"])
        rows = 2 * mesh["dp"].get_local_rank()
        mine = slice(rows, rows + 2)
        options = {"normalizer": (y != -100).sum() / 2}  # as FSDP averages over the two
    optimizer, other = torch.optim.SGD(model.parameters(), lr=0.5), torch.optim.SGD(alone.parameters(), lr=0.5)
    for _ in range(3):
        hidden = x[mine]
        if sequence:
            hidden = hidden.chunk(tensor.size(), 1)[tensor.get_local_rank()]
        loss = xent.cross_entropy(model(hidden), y[mine], **options)
        assert isinstance(loss, DTensor)
        assert loss.placements == (Replicate(),)
        loss.backward()
        if sequence:  # the body ran on a part of each sequence: as users do, add its gradients up
            for parameter in model.body.parameters():
                local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
                torch.distributed.all_reduce(local, group=tensor.get_group())
        expected = xent.cross_entropy(alone(x), y)
        expected.backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(full(p.grad), q.grad, rtol=1e-11, atol=1e-13)
        optimizer.step()
        other.step()
        optimizer.zero_grad()
        other.zero_grad()


@pytest.mark.parametrize("sequence", [False, True], ids=["replicated", "sequence-sharded"])
def test_column_parallel_head(ranks: Ranks, sequence: bool) -> None:
    ranks.run(train, 2, sequence, False)


@pytest.mark.parametrize("sequence", [False, True], ids=["replicated", "sequence-sharded"])
def test_after_fully_shard(ranks: Ranks, sequence: bool) -> None:
    ranks.run(train, 4, sequence, True)
