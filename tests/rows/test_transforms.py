"""torch.func, forward mode and higher derivatives: the same numbers as from the loss written out in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from pairs import pairwise
from torch import Tensor, func
from torch.autograd import gradcheck, gradgradcheck

import xent

Loss = Callable[..., Tensor]

WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5], dtype=torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "weight": {"weight": WEIGHT},
    "smoothing and z-loss": {"label_smoothing": 0.1, "z_loss": 0.1},
    "softcap and scale": {"softcap": 2.0, "logit_scale": 0.8},
    "all": {"weight": WEIGHT, "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0},
}
INDICES = torch.tensor([1, -100, 4, 0])
PROBABILITIES = torch.tensor([[1, 2, 3, 0, 4], [0, 0, 1, 0, 0], [5, 1, 1, 1, 2], [1, 1, 1, 1, 1]]).double() / 10
TARGETS = {"indices": INDICES, "probabilities": PROBABILITIES}


def logits(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64)


TRANSFORMS: dict[str, Callable[[Loss, Tensor, Tensor], Any]] = {
    "grad": lambda f, x, v: func.grad(f)(x),
    "vjp": lambda f, x, v: func.vjp(f, x)[1](torch.tensor(2.0, dtype=x.dtype)),
    "jvp": lambda f, x, v: func.jvp(f, (x,), (v,)),
    "jacrev": lambda f, x, v: func.jacrev(f)(x),
    "jacfwd": lambda f, x, v: func.jacfwd(f)(x),
    "hessian": lambda f, x, v: func.hessian(f)(x),
    "reverse over reverse": lambda f, x, v: func.jacrev(func.jacrev(f))(x),
    "forward over reverse": lambda f, x, v: func.jvp(func.grad(f), (x,), (v,)),
    "reverse over forward": lambda f, x, v: func.grad(lambda x: func.jvp(f, (x,), (v,))[1])(x),
    "third derivative": lambda f, x, v: func.grad(lambda x: func.jvp(func.grad(f), (x,), (v,))[1].square().sum())(x),
}


@pairwise(transform=TRANSFORMS, options=OPTIONS, target=TARGETS)
def test_transform(transform: Callable[..., Any], target: Tensor, options: dict[str, Any]) -> None:
    x, v = logits(2, 4, 5)
    found, expected = (
        transform(lambda x, f=f: f(x, target, **options), x, v) for f in (xent.cross_entropy, oracle.cross_entropy)
    )
    torch.testing.assert_close(found, expected)


def test_jacobian_of_each_row() -> None:
    x = logits(4, 5)
    found, expected = (
        func.jacrev(lambda x, f=f: f(x, INDICES, reduction="none"))(x)
        for f in (xent.cross_entropy, oracle.cross_entropy)
    )
    torch.testing.assert_close(found, expected)


# in_dims, and how to lay out logits (3, 4, 5) and targets (3, 4) for them
MAPPED: dict[str, tuple[Any, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "samples": ((0, 0), lambda x: x, lambda y: y),
    "logits alone": ((0, None), lambda x: x, lambda y: y[0]),
    "targets alone": ((None, 0), lambda x: x[0], lambda y: y),
    "another dimension": ((2, 1), lambda x: x.movedim(0, 2), lambda y: y.movedim(0, 1)),
}


@pairwise(options=OPTIONS, mapped=MAPPED, wrap={"value": lambda f: f, "grad": func.grad, "hessian": func.hessian})
def test_vmap(options: dict[str, Any], mapped: Any, wrap: Any) -> None:
    """Per-sample values, gradients and Hessians, as a loop over the samples gives them."""
    in_dims, lay_x, lay_y = mapped
    x, y = logits(3, 4, 5), torch.stack([INDICES.roll(i) for i in range(3)])

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return xent.cross_entropy(x, y, **options)

    found = func.vmap(wrap(loss), in_dims=in_dims)(lay_x(x), lay_y(y))
    xs = x if in_dims[0] is not None else x[:1].expand(3, 4, 5)
    ys = y if in_dims[1] is not None else y[:1].expand(3, 4)
    torch.testing.assert_close(found, torch.stack([wrap(loss)(a, b) for a, b in zip(xs, ys, strict=True)]))


def test_vmap_is_one_call_and_not_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    primitive = xent._rows.dispatch.row_statistics

    def counted(logits: Tensor, *args: Any, **options: Any) -> Any:
        calls.append(logits.shape[:2].numel())
        return primitive(logits, *args, **options)

    monkeypatch.setattr(xent._rows.dispatch, "row_statistics", counted)
    func.vmap(func.vmap(xent.cross_entropy))(logits(2, 3, 4, 5), torch.zeros(2, 3, 4, dtype=torch.int64))
    assert calls == [24]


def test_vmap_over_weight_is_refused() -> None:
    x = logits(4, 5)
    with pytest.raises(NotImplementedError, match=r"^weight: cannot be mapped by vmap"):
        func.vmap(lambda w: xent.cross_entropy(x, PROBABILITIES, w))(torch.ones(3, 5, dtype=torch.float64))


def test_forward_over_forward_is_refused() -> None:
    """torch itself gives custom Functions a tangent of 0 there."""
    x, v = logits(2, 4, 5)
    with pytest.raises(NotImplementedError, match=r"^forward mode over forward mode"):
        func.jvp(lambda x: func.jvp(lambda x: xent.cross_entropy(x, INDICES), (x,), (v,))[1], (x,), (v,))


def test_functional_call() -> None:
    """The class weights of the module replaced for one call."""
    module = xent.CrossEntropyLoss(weight=torch.ones(5, dtype=torch.float64))
    found = func.grad(lambda x: func.functional_call(module, {"weight": WEIGHT}, (x, INDICES)))(logits(4, 5))
    expected = func.grad(lambda x: oracle.cross_entropy(x, INDICES, weight=WEIGHT))(logits(4, 5))
    torch.testing.assert_close(found, expected)


def test_vjp_function_outlives_its_transform() -> None:
    x = logits(4, 5)
    _, backward = func.vjp(lambda x: xent.cross_entropy(x, INDICES), x)
    (found,) = backward(torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(found, func.grad(lambda x: oracle.cross_entropy(x, INDICES))(x))


@pytest.mark.usefixtures("unchecked")  # hundreds of calls with the same few shapes
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_forward_mode_gradcheck(target: Tensor, options: dict[str, Any]) -> None:
    """Probabilities and their class weights are differentiated too."""
    options, target = dict(options), target[:2]
    weight = options.pop("weight", None)
    inputs: tuple[Tensor, ...] = (logits(2, 5).requires_grad_(),)
    if target.is_floating_point():
        inputs += (target.clone().requires_grad_(), (WEIGHT + 0.5).requires_grad_())

    def function(x: Tensor, q: Tensor = target, w: Tensor | None = weight) -> Tensor:
        return xent.cross_entropy(x, q, w, **options)

    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_forward_mode_of_token_stats(softcap: float | None) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        stats = xent.token_stats(x, INDICES, softcap=softcap, entropy=True)
        assert stats.entropy is not None
        return stats.log_prob, stats.lse, stats.entropy

    x = logits(4, 5).requires_grad_()
    assert gradcheck(function, (x,), check_forward_ad=True)
    assert gradgradcheck(function, (x,), check_fwd_over_rev=True)


@pytest.mark.parametrize("transform", ["forward over reverse", "reverse over reverse", "reverse over forward"])
def test_ignored_rows_of_nan_in_higher_derivatives(transform: str) -> None:
    x, v = logits(2, 4, 5)
    clean = x.clone()
    x[1] = torch.nan
    run = TRANSFORMS[transform]
    found, expected = (run(lambda x: xent.cross_entropy(x, INDICES), z, v) for z in (x, clean))
    torch.testing.assert_close(found, expected)
