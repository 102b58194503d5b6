"""The loss among the rest of PyTorch: checkpoints, hooks, modes, autocast, overrides; and what it keeps for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import xent


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 5, dtype=dtype, requires_grad=True), torch.tensor([-100, 1, 2, 3, 4, 0])


def everything(x: Tensor, y: Tensor) -> Tensor:
    """A loss of all statistics."""
    stats = xent.token_stats(x, y, entropy=True)
    assert stats.entropy is not None
    return xent.cross_entropy(x, y, label_smoothing=0.1, z_loss=0.1) + (stats.log_prob * stats.entropy).sum()


@contextlib.contextmanager
def deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], Any]] = {
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "deterministic": deterministic,
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "saved_tensors_hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy),
    "default device": lambda: torch.device("cpu"),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_mode(mode: Callable[[], Any]) -> None:
    x, y = batch()
    (expected,) = torch.autograd.grad(everything(x, y), x)
    with mode():
        (found,) = torch.autograd.grad(everything(x, y), x)
    assert found.equal(expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    x, y = batch()
    (expected,) = torch.autograd.grad(everything(x, y), x)
    checkpoint(everything, x, y, use_reentrant=reentrant).backward()
    assert x.grad is not None
    assert x.grad.equal(expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_a_gradient(mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch()
    monkeypatch.setattr(xent._rows.dispatch, "row_gradient", pytest.fail)
    with mode(), torch.autograd.graph.saved_tensors_hooks(pytest.fail, pytest.fail):
        assert not everything(x, y).requires_grad
    with torch.autograd.graph.saved_tensors_hooks(pytest.fail, pytest.fail):
        assert not everything(x.detach(), y).requires_grad


def test_what_is_kept_is_the_logits_and_numbers_per_row() -> None:
    x, y = batch()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        xent.cross_entropy(x, y)
    large = [tensor for tensor in kept if tensor.numel() > 3 * y.numel()]  # top, lse and mass at most
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast(dtype: torch.dtype) -> None:
    """A float32 loss and the gradient in the logits' dtype, as through a head that autocast ran in half precision."""
    x, y = batch()
    x = x.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = xent.cross_entropy(x, y)
    (grad,) = torch.autograd.grad(loss, x)
    assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss, oracle.cross_entropy(x.double(), y).float())


def test_torch_function_is_asked() -> None:
    """A subclass or a mode sees the call before anything happens, as that of torch's own function."""
    calls: list[Any] = []

    class Logged(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    x, y = batch()
    with Logged():
        loss = xent.cross_entropy(x, y)
    assert calls[0] is xent.cross_entropy
    assert loss.equal(xent.cross_entropy(x, y))


@pytest.mark.usefixtures("unchecked")
def test_torch_function_of_an_argument() -> None:
    class Duck:
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func.__name__, len(args), kwargs

    x, y = batch()
    assert xent.cross_entropy(Duck(), y, reduction="sum") == ("cross_entropy", 2, {"reduction": "sum"})
    assert xent.token_stats(x, Duck()) == ("token_stats", 2, {})


def test_random_numbers_are_not_touched() -> None:
    x, y = batch()
    state = torch.get_rng_state()
    everything(x, y).backward()
    assert torch.get_rng_state().equal(state)


def test_training_loop_of_a_user() -> None:
    """Gradient accumulation, clipping, a scheduler, state_dict: the loss is one line among them."""
    torch.manual_seed(0)
    results = []
    for make in (nn.CrossEntropyLoss, xent.CrossEntropyLoss):
        torch.manual_seed(1)
        model, criterion = nn.Linear(4, 5).double(), make(label_smoothing=0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        for step in range(6):
            x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(5, (6,))
            (criterion(model(x), y) / 2).backward()
            if step % 2:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        results.append(model.state_dict())
    torch.testing.assert_close(*results)
