"""Backward in place: the same gradient to the bit, where the logits were; and nobody takes it for the logits."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from oracle import Options, every_dtype, loss_and_grad
from ranks import Ranks, mesh_of
from test_autograd import batch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import xent

on_each_backend = pytest.mark.usefixtures("backend")
IN_PLACE: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "(C)": lambda: (torch.randn(5), torch.tensor(2)),
    "(N, C)": lambda: (torch.randn(6, 5), torch.tensor([-100, 1, 2, 3, 4, 0])),
    "(B, T, V)": lambda: (torch.randn(2, 3, 5), torch.tensor([[-100, 1, 2], [3, 4, 0]])),
    "rows far apart": lambda: (torch.randn(6, 9)[:, :5], torch.tensor([-100, 1, 2, 3, 4, 0])),
    "transposed": lambda: (torch.randn(5, 6).t(), torch.tensor([-100, 1, 2, 3, 4, 0])),
    "probabilities": lambda: (torch.randn(6, 5), torch.rand(6, 5)),
    "(N, C, d1)": lambda: (torch.randn(2, 5, 3), torch.tensor([[-100, 1, 2], [3, 4, 0]])),
    "(B, T, V), cut in T": lambda: (torch.randn(2, 4, 5)[:, :-1], torch.tensor([[-100, 1, 2], [3, 4, 0]])),
    "a step between that is none": lambda: (torch.randn(1, 2, 3, 5).transpose(0, 1), torch.arange(6).view(2, 1, 3) % 5),
    "a target in another order": lambda: (torch.randn(2, 3, 5), torch.tensor([[-100, 1], [2, 3], [4, 0]]).t()),
}
every_in_place = pytest.mark.parametrize("make", IN_PLACE.values(), ids=IN_PLACE)


@on_each_backend
@every_dtype
@every_in_place
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"softcap": 3.0}], ids=str)
def test_inplace_backward(make: Callable[[], tuple[Tensor, Tensor]], options: Options, dtype: torch.dtype) -> None:
    """The gradient is that of the plain backward, to the bit, and lies where the logits were."""
    torch.manual_seed(0)
    x, target = make()
    x = x.to(dtype)
    target = target.to(dtype) if target.is_floating_point() else target
    expected = loss_and_grad(xent.cross_entropy, x.clone(), target, **options)
    loss, grad = loss_and_grad(xent.cross_entropy, x, target, inplace_backward=True, **options)
    assert loss.equal(expected[0])
    assert grad.equal(expected[1])
    assert grad.data_ptr() == x.data_ptr()
    assert x.equal(expected[1])


def test_inplace_backward_through_a_model() -> None:
    x, y = batch(6, 5)
    head = torch.nn.Linear(5, 4)
    y = y.clamp(max=3)
    grads = []
    for inplace in (False, True):
        loss = xent.cross_entropy(head(x), y, inplace_backward=inplace)
        grads.append(torch.autograd.grad(loss, [x, *head.parameters()]))
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))


@on_each_backend
def test_inplace_backward_beside_probabilities_that_learn() -> None:
    """Their gradient needs the logits, and is taken before these are overwritten."""
    x, _ = batch(6, 5)
    grads = []
    for inplace in (False, True):
        q = torch.linspace(0.1, 1, 30).view(6, 5).requires_grad_()
        loss = xent.cross_entropy(x.clone(), q, label_smoothing=0.1, inplace_backward=inplace)
        grads.append(torch.autograd.grad(loss, [x, q]))
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))


def test_inplace_backward_cannot_be_differentiated_again() -> None:
    x, y = batch(6, 5)
    before = x.detach().clone()
    loss = xent.cross_entropy(x, y, inplace_backward=True)
    with pytest.raises(RuntimeError, match=r"inplace_backward=True: .* cannot be differentiated again"):
        torch.autograd.grad(loss, x, create_graph=True)
    assert x.detach().equal(before)


def test_inplace_backward_of_several_gradients_at_once_raises() -> None:
    x, y = batch(6, 5)
    before = x.detach().clone()
    loss = xent.cross_entropy(x, y, inplace_backward=True)
    with pytest.raises(RuntimeError, match="inplace_backward: expected one gradient"):
        torch.autograd.grad(loss, x, torch.ones(2), is_grads_batched=True)
    assert x.equal(before)


@pytest.mark.parametrize("shared", ["rows", "classes"])
@pytest.mark.parametrize("ignored", [-100, 0], ids=["some ignored", "all rows count"])
def test_inplace_backward_of_expanded_logits_raises(shared: str, ignored: int) -> None:
    """Several logits in one place have no room for several gradients."""
    x, y = batch(6, 5)
    y[0] = ignored
    before = x.detach().clone()
    view = x[:1] if shared == "rows" else x[:, :1]
    with pytest.raises(RuntimeError, match=r"(?i)inplace|single memory location"):
        xent.cross_entropy(view.expand(6, 5), y, inplace_backward=True).backward()
    assert x.detach().equal(before)


# A second use of the logits, which are gone

LOSSES: dict[str, Options] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "normalizer": {"normalizer": 3.0},
    "normalizer that requires grad": {"normalizer": torch.tensor(3.0, requires_grad=True)},
    "weight": {"weight": torch.tensor([0.5, 1.0, 2.0, 1.0, 3.0])},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.1},
    "softcap and scale": {"softcap": 3.0, "logit_scale": 0.5},
    "probabilities": {"soft": True},
    "probabilities, weight, smoothing": {
        "soft": True,
        "label_smoothing": 0.1,
        "weight": torch.tensor([0.5, 1.0, 2.0, 1.0, 3.0]),
    },
}
every_loss = pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)


class Nothing(TorchDispatchMode):
    """Looks on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def looked_on(f: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    with Nothing():
        return f(x, y)


def compiled_backward() -> AbstractContextManager[Any]:
    return compiled_autograd._enable(partial(torch.compile, backend="aot_eager", fullgraph=True))


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "under a mode": Nothing,
    "compiled autograd": compiled_backward,
}
WAYS: dict[str, Callable[[Callable[..., Tensor], Tensor, Tensor], Tensor]] = {
    "as it is": lambda f, x, y: f(x, y),
    "under a mode": looked_on,
    "compiled autograd": lambda f, x, y: f(x, y),
    "checkpointed": lambda f, x, y: checkpoint(f, x, y, use_reentrant=False),
    "aot_eager": lambda f, x, y: torch.compile(f, backend="aot_eager", fullgraph=True)(x, y),
    "inductor": lambda f, x, y: torch.compile(f, backend="inductor", fullgraph=True)(x, y),
}


def second_uses(way: str, classes: int, leaf: bool, options: Options) -> list[str]:
    """What a second use of the logits says: of an older user, a newer one, and the loss itself."""
    torch.manual_seed(0)
    soft, options = options.get("soft"), {name: value for name, value in options.items() if name != "soft"}
    x, y = torch.randn(6, classes), torch.rand(6, classes) if soft else torch.tensor([-100, 1, 2, 3, 4, 0])
    leaves = x.requires_grad_()
    logits = leaves if leaf else leaves * 1

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return xent.cross_entropy(logits, y, inplace_backward=True, **options).sum()

    older = (logits**2).sum()
    with CONTEXTS.get(way, warnings.catch_warnings)():
        value = WAYS[way](loss, logits, y)
        newer = (logits**2).sum()
        before = logits.detach().clone().requires_grad_()
        value.backward(retain_graph=True)
    (expected,) = torch.autograd.grad(xent.cross_entropy(before, y, **options).sum(), before)
    torch.testing.assert_close(logits.detach(), expected)
    said = []
    for again in (older, newer, value):
        try:
            again.backward(retain_graph=True)
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    return said


def assert_all_raise(said: list[str]) -> None:
    for text in said:
        assert "modified by an inplace operation" in text


@on_each_backend
@every_loss
@pytest.mark.parametrize("leaf", [False, True], ids=["", "leaf"])
@pytest.mark.parametrize("way", ["as it is", "under a mode", "checkpointed"])
def test_a_second_use_raises(way: str, leaf: bool, options: Options) -> None:
    """autograd's own error, as after any operation in place."""
    assert_all_raise(second_uses(way, 5, leaf, options))


@on_each_backend
def test_a_second_use_raises_where_the_logits_are_many() -> None:
    assert_all_raise(second_uses("as it is", 20_000, False, {}))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own doings
@pytest.mark.parametrize("loss", ["mean", "none", "probabilities, weight, smoothing"])
@pytest.mark.parametrize("way", ["aot_eager", "inductor", "compiled autograd"])
def test_a_second_use_raises_when_compiled(way: str, loss: str) -> None:
    torch.compiler.reset()
    assert_all_raise(second_uses(way, 5, False, LOSSES[loss]))


def over_ranks(group: ProcessGroup, ways: list[str]) -> list[str]:
    warnings.simplefilter("ignore")  # the compiler warns of its own doings
    torch.compiler.reset()
    every = LOSSES.values() if ways == ["as it is"] else [{}]
    mine = {name: options | {"group": group} for name, options in zip(map(str, range(20)), every, strict=False)}
    for options in mine.values():
        if "weight" in options:
            options["weight"] = options["weight"].repeat(group.size())
    return [text for way in ways for options in mine.values() for text in second_uses(way, 5, False, options)]


@pytest.mark.parametrize(("world", "ways"), [(1, ["as it is"]), (2, ["as it is"]), (2, ["under a mode", "aot_eager"])])
def test_a_second_use_raises_over_ranks(ranks: Ranks, world: int, ways: list[str]) -> None:
    for said in ranks.run(over_ranks, world, ways):
        assert_all_raise(said)


def of_dtensor(group: ProcessGroup) -> str:
    mesh = mesh_of(group, 1)
    x, y = (
        distribute_tensor(torch.randn(4, 6), mesh, [Shard(1)]),
        distribute_tensor(torch.arange(4), mesh, [Replicate()]),
    )
    with pytest.raises(RuntimeError) as caught:
        xent.cross_entropy(x.requires_grad_(), y, inplace_backward=True)
    return str(caught.value)


def test_dtensors_are_refused(ranks: Ranks) -> None:
    """They do not see what happens to their local parts: a second use could not raise."""
    for text in ranks.run(of_dtensor, 2):
        assert text.startswith("inplace_backward: expected plain logits: a DTensor does not see")


def test_statistics_have_no_such_option() -> None:
    """Nor have the linear losses, whose logits nobody else has ever seen."""
    for function in (xent.token_stats, xent.linear_cross_entropy, xent.linear_token_stats):
        assert "inplace_backward" not in inspect.signature(function).parameters
