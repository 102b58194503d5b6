"""What backward has saved it unpacks once: a checkpoint allows one look, and a hook may have to fetch it from disk."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

import xent


def functions() -> set[type[Function]]:
    """Every autograd Function of the package."""
    found: set[type[Function]] = set()
    for module in pkgutil.walk_packages(xent.__path__, "xent."):
        if not module.name.endswith("__main__"):
            with suppress(ModuleNotFoundError):  # Triton or Transformers, where it is not installed
                importlib.import_module(module.name)
    left = [Function]
    while left:
        below = left.pop().__subclasses__()
        left += below
        found |= {function for function in below if function.__module__.split(".")[0] == "xent"}
    return found


class Unpackings:
    """Whose backward ran, and how often one saved tensor was unpacked in one pass at most."""

    def __init__(self) -> None:
        self.ran: set[str] = set()
        self.most = 0

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Note the name of every Function of the package whose backward is called."""
        for function in functions():
            patch.setattr(function, "backward", staticmethod(self._noting(function.backward)))

    def _noting(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        def noting(ctx: Any, *grads: Any) -> Any:
            self.ran.add(type(ctx)._forward_cls.__name__)
            return backward(ctx, *grads)

        return noting

    def grad(self, counts: Counter[int], loss: Tensor, leaves: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
        """The gradients by one pass."""
        counts.clear()
        found = torch.autograd.grad(loss.sum(), leaves, **options)
        self.most = max(self.most, *counts.values())
        return found


def leaves_of(soft: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = {"x": torch.randn(6, 5), "h": torch.randn(6, 3), "W": torch.randn(5, 3), "b": torch.randn(5)}
    found = {name: tensor.double().requires_grad_() for name, tensor in made.items()}
    return found | {"y": torch.rand(6, 5).double().requires_grad_() if soft else torch.randint(5, (6,))}


def dense(t: dict[str, Tensor], **options: Any) -> Tensor:
    return xent.cross_entropy(t["x"], t["y"], **options)


def linear(t: dict[str, Tensor], **options: Any) -> Tensor:
    return xent.linear_cross_entropy(t["h"], t["W"], t["y"], linear_bias=t["b"], **options)


def entropy(t: dict[str, Tensor], **options: Any) -> Tensor:
    return sum(s for s in xent.token_stats(t["x"], t["y"], entropy=True, **options) if s is not None)  # type: ignore[return-value]


def linear_entropy(t: dict[str, Tensor], **options: Any) -> Tensor:
    found = xent.linear_token_stats(t["h"], t["W"], t["y"], linear_bias=t["b"], entropy=True, **options)
    return sum(s for s in found if s is not None)  # type: ignore[return-value]


def differentiable_weight(t: dict[str, Tensor], **options: Any) -> Tensor:
    return dense(t, weight=t["b"].abs(), label_smoothing=0.1, z_loss=0.1, **options)


# Each twice: with indices and with probabilities that require grad; alone and, if it can be, over a group.
LOSSES: dict[str, tuple[Callable[..., Tensor], dict[str, Any], bool, bool]] = {
    "mean": (dense, {}, True, True),
    "none, smoothing": (dense, {"reduction": "none", "label_smoothing": 0.1, "softcap": 3.0}, True, True),
    "weight that requires grad": (differentiable_weight, {}, True, False),
    "statistics": (entropy, {}, False, True),
    "linear mean": (linear, {"label_smoothing": 0.1}, True, True),
    "linear none": (linear, {"reduction": "none"}, True, True),
    "linear statistics": (linear_entropy, {}, False, True),
    "linear, sparse": (linear, {"grad_resolution": 0.1}, False, True),
}
CASES = [
    (name, soft, parallel)
    for name, (_, _, soft_too, parallel_too) in LOSSES.items()
    for soft in ([False, True] if soft_too else [False])
    for parallel in ([False, True] if parallel_too else [False])
    if soft or name != "weight that requires grad"
]


def losses(group: ProcessGroup) -> Iterator[tuple[str, Callable[[], tuple[Tensor, list[Tensor]]]]]:
    """Name, and what makes a loss and the leaves that it depends on."""
    for name, soft, parallel in CASES:
        function, options, *_ = LOSSES[name]

        def make(
            function: Any = function, soft: bool = soft, options: Any = options, parallel: bool = parallel
        ) -> tuple[Tensor, list[Tensor]]:
            t = leaves_of(soft)
            loss = function(t, **options, **({"group": group} if parallel else {}))
            names = (["h", "W", "b"] if "linear" in function.__name__ else ["x"]) + ["y"] * soft
            return loss, [t[name] for name in names]

        yield f"{name}{', soft' if soft else ''}{', group' if parallel else ''}", make


def unpackings(group: ProcessGroup) -> tuple[set[str], dict[str, int]]:
    """Which backwards ran; and for each loss `Unpackings.most` of two orders, with forward mode on and off."""
    ran: set[str] = set()
    most: dict[str, int] = {}
    counts: Counter[int] = Counter()
    numbers = iter(range(10**9))
    boxes: dict[int, Tensor] = {}

    def pack(x: Tensor) -> int:
        number = next(numbers)
        boxes[number] = x
        return number

    def unpack(number: int) -> Tensor:
        counts[number] += 1
        return boxes[number]

    for name, make in losses(group):
        seen = Unpackings()
        with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            seen.watch(patch)
            for level in (nullcontext, forward_ad.dual_level):
                with level():
                    seen.grad(counts, *make())
                    again(seen, counts, make)
        ran |= seen.ran
        most[name] = seen.most
    return ran, most


def again(seen: Unpackings, counts: Counter[int], make: Callable[[], tuple[Tensor, list[Tensor]]]) -> None:
    """A second derivative, or its refusal."""
    loss, leaves = make()
    grads = seen.grad(counts, loss, leaves, create_graph=True)
    for grad in grads:
        try:
            seen.grad(counts, grad, leaves, retain_graph=True, allow_unused=True)
        except NotImplementedError:
            assert max(counts.values(), default=0) <= 1


def test_every_function_unpacks_once(ranks: Ranks) -> None:
    """And every one of them is met here."""
    [(ran, most)] = ranks.run(unpackings, 1)
    assert most == dict.fromkeys(most, 1)
    missed = {function.__name__ for function in functions()} - ran
    assert not missed, "add a loss whose backward uses it"


def checkpointed(group: ProcessGroup) -> list[str]:
    """The losses whose checkpoint has other gradients than they."""
    wrong = []
    for name, soft, parallel in CASES:
        function, options, *_ = LOSSES[name]
        options = options | ({"group": group} if parallel else {})
        found = []
        for through in (lambda f, *args: f(*args), lambda f, *args: checkpoint(f, *args, use_reentrant=False)):
            t = leaves_of(soft)
            keys = list(t)

            def loss(
                *tensors: Tensor, function: Any = function, options: Any = options, keys: list[str] = keys
            ) -> Tensor:
                return function(dict(zip(keys, tensors, strict=True)), **options).sum()  # type: ignore[no-any-return]

            leaves = [tensor for tensor in t.values() if tensor.requires_grad]
            value = through(loss, *t.values())
            found.append([value, *torch.autograd.grad(value, leaves, allow_unused=True)])
        equal = [a is b or (a is not None and b is not None and a.equal(b)) for a, b in zip(*found, strict=True)]
        wrong += [] if all(equal) else [f"{name}, {soft=}, {parallel=}"]
    return wrong


def test_checkpoint(ranks: Ranks) -> None:
    """Of every loss, those of probabilities that require grad, too: the plain one's gradients to the bit."""
    assert ranks.run(checkpointed, 1) == [[]]


def backwards(x: Tensor) -> Tensor:
    """The same numbers with the first dimension innermost."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_tensors_that_come_back_with_other_strides(soft: bool, weighted: bool, reduction: str) -> None:
    """From a hook; and the gradient of the losses, from whoever computed it."""
    x = torch.randn(4, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    y = x.detach().softmax(1) if soft else torch.randint(6, (4, 5, 7))
    weight = torch.rand(6, dtype=torch.float64) if weighted else None
    options: dict[str, Any] = {"dim": 1, "weight": weight, "reduction": reduction}
    loss = xent.cross_entropy(x, y, **options)
    g = torch.randn(loss.shape, dtype=torch.float64)
    (expected,) = torch.autograd.grad(loss, x, g)
    for unpack, of_losses in ((backwards, g), (lambda saved: saved, backwards(g))):
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, unpack):
            loss = xent.cross_entropy(x, y, **options)
        (found,) = torch.autograd.grad(loss, x, of_losses)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
        assert not found._is_view()  # autograd may add to it in place
