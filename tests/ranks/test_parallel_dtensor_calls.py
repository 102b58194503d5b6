"""DTensor arguments by position and by keyword, of every function and module; and what Python itself refuses."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import Ranks
from test_parallel_dtensor import R, S, full, mesh_of
from torch import Tensor, nn
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import xent

N, C, D = 6, 7, 4
Arguments = dict[str, Any]

LOGITS: Arguments = {"input": S(1), "target": R}
HEAD: Arguments = {"input": R, "linear_weight": S(0), "target": R, "linear_bias": S(0)}
# What each takes, and where it lies; the modules hold the rest.
CALLERS: dict[str, Arguments] = {
    "cross_entropy": {**LOGITS, "weight": S(0), "normalizer": R},
    "token_stats": LOGITS,
    "linear_cross_entropy": {**HEAD, "weight": S(0), "normalizer": R},
    "linear_token_stats": HEAD,
    "CrossEntropyLoss": LOGITS,
    "LinearCrossEntropyLoss": {"input": R, "target": R},
}
every_caller = pytest.mark.parametrize("name", CALLERS)


def numbers(name: str) -> Arguments:
    """Plain tensors for the arguments of a caller."""
    torch.manual_seed(0)
    found: dict[str, Tensor] = {
        "input": torch.randn(N, D if "inear" in name else C),
        "linear_weight": torch.randn(C, D),
        "linear_bias": torch.randn(C),
        "target": torch.randint(C, (N,)),
        "weight": torch.rand(C) + 0.1,
        "normalizer": torch.tensor(5.0),
    }
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def caller(name: str, mesh: DeviceMesh | None = None) -> Callable[..., Any]:
    """The function, or a module with a class weight, whose head and weight are spread over the mesh."""
    found = getattr(xent, name)
    if not isinstance(found, type):
        return found  # type: ignore[no-any-return]
    torch.manual_seed(1)
    weight = torch.rand(C).double() + 0.1
    if mesh is not None:
        weight = distribute_tensor(weight, mesh, [S(0)], src_data_rank=None)
    if name == "CrossEntropyLoss":
        return found(weight)  # type: ignore[no-any-return]
    module: nn.Module = found(D, C, bias=True, weight=weight, dtype=torch.float64)
    return module if mesh is None else parallelize_module(module, mesh, {"linear": ColwiseParallel()})


def positional(call: Callable[..., Any]) -> list[str]:
    """The names of the arguments that may come by position."""
    signature = inspect.signature(call.forward if isinstance(call, nn.Module) else call)
    return [p.name for p in signature.parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]


def ways(call: Callable[..., Any], arguments: Arguments) -> list[tuple[list[Any], Arguments]]:
    """The same call with 0, 1, ... arguments by position, and the others by keyword, last first."""
    names = [name for name in positional(call) if name in arguments]
    found = []
    for count in range(len(names) + 1):
        rest = [name for name in reversed(arguments) if name not in names[:count]]
        found.append(([arguments[name] for name in names[:count]], {name: arguments[name] for name in rest}))
    return found


def called(group: ProcessGroup, name: str) -> int:
    mesh, plain, places = mesh_of(group, 1), numbers(name), CALLERS[name]
    plain = {key: plain[key] for key in places}
    spread = {key: distribute_tensor(x, mesh, [places[key]], src_data_rank=None) for key, x in plain.items()}
    expected, call = caller(name)(**plain), caller(name, mesh)
    all_ways = ways(call, spread)
    for args, kwargs in all_ways:
        found = call(*args, **kwargs)
        assert type(found) is (xent.TokenStats if "stats" in name else type(spread["input"]))
        pairs = zip(found, expected, strict=True) if "stats" in name else [(found, expected)]
        for got, truth in pairs:
            torch.testing.assert_close(full(got), truth, rtol=1e-13, atol=1e-14)
    return len(all_ways)


@every_caller
def test_by_position_and_by_keyword(ranks: Ranks, name: str) -> None:
    found = ranks.run(called, 2, name)
    assert found == [1 + len([key for key in positional(caller(name)) if key in CALLERS[name]])] * 2


def wrong(group: ProcessGroup, name: str) -> list[tuple[str, str, str]]:
    """What is said of each argument given twice, of one too many and of one too few: plain and of DTensors."""
    mesh, plain = mesh_of(group, 1), numbers(name)
    names = positional(caller(name))
    spread = {key: distribute_tensor(x, mesh, [R], src_data_rank=None) for key, x in plain.items()}
    cases = [(key, names, {key: None}) for key in names] + [("too many", [*names, "input"], {}), ("few", names[:1], {})]
    found = []
    for (case, given, again), tensors in itertools.product(cases, (plain, spread)):
        with pytest.raises(TypeError) as caught:
            caller(name)(*[tensors[key] for key in given], **{key: tensors[key] for key in again})
        found.append((case, caught.typename, str(caught.value)))
    return [(case, text, other) for (case, _, text), (_, _, other) in zip(found[::2], found[1::2], strict=True)]


@every_caller
def test_python_itself_refuses(ranks: Ranks, name: str) -> None:
    """An argument that comes twice, too many and too few: the same words, with DTensors and without."""
    for answers in ranks.run(wrong, 1, name):
        for case, text, of_dtensors in answers:
            assert text == of_dtensors
            said = {"too many": "positional arguments but", "few": "missing "}
            assert said.get(case, f"got multiple values for argument '{case}'") in text
            assert text.startswith(f"{name}"), text


def of_parts(group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """The gradients of logits and of a normalizer that is a sum over parts of the batch."""
    mesh, plain = mesh_of(group, 1), numbers("cross_entropy")
    x, y = (distribute_tensor(plain[key], mesh, [S(0)], src_data_rank=None) for key in ("input", "target"))
    x, count = x.requires_grad_(), distribute_tensor(torch.tensor(5.0), mesh, [R]).requires_grad_()
    assert xent.cross_entropy(x, y, normalizer=(y != -100).sum()).full_tensor() == xent.cross_entropy(
        plain["input"], plain["target"]
    )
    return tuple(full(g) for g in torch.autograd.grad(xent.cross_entropy(x, y, normalizer=count), (x, count)))  # type: ignore[return-value]


def test_normalizer_of_a_batch_in_parts(ranks: Ranks) -> None:
    """The count of the targets that are a DTensor is one, too."""
    plain = numbers("cross_entropy")
    x, count = plain["input"].requires_grad_(), torch.tensor(5.0, requires_grad=True)
    expected = torch.autograd.grad(xent.cross_entropy(x, plain["target"], normalizer=count), (x, count))
    for found in ranks.run(of_parts, 2):
        torch.testing.assert_close(found, expected)
