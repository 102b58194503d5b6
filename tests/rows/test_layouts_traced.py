"""Every layout of logits under compilers and tracers, and on tensors without numbers: strides decide, and no error."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import cross_entropy as truth
from pairs import pairs
from test_options import DIMS
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import xent

# The compiler warns of its own use of torch.jit and of its own configuration.
pytestmark = [
    pytest.mark.usefixtures("unchecked"),  # a compiler cannot read the checks
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
Loss = Callable[[Tensor, Tensor], Tensor]
Both = tuple[Tensor, Tensor]  # value and gradient
Run = Callable[[Tensor, Tensor], Both]

STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "cut": lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
    "expanded classes": lambda x: x[..., :1].expand_as(x),
}
IMAGE, SEQUENCE, MATRIX = ((2, 5, 3, 4), (2, 3, 4), None, 1), ((3, 4, 5), (3, 4), None, 2), ((3, 5), (3,), None, 1)
LAYOUTS = [
    *[pytest.param(*p.values, "contiguous", id=str(p.id)) for p in DIMS],
    pytest.param((2, 5, 3, 4), (2, 3, 4), 1, 1, "contiguous", id="(N, C, d1, d2), 1"),
    *[
        pytest.param(*of, name, id=f"{len(of[0])} dimensions, {name}")
        for of in (IMAGE, SEQUENCE, MATRIX)
        for name in list(STRIDES)[1:]
    ],
]


def build(shape: tuple[int, ...], target: tuple[int, ...], strides: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    return STRIDES[strides](x), torch.randint(4, target, generator=generator)


def loss_of(function: Callable[..., Tensor], dim: int | None, axis: int) -> Loss:
    """Of indices and of probabilities in one graph."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        soft = function(x, x.detach().softmax(axis), dim=axis, reduction="none")
        return function(x, y, dim=dim, reduction="none") + 2 * soft

    return loss


def both(loss: Loss, x: Tensor, y: Tensor) -> Both:
    """One loss for each position, and a gradient to which each of them adds differently."""
    x = x.detach().requires_grad_()
    losses = loss(x, y)
    (grad,) = torch.autograd.grad(losses.square().sum(), x)
    return losses.detach(), grad


def by_func(loss: Loss) -> Run:
    def run(x: Tensor, y: Tensor) -> Both:
        losses, pull = torch.func.vjp(lambda x: loss(x, y), x)
        return losses, pull(2 * losses)[0]

    return run


def compiled(**options: Any) -> Callable[[Loss, Tensor, Tensor], Run]:
    def way(loss: Loss, x: Tensor, y: Tensor) -> Run:
        torch._dynamo.reset()
        function = torch.compile(loss, fullgraph=True, **options)
        both(function, x, y)
        return lambda x, y: both(function, x, y)

    return way


class Module(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(x, y)


def exported(loss: Loss, x: Tensor, y: Tensor) -> Run:
    program = torch.export.export(Module(loss), (x, y)).module()
    return lambda x, y: both(program, x, y)


def graph(mode: str) -> Callable[[Loss, Tensor, Tensor], Run]:
    return lambda loss, x, y: make_fx(by_func(loss), tracing_mode=mode)(x, y)


# From a loss and a first batch to a function of any other batch that lies in memory likewise.
WAYS: dict[str, Callable[[Loss, Tensor, Tensor], Run]] = {
    "compile": compiled(backend="aot_eager"),
    "compile, dynamic": compiled(backend="aot_eager", dynamic=True),
    "export": exported,
    "make_fx, real": graph("real"),
    "make_fx, fake": graph("fake"),
    "make_fx, symbolic": graph("symbolic"),
}
LAYOUT = ("shape", "target_shape", "dim", "axis", "strides")
every_layout = pytest.mark.parametrize(LAYOUT, LAYOUTS)


def traced() -> list[Any]:
    """Shapes, strides and ways in pairs; and one way for each rule that finds the class dimension."""
    shapes = {"image": IMAGE, "sequence": SEQUENCE, "matrix": MATRIX}
    cases = [
        (way, shapes[of], strides, f"{of}, {strides}")
        for of, strides, way in pairs(of=shapes, strides=STRIDES, way=WAYS)
    ]
    cases += [(way, p.values, "contiguous", p.id) for way, p in zip(itertools.cycle(WAYS), DIMS, strict=False)]
    return [pytest.param(WAYS[way], *shape, strides, id=f"{way}-{name}") for way, shape, strides, name in cases]


@pytest.mark.parametrize(("way", *LAYOUT), traced())
def test_traced(
    way: Callable[..., Run], shape: Any, target_shape: Any, dim: int | None, axis: int, strides: str
) -> None:
    run = way(loss_of(xent.cross_entropy, dim, axis), *build(shape, target_shape, strides))
    x, y = build(shape, target_shape, strides, seed=1)
    found, expected = run(x, y), both(loss_of(truth, axis, axis), x, y)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("strides", ["contiguous", "channels last", "cut"])
def test_inductor(strides: str) -> None:
    test_traced(compiled(), *(SEQUENCE if strides == "cut" else IMAGE), strides)


def without_numbers(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def described(both: Both) -> list[Any]:
    return [(t.dtype, t.shape, t.stride()) for t in both]


@every_layout
@pytest.mark.parametrize("where", ["fake", "meta"])
def test_shapes_without_numbers(
    where: str, shape: Any, target_shape: Any, dim: int | None, axis: int, strides: str
) -> None:
    loss = loss_of(xent.cross_entropy, dim, axis)
    x, y = build(shape, target_shape, strides)
    if where == "meta":
        found = both(loss, without_numbers(x), without_numbers(y))
    else:
        with FakeTensorMode() as mode:
            found = both(loss, mode.from_tensor(x), mode.from_tensor(y))
    assert described(found) == described(both(loss, x, y))


@every_layout
@pytest.mark.parametrize("where", ["fake", "meta"])
def test_the_same_layouts_are_refused_in_place(
    where: str, shape: Any, target_shape: Any, dim: int | None, axis: int, strides: str
) -> None:
    """Whether the gradient can be written over the logits is read from strides, and so without numbers, too."""

    def refusal(x: Tensor, y: Tensor) -> str | None:
        try:
            xent.cross_entropy(x, y, dim=dim, inplace_backward=True)
        except RuntimeError as error:
            return str(error)
        return None

    x, y = build(shape, target_shape, strides)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = refusal(*map(without_numbers if where == "meta" else mode.from_tensor, (x, y)))
    assert fake == refusal(x, y)
