"""A linear head that holds its logits back, and what it returns in their place; knows nothing of Transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MISSING = (
    "the fused head of xent does not form logits in a training step with labels, so they cannot be used ({}); call the "
    "model without labels or in eval mode for logits, or patch it with use_xent(model), which keeps them"
)


def missing(what: str) -> RuntimeError:
    """The error of whoever meets what is not there."""
    return RuntimeError(MISSING.format(what))


class HeadOutput:
    r"""What a fused head returns: the logits as a recipe, :math:`x = W h + b`, then a scale and a softcap.

    Without a softcap the logits are :math:`s x`, with one :math:`\kappa \tanh(s x / \kappa)`, which a model writes as a
    factor before the tanh and one after it.

    Args:
        hidden: `(..., D)`, of any floating dtype.
        head: whose weight `(V, D)` and bias `(V)` or None count when the loss is computed.
        before, after: factors before and after the tanh; `after` is None as long as there was no tanh.

    Raises:
        RuntimeError: any operation that is not one of these; there are no numbers here.

    Example:
        >>> import torch
        >>> from xent.integrations._head import HeadOutput
        >>> output = HeadOutput(torch.zeros(2, 6, 8), torch.nn.Linear(8, 50))
        >>> capped = torch.tanh(output / 30) * 30
        >>> capped.transform()
        (1.0, 30.0)
        >>> capped.shape
        torch.Size([2, 6, 50])
    """

    def __init__(self, hidden: Tensor, head: nn.Linear, before: float = 1.0, after: float | None = None) -> None:
        self.hidden, self.head = hidden, head
        self.before, self.after = before, after

    @property
    def shape(self) -> torch.Size:
        """The shape that logits would have."""
        return torch.Size((*self.hidden.shape[:-1], self.head.out_features))

    @property
    def device(self) -> torch.device:
        """The device that logits would be on."""
        return self.hidden.device

    @property
    def grad_resolution(self) -> float | None:
        """Of the head, see :func:`xent.linear_cross_entropy`."""
        return getattr(self.head, "grad_resolution", None)

    def transform(self) -> tuple[float, float | None]:
        """(logit_scale, softcap) as :func:`xent.cross_entropy` takes them."""
        if self.after is None:
            return self.before, None
        return self.before * self.after, self.after

    def __mul__(self, factor: float) -> HeadOutput:
        """Scale the logits: before the tanh or after it."""
        if not isinstance(factor, (int, float)):
            raise missing(f"multiplied by a {type(factor).__name__}: only a number is understood")
        if self.after is None:
            return HeadOutput(self.hidden, self.head, self.before * factor)
        return HeadOutput(self.hidden, self.head, self.before, self.after * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> HeadOutput:
        """Scale the logits by the inverse."""
        if not isinstance(divisor, (int, float)):
            raise missing(f"divided by a {type(divisor).__name__}: only a number is understood")
        return self * (1 / divisor)

    def tanh(self) -> HeadOutput:
        """The middle of a softcap."""
        if self.after is not None:
            raise missing("a second tanh")
        return HeadOutput(self.hidden, self.head, self.before, 1.0)

    def float(self) -> HeadOutput:
        """Itself: the statistics of the loss are float32 already, and so is the loss."""
        return self

    def contiguous(self) -> HeadOutput:
        """Itself: there is no memory to lay out."""
        return self

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: object = None
    ) -> HeadOutput:
        """`torch.tanh(logits)`, and nothing else that torch can do."""
        if function is torch.tanh and isinstance(args[0], HeadOutput) and len(args) == 1:
            return args[0].tanh()
        raise missing(f"torch.{getattr(function, '__name__', function)}")

    def __getattr__(self, name: str) -> Any:
        """Whatever else a tensor has is missing here; as an AttributeError, so that hasattr tells the truth."""
        raise AttributeError(MISSING.format(f"logits.{name}"))

    def _refuse(self, *args: object) -> Any:
        raise missing("indexing, or arithmetic other than a scale")

    __getitem__ = __setitem__ = __iter__ = __len__ = __add__ = __radd__ = __sub__ = __rsub__ = __neg__ = _refuse
    __rtruediv__ = __matmul__ = __pow__ = __array__ = _refuse


class FusedHead(nn.Linear):
    r"""A head of logits :math:`x = W h + b` that returns the recipe of `x` while its model is in a training step.

    Called again with a loss, it computes that: within a call of its own, so that whatever gathers its parameters around
    one (FSDP, where the head is a unit of its own) does so for the loss as well.

    Args:
        hidden: `(..., D)`, of the head's dtype; the result is `(..., V)` logits, or their `HeadOutput`.
        loss: of the hidden states, the weight and `linear_bias=`; the result is then what it returns.

    Raises:
        RuntimeError: shapes or dtypes do not fit, as :class:`torch.nn.Linear`.

    Example:
        >>> import torch
        >>> from xent.integrations._head import FusedHead, HeadOutput
        >>> head = torch.nn.Linear(8, 50)
        >>> head.__class__, head.deferring = FusedHead, True       # how use_xent makes one
        >>> type(head(torch.zeros(2, 6, 8))).__name__
        'HeadOutput'
    """

    deferring: bool
    grad_resolution: float | None = None

    def forward(self, hidden: Tensor, loss: Callable[..., Tensor] | None = None) -> Any:
        """Logits, or what they would be made of, or their loss."""
        if loss is not None:
            return loss(hidden, self.weight, linear_bias=self.bias)
        if self.deferring:
            return HeadOutput(hidden, self)
        return super().forward(hidden)
