"""The loss over ranks with the rest of PyTorch: gradcheck, torch.func, torch.compile, DDP; and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from oracle import Options
from ranks import Ranks
from test_parallel import Sizes, inputs, part
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

import xent
from xent._ranks import exchange as _exchange


class Cut(torch.autograd.Function):
    """This rank's part of what all ranks hold. Its gradient is the whole: the parts of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, sizes: Sizes) -> Tensor:
        ctx.group, ctx.sizes, ctx.shape = group, sizes, x.shape
        return part(x, sizes, group.rank())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        whole = grad.new_zeros(ctx.shape)
        whole.split(ctx.sizes, -1)[ctx.group.rank()].copy_(grad)
        torch.distributed.all_reduce(whole, group=ctx.group)
        return whole, None, None


def gradcheck(group: ProcessGroup, sizes: Sizes, soft: bool, options: Options, stats: bool) -> bool:
    """Each rank perturbs the same number of the same logits, and they take each step together."""
    x, y = oracle.rows(torch.float64, N=4, C=sum(sizes), soft=soft)
    x = (x / 3).requires_grad_()
    y = y.requires_grad_() if soft else y

    def loss(x: Tensor, y: Tensor) -> Any:
        x, y = Cut.apply(x, group, sizes), Cut.apply(y, group, sizes) if soft else y
        if stats:
            return xent.token_stats(x, y, dim=1, group=group, entropy=True, **options)[:3]
        return xent.cross_entropy(x, y, dim=1, group=group, **options)

    return torch.autograd.gradcheck(loss, (x, y))


@pytest.mark.parametrize("sizes", [(4, 3), (2, 0, 5)], ids=str)
@pytest.mark.parametrize(
    ("soft", "options"),
    [
        (False, {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.7, "ignore_index": 6}),
        (False, {"reduction": "none", "weight": torch.arange(1.0, 8.0)}),
        (True, {"label_smoothing": 0.2, "weight": torch.arange(1.0, 8.0), "reduction": "none"}),
    ],
    ids=["everything", "weights", "probabilities"],
)
def test_gradcheck(ranks: Ranks, sizes: Sizes, soft: bool, options: Options) -> None:
    assert all(ranks.run(gradcheck, len(sizes), sizes, soft, options, False))


@pytest.mark.parametrize("sizes", [(7,), (4, 3), (2, 0, 5)], ids=str)
def test_gradcheck_of_token_stats(ranks: Ranks, sizes: Sizes) -> None:
    assert all(ranks.run(gradcheck, len(sizes), sizes, False, {"softcap": 3.0}, True))


# torch.func


def transform(group: ProcessGroup, name: str) -> Tensor | str:
    """The gradient by one way or another; or what is said against it."""
    x, y = inputs(torch.float64, False)
    x = part(x, (20, 17), group.rank())

    def loss(x: Tensor, y: Tensor = y) -> Tensor:
        return xent.cross_entropy(x, y, dim=x.dim() - 1, group=group, label_smoothing=0.1, reduction="sum")

    def backward(create_graph: bool) -> Tensor:
        z = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(z), z, create_graph=create_graph)
        return torch.autograd.grad(grad.sum(), z)[0] if create_graph else grad

    def of_probabilities() -> Tensor:
        z, q = x.nan_to_num().requires_grad_(), torch.full_like(x, 1 / 37, requires_grad=True)
        (dq,) = torch.autograd.grad(loss(z, q), q, create_graph=True)
        return torch.autograd.grad(dq.sum(), z)[0]

    func = torch.func
    ways: dict[str, Callable[[], Any]] = {
        "backward": lambda: backward(False),
        "grad": lambda: func.grad(loss)(x),
        "vjp": lambda: func.vjp(loss, x)[1](torch.ones(()).double())[0],
        "vmap of grad": lambda: func.vmap(func.grad(loss))(x, y),
        "vmap beside one target": lambda: func.vmap(func.grad(loss))(torch.stack([x, x]))[1],
        "grad of vmap": lambda: func.grad(lambda x: func.vmap(loss)(x, y).sum())(x),
        "create_graph": lambda: backward(True),
        "of probabilities": of_probabilities,
        "grad of grad": lambda: func.grad(lambda x: func.grad(loss)(x).sum())(x),
        "jvp": lambda: func.jvp(loss, (x,), (x,)),
        "jacfwd": lambda: func.jacfwd(loss)(x),
        "hessian": lambda: func.hessian(loss)(x),
    }
    try:
        return ways[name]()
    except NotImplementedError as error:
        return str(error)


@pytest.mark.parametrize("name", ["grad", "vjp", "vmap of grad", "vmap beside one target", "grad of vmap"])
def test_first_derivatives_in_reverse(ranks: Ranks, name: str) -> None:
    for got, expected in zip(ranks.run(transform, 2, name), ranks.run(transform, 2, "backward"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", ["create_graph", "grad of grad", "of probabilities"])
def test_second_derivatives_are_refused(ranks: Ranks, name: str) -> None:
    """They would lack all that goes through the logits of the other ranks, and nobody would notice."""
    for text in ranks.run(transform, 2, name):
        assert text.startswith("group: a second derivative of a loss whose classes are spread over ranks needs ")


@pytest.mark.parametrize("name", ["jvp", "jacfwd", "hessian"])
def test_forward_mode_is_refused(ranks: Ranks, name: str) -> None:
    for text in ranks.run(transform, 2, name):
        assert text.startswith("group: forward mode of a loss whose classes are spread over ranks needs ")


# torch.compile


def gathers() -> int:
    return sum(agreed.count for agreed in _exchange._agreed.values())


def compiled(group: ProcessGroup, sizes: Sizes, backend: str, kind: str) -> int:
    """Loss and gradient compiled in one graph are those without; the number of gathers of the compiled step."""
    torch.compiler.reset()
    warnings.simplefilter("ignore")  # the compiler warns of its own doings
    x, y = inputs(torch.float32, kind == "probabilities")
    x = part(x, sizes, group.rank()).requires_grad_()
    y = part(y, sizes, group.rank()) if y.is_floating_point() else y
    options = {"inplace_backward": True} if kind == "in place" else {}
    if kind == "weights":
        options["weight"] = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(1))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        if kind == "statistics":
            stats = xent.token_stats(x * 2, y, dim=1, group=group, entropy=True, prediction=True)
            return (stats.log_prob * stats.prediction + stats.entropy).sum()
        return xent.cross_entropy(x * 2, y, dim=1, group=group, label_smoothing=0.1, z_loss=0.1, **options)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        before = gathers()
        value = function(x, y)
        results.append((value.detach(), *torch.autograd.grad(value, x)))
    torch.testing.assert_close(*results)
    return gathers() - before


@pytest.mark.parametrize("kind", ["indices", "probabilities", "weights", "in place", "statistics"])
@pytest.mark.parametrize("sizes", [(20, 17)], ids=str)
def test_compile(ranks: Ranks, sizes: Sizes, kind: str) -> None:
    assert ranks.run(compiled, len(sizes), sizes, "aot_eager", kind) == [1] * len(sizes)


def test_compile_by_inductor(ranks: Ranks) -> None:
    assert ranks.run(compiled, 2, (20, 17), "inductor", "indices") == [1, 1]


def compiled_failure(group: ProcessGroup) -> str:
    """At run time a compiled loss tells the ranks apart as any other does."""
    torch.compiler.reset()
    warnings.simplefilter("ignore")  # the compiler warns of its own doings
    loss = torch.compile(xent.cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    N = 8 + group.rank()
    with pytest.raises(ValueError, match="expected the same call on all 2 ranks") as caught:
        loss(torch.zeros(N, 5), torch.zeros(N, dtype=torch.long), group=group)
    return str(caught.value)


def test_ranks_that_disagree_in_compiled_code(ranks: Ranks) -> None:
    for text in ranks.run(compiled_failure, 2):
        assert "rank 0 with 8 rows" in text
        assert "rank 1 with 9 rows" in text


# Data parallel


def recipe(group: ProcessGroup) -> tuple[list[Tensor], list[Tensor]]:
    """The one in the docstring of `cross_entropy`: DDP averages gradients, so each rank divides by the mean count."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 5), torch.randint(7, (6,))
    y[1:3] = -100  # of the first rank's rows, two count for nothing
    alone = nn.Linear(5, 7)
    model = DistributedDataParallel(nn.Linear(5, 7), process_group=group)
    model.module.load_state_dict(alone.state_dict())
    mine = slice(3 * group.rank(), 3 * group.rank() + 3)

    count = (y[mine] != -100).sum()
    torch.distributed.all_reduce(count, group=group)
    xent.cross_entropy(model(x[mine]), y[mine], normalizer=count / group.size()).backward()

    xent.cross_entropy(alone(x), y).backward()
    return [p.grad for p in model.parameters()], [p.grad for p in alone.parameters()]


def test_mean_over_data_parallel_ranks(ranks: Ranks) -> None:
    for got, expected in ranks.run(recipe, 2):
        torch.testing.assert_close(got, expected)
