"""Hugging Face Transformers: a model's own loss becomes xent's, on request without ever forming the logits.

Transformers computes `loss = self.loss_function(logits, labels, ...)` with `logits = self.lm_head(hidden)` before it,
and some models scale or cap the logits in between. `model.loss_function` is the documented place for another loss; it
is all that `use_xent(model)` sets.

For `fused_head=True` the head, in a training step with labels, returns `HeadOutput` in the place of logits: hidden
states, the head, and what has been done to the logits since, which is a scale and a softcap or it is refused. The loss
is then computed in a second call of the head. Nothing here knows the forward of any model: a model that does something
else to its logits than these meets an object that cannot do it, and the error says which operation that was.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from ..functional import cross_entropy
from ..linear import linear_cross_entropy
from ._head import FusedHead, HeadOutput, missing

Model = TypeVar("Model", bound=PreTrainedModel)


def use_xent(
    model: Model, *, fused_head: bool = False, grad_resolution: float | None = None, restore: bool = False
) -> Model:
    r"""Let a Transformers model compute its loss, :math:`\mathrm{lse}(x) - x_y` in nats, with xent; in place.

    The labels, their shift, -100, `num_items_in_batch` and the float32 loss stay what they were. Without `fused_head`
    logits are returned as before. With it, a training step (`model.train()`, labels given) never forms them:
    `outputs.logits` is then an object without numbers that raises when it is used. In eval mode, without labels and in
    `generate` they are logits as ever. Weights, `state_dict`, saved files and the model's class name do not change.
    Patch a model before it is given to accelerate, PEFT or FSDP, which put their own forward over it.

    Args:
        model: a causal or masked language model that calls `self.loss_function`; for `fused_head` a causal one whose
            head is a plain `torch.nn.Linear`, of shape `(V, D)`, tied or not, with a bias or not. Hidden states are
            `(B, T, D)`, labels `(B, T)`, both of any dtype that the model takes.
        fused_head: whether training steps go without logits.
        grad_resolution: with `fused_head`, an unbiased sparse gradient, see :func:`xent.linear_cross_entropy`: 1/1024.
        restore: undo, whatever was done; the other way is to load the model again.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is not a :class:`transformers.PreTrainedModel`, or an option is not of its type.
        ValueError: `grad_resolution` without `fused_head`, or out of its range; or the model's loss or head is not one
            that can be replaced; the message says why.
        RuntimeError: in a training step, something other than a scale or a softcap is applied to the logits
            (AttributeError for a method of theirs), or the head is no longer the one that was patched.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from xent.integrations.transformers import use_xent
        >>> config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> model = use_xent(LlamaForCausalLM(config).train(), fused_head=True)
        >>> tokens = torch.randint(50, (2, 6))                      # (B, T)
        >>> model(input_ids=tokens, labels=tokens).loss.backward()
        >>> model.eval()(input_ids=tokens).logits.shape
        torch.Size([2, 6, 50])
        >>> _ = use_xent(model, restore=True)

    Source:
        Wijmans et al., Cut Your Losses, 2024, arXiv:2411.09009.
    """
    if not isinstance(model, PreTrainedModel):
        of_peft = "; of a PEFT model patch its get_base_model()" if hasattr(model, "get_base_model") else ""
        raise TypeError(f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}{of_peft}")
    for name, flag in (("fused_head", fused_head), ("restore", restore)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {flag!r}")
    if grad_resolution is not None and not (
        fused_head and isinstance(grad_resolution, float) and 0 < grad_resolution < 1
    ):
        raise ValueError(
            f"grad_resolution: expected None, or a float in (0, 1) beside fused_head=True, got {grad_resolution!r} and "
            f"{fused_head=}"
        )
    _restore(model)
    if restore:
        return model
    loss = _replacement(model)
    if fused_head:
        head = _plain_head(model)
        head.__class__ = FusedHead
        head.deferring, head.grad_resolution = False, grad_resolution
        kind: Any = type(model)
        model.__class__ = _fused_class(kind)
    model.loss_function = loss
    return model


def _causal_loss(
    logits: Tensor | HeadOutput,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: Tensor | float | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: object,
) -> Tensor:
    """The loss of the next token, with the arguments that Transformers passes; `vocab_size` is the logits' own."""
    given = labels if shift_labels is None else shift_labels
    if given is None:
        raise ValueError("labels: expected labels or shift_labels, got neither")
    given = given.to(logits.device)
    options = _options(ignore_index, num_items_in_batch, logits.device)
    if isinstance(logits, HeadOutput):
        scale, softcap = logits.transform()
        if softcap is not None and not 0 < softcap < math.inf:
            raise missing(f"a tanh multiplied by {softcap}")
        options |= {"softcap": softcap, "logit_scale": scale, "grad_resolution": logits.grad_resolution}
        loss = functools.partial(linear_cross_entropy, target=given, shift=shift_labels is None, **options)
        return logits.head(logits.hidden, loss)  # type: ignore[no-any-return]
    if shift_labels is None:  # the labels move, not the logits: a slice of them in T is not rows and would be copied
        given = nn.functional.pad(given, (0, 1), value=ignore_index)[..., 1:]
    return _loss(logits, given, options)


def _masked_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: Tensor | float | None = None,
    ignore_index: int = -100,
    **kwargs: object,
) -> Tensor:
    """The loss of the masked tokens, each at its own place."""
    options = _options(ignore_index, num_items_in_batch, logits.device)
    return _loss(logits, labels.to(logits.device), options)


def _loss(logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
    return cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), **options)


def _options(ignore_index: int, num_items: Tensor | float | None, device: torch.device) -> dict[str, Any]:
    if isinstance(num_items, Tensor):  # under DataParallel the Trainer gives each replica a tensor (1,)
        num_items = num_items.reshape(()).to(device)
    return {"ignore_index": ignore_index, "normalizer": num_items, "loss_dtype": torch.float32}


LOSSES: dict[Callable[..., Any], Callable[..., Tensor]] = {ForCausalLMLoss: _causal_loss, ForMaskedLMLoss: _masked_loss}


def _replacement(model: PreTrainedModel) -> Callable[..., Tensor]:
    """xent's form of the model's loss; refuses one that is not a cross-entropy of logits and labels."""
    name, loss = type(model).__name__, model.loss_function
    if loss not in LOSSES:
        known = " or ".join(function.__name__ for function in LOSSES)
        raise ValueError(f"{name}: its loss is {getattr(loss, '__name__', loss)}; expected {known}")
    # What a class says of its own forward; a decorated one keeps the original where inspect finds it.
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    if code is None or "loss_function" not in code.co_names:
        raise ValueError(f"{name}: its forward does not call self.loss_function, so no other loss can be put there")
    return LOSSES[loss]


def _plain_head(model: PreTrainedModel) -> Any:
    """The head, if it is nothing but a matrix product and a bias; refuses what would be left out or bypassed."""
    name, head = type(model).__name__, model.get_output_embeddings()
    if model.loss_function is not ForCausalLMLoss:
        raise ValueError(f"{name}: fused_head is for causal language models, not for {model.loss_function.__name__}")
    if type(head) is not nn.Linear:
        raise ValueError(f"{name}: expected a head that is a torch.nn.Linear, got {type(head).__name__}")
    if "labels" not in inspect.signature(type(model).forward).parameters:
        raise ValueError(f"{name}: its forward takes no argument named labels")
    for what, module in (("the model", model), ("its head", head)):
        if "forward" in vars(module):
            raise ValueError(f"{name}: {what} has a forward put over that of its class; call use_xent before that")
    if head._forward_hooks or head._forward_pre_hooks:
        raise ValueError(f"{name}: its head has forward hooks, which would not see logits any more")
    return head


@functools.lru_cache(None)
def _fused_class(original: Any) -> type:
    """The model's class, with a forward that tells the head when to hold the logits back.

    A class and not a function on the instance: a deep copy of the model then runs its own weights. Of the same name,
    because Transformers writes that into config.json and looks the model up by it.
    """
    forward = original.forward
    place = list(inspect.signature(forward).parameters).index("labels") - 1

    @functools.wraps(forward)
    def fused(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = args[place] if len(args) > place else kwargs.get("labels")
        if not self.training or labels is None:
            return forward(self, *args, **kwargs)
        head = self.get_output_embeddings()
        if not isinstance(head, FusedHead):
            raise RuntimeError(
                f"{original.__name__}: its head is now a {type(head).__name__}, which is not fused; call use_xent "
                "again, with or without fused_head"
            )
        head.deferring = True
        try:
            return forward(self, *args, **kwargs)
        finally:
            head.deferring = False

    members = {"forward": fused, "__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (original,), {**members, "__doc__": original.__doc__, "_without_xent": original})


def _restore(model: PreTrainedModel) -> None:
    """Back to what the class itself does; nothing where nothing was done."""
    original = vars(type(model)).get("_without_xent")
    if original is not None:
        model.__class__ = original
        head: Any = model.get_output_embeddings()
        if hasattr(head, "deferring"):
            head.__class__ = nn.Linear
            del head.deferring, head.grad_resolution
    if vars(model).get("_loss_function") in LOSSES.values():
        del model._loss_function
