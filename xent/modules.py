"""The losses as modules."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from . import _layout
from .functional import cross_entropy


class CrossEntropyLoss(nn.CrossEntropyLoss):
    r"""Cross-entropy between logits and targets, in nats: :func:`xent.cross_entropy` as a module.

    A :class:`torch.nn.CrossEntropyLoss` in every respect (name, buffer, `repr`, `state_dict`, `isinstance`), with the
    further options of :func:`xent.cross_entropy`. For one position with index target `y`, and
    :math:`\mathrm{lse} = \log \sum_c e^{x_c}`, the loss is :math:`w_y (\mathrm{lse} - x_y)`; the mean divides the sum
    by :math:`\sum w_y`.

    Args:
        weight: `(C,)`, a weight for each class; kept as the buffer `weight`.
        ignore_index, reduction, label_smoothing, dim, normalizer, on_empty, z_loss, softcap, logit_scale, loss_dtype,
            inplace_backward: see :func:`xent.cross_entropy`.

    Shapes:
        input `(C)`, `(N, C)`, `(N, C, d1, ...)` or `(..., C)`; target without the class dimension, or of input's shape
        for probabilities; the result is 0-d, or of the target's shape (without the class dimension) for "none".

    Raises:
        TypeError, ValueError: an option is not of its type or out of its range, when built as when called.
        TypeError, ValueError, IndexError, RuntimeError: when called, as :func:`xent.cross_entropy`.

    Example:
        >>> import torch, xent
        >>> loss = xent.CrossEntropyLoss(label_smoothing=0.1)
        >>> logits = torch.zeros(2, 5, 8, requires_grad=True)       # (B, T, V)
        >>> value = loss(logits, torch.ones(2, 5, dtype=torch.long))
        >>> print(f"{value.item():.4f}")                            # uniform logits: log 8
        2.0794
        >>> value.backward()

    Source:
        As :func:`xent.cross_entropy` (Bridle, 1990).
    """

    def __init__(
        self,
        weight: Float[Tensor, " C"] | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        dim: int | None = None,
        normalizer: float | Tensor | None = None,
        on_empty: str = "nan",
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        loss_dtype: torch.dtype | None = None,
        inplace_backward: bool = False,
    ) -> None:
        _layout.check_options(ignore_index, reduction, label_smoothing, normalizer, on_empty, z_loss, loss_dtype)
        _layout.check_transform(logit_scale, softcap)
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        self.dim = dim
        self.normalizer = normalizer
        self.on_empty = on_empty
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.loss_dtype = loss_dtype
        self.inplace_backward = inplace_backward

    def forward(self, input: Float[Tensor, "..."], target: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The loss of a batch; see :func:`xent.cross_entropy`."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            dim=self.dim,
            normalizer=self.normalizer,
            on_empty=self.on_empty,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            loss_dtype=self.loss_dtype,
            inplace_backward=self.inplace_backward,
        )
