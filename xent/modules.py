"""The losses as modules."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ._inputs.head import check_max_bytes
from ._inputs.options import check_flag, check_grad_resolution, check_options, check_size, check_tensor_or_none
from .functional import cross_entropy
from .linear import linear_cross_entropy


def _options(function: Callable[..., Tensor], *others: str) -> tuple[str, ...]:
    """The names of a function's options: its arguments by keyword only, but for `others`."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in others)


OPTIONS = _options(cross_entropy, "target_prob")
LINEAR_OPTIONS = _options(linear_cross_entropy, "weight", "linear_bias", "generator", "target_prob")


class CrossEntropyLoss(nn.CrossEntropyLoss):
    r"""Cross-entropy between logits and targets, in nats: :func:`xent.cross_entropy` as a module.

    A :class:`torch.nn.CrossEntropyLoss` by its name, buffer, `repr`, `state_dict` and `isinstance`, with the further
    options of :func:`xent.cross_entropy`. One call differs: probabilities of three or more dimensions need `dim=1` for
    PyTorch's layout `(N, C, d1, ...)`, since `(..., C)` fits them as well. For one position with index target `y`, and
    :math:`\mathrm{lse} = \log \sum_c e^{x_c}`, the loss is :math:`w_y (\mathrm{lse} - x_y)`; the mean divides the sum
    by :math:`\sum w_y`.

    Args:
        weight: `(C,)`, a weight for each class; kept as the buffer `weight`.
        ignore_index, reduction, label_smoothing, dim, normalizer, on_empty: see :func:`xent.cross_entropy`.
        z_loss, softcap, logit_scale, loss_dtype, inplace_backward, group: see there, too.

    Shapes:
        input `(C)`, `(N, C)`, `(N, C, d1, ...)` or `(..., C)`; target without the class dimension, or of input's shape
        for probabilities; the result is 0-d, or of the target's shape (without the class dimension) for "none".

    Raises:
        TypeError: when built, `weight` is not a Tensor or an option is not of its type.
        ValueError: when built, an option is out of its range. What a batch decides (`dim`, `group`, the shape of
            `weight`) is checked by a call, which raises what :func:`xent.cross_entropy` does.

    Example:
        >>> import torch, xent
        >>> loss = xent.CrossEntropyLoss(label_smoothing=0.1)
        >>> logits = torch.zeros(2, 5, 8, requires_grad=True)       # (B, T, V)
        >>> value = loss(logits, torch.ones(2, 5, dtype=torch.long))
        >>> print(f"{value.item():.4f}")                            # uniform logits: log 8
        2.0794
        >>> value.backward()
    """

    def __init__(
        self,
        weight: Float[Tensor, " C"] | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0,
        dim: int | None = None,
        normalizer: float | Tensor | None = None,
        on_empty: str = "nan",
        z_loss: float = 0,
        softcap: float | None = None,
        logit_scale: float = 1,
        loss_dtype: torch.dtype | None = None,
        inplace_backward: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in OPTIONS}
        check_options(**given)
        check_tensor_or_none("weight", weight)
        check_flag("inplace_backward", inplace_backward)
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        for name, value in given.items():
            setattr(self, name, value)

    def forward(
        self,
        input: Float[Tensor, "..."],
        target: Shaped[Tensor, "..."],
        *,
        target_prob: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "..."]:
        """The loss of a batch; see :func:`xent.cross_entropy`."""
        options = {name: getattr(self, name) for name in OPTIONS}
        return cross_entropy(input, target, self.weight, target_prob=target_prob, **options)


class LinearCrossEntropyLoss(nn.Module):
    r"""A linear head with its cross-entropy, in nats: :func:`xent.linear_cross_entropy` as a module.

    It owns the head, `linear`, as :class:`torch.nn.LinearCrossEntropyLoss` does, with the same parameters and
    `state_dict`, and gives :math:`\mathrm{lse}(x) - x_y` of the logits :math:`x = W h + b`, which are never held.

    Args:
        in_features: D, the size of a hidden state.
        num_classes: C; with a `group`, how many of all classes this rank holds.
        out_features: sizes `(d1, ...)` of further dimensions, for each index of which there is a head.
        bias: whether the head has one.
        device, dtype: of the head.
        weight: `(C,)`, a weight for each class; kept as the buffer `weight`.
        reduction, ignore_index, label_smoothing, normalizer, on_empty: see :func:`xent.linear_cross_entropy`.
        z_loss, softcap, logit_scale, loss_dtype, shift, max_bytes, group, grad_resolution: see there, too; what is
            random is drawn from the device's default generator.

    Shapes:
        input `(..., D)`; target `(...)`, `(..., C)` for probabilities, or `(..., K)` with the call's `target_prob`; the
        result is 0-d, or of the target's shape (without the class dimension) for "none".

    Raises:
        TypeError: when built, `weight` is not a Tensor or an option is not of its type.
        ValueError: when built, an option is out of its range. What a batch decides (`group`, `shift`, the shape of
            `weight`) is checked by a call, which raises what :func:`xent.linear_cross_entropy` does.

    Example:
        >>> import torch, xent
        >>> loss = xent.LinearCrossEntropyLoss(8, 50, bias=True)
        >>> value = loss(torch.zeros(2, 6, 8), torch.ones(2, 6, dtype=torch.long))
        >>> value.backward()
        >>> loss.linear.weight.grad.shape
        torch.Size([50, 8])
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Float[Tensor, " C"] | None = None,
        reduction: str = "mean",
        ignore_index: int | None = None,
        label_smoothing: float = 0,
        normalizer: float | Tensor | None = None,
        on_empty: str = "nan",
        z_loss: float = 0,
        softcap: float | None = None,
        logit_scale: float = 1,
        loss_dtype: torch.dtype | None = None,
        shift: bool = False,
        max_bytes: int | None = None,
        group: ProcessGroup | None = None,
        grad_resolution: float | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in LINEAR_OPTIONS}
        check_options(**given | {"ignore_index": -100 if ignore_index is None else ignore_index})
        check_max_bytes(max_bytes)
        check_grad_resolution(grad_resolution, softcap, label_smoothing)
        check_tensor_or_none("weight", weight)
        check_flag("bias", bias)
        check_flag("shift", shift)
        check_size("in_features", in_features)
        check_size("num_classes", num_classes)
        if not isinstance(out_features, Sequence):
            raise TypeError(f"out_features: expected a tuple of ints, got {out_features!r}")
        for size in out_features:
            check_size("out_features", size)
        super().__init__()
        self.in_features, self.num_classes, self.out_features = in_features, num_classes, tuple(out_features)
        rows = num_classes * math.prod(self.out_features)
        self.linear = nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        for name, value in given.items():
            setattr(self, name, value)

    def extra_repr(self) -> str:
        """num_classes, reduction, ignore_index."""
        return f"num_classes={self.num_classes}, reduction={self.reduction!r}, ignore_index={self.ignore_index}"

    def forward(
        self,
        input: Float[Tensor, "..."],
        target: Shaped[Tensor, "..."],
        *,
        target_prob: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "..."]:
        """The loss of a batch; see :func:`xent.linear_cross_entropy`."""
        shape = (self.num_classes, *self.out_features)
        options = {name: getattr(self, name) for name in LINEAR_OPTIONS}
        weight, bias = self.linear.weight.view(*shape, self.in_features), self.linear.bias
        linear_bias = None if bias is None else bias.view(shape)
        options |= {"linear_bias": linear_bias, "weight": self.weight, "target_prob": target_prob}
        return linear_cross_entropy(input, weight, target, **options)
