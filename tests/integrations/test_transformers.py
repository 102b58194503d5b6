"""Transformers models with xent's loss, and with a fused head, against the same models as they are."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from torch import Tensor, nn

import xent

transformers = pytest.importorskip("transformers")

from tiny import MODELS, SMALL, V, batch, same, step, tiny  # noqa: E402
from transformers.loss import loss_utils  # noqa: E402

from xent.integrations.transformers import HeadOutput, use_xent  # noqa: E402


@pytest.mark.parametrize("fused", [False, True], ids=["loss", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name: str, fused: bool) -> None:
    model, inputs = tiny(name), batch()
    expected, logits = step(model, **inputs), model(**inputs).logits
    assert use_xent(model, fused_head=fused) is model
    same(step(model, **inputs), expected)
    output = model(**inputs)
    assert isinstance(output.logits, HeadOutput) == fused
    assert output.logits.shape == logits.shape
    if not fused:
        torch.testing.assert_close(output.logits, logits)

    model.eval()
    output = model(**inputs)
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.loss, expected[0], rtol=2e-6, atol=0)
    model.train()
    assert isinstance(model(inputs["input_ids"]).logits, Tensor), "logits of a forward without labels, as RL wants them"


@pytest.mark.parametrize("name", MODELS)
def test_what_stands_between_head_and_loss_matters(name: str) -> None:
    """Without it the losses would differ, so the test above can see a wrong scale, softcap or bias."""
    model, inputs = tiny(name), batch()
    output = model(**inputs, output_hidden_states=True)
    head = model.get_output_embeddings()
    bare = xent.linear_cross_entropy(output.hidden_states[-1], head.weight, inputs["labels"], shift=True)
    special = name in ("Gemma2ForCausalLM", "PhiForCausalLM", "GraniteForCausalLM", "CohereForCausalLM")
    assert (abs(bare - output.loss) > 0.05) == special


@pytest.mark.parametrize("fused", [False, True], ids=["loss", "fused"])
@pytest.mark.parametrize("count", [11, torch.tensor(11), torch.tensor(11.0), torch.tensor([[11]])], ids=str)
def test_num_items_in_batch(count: int | Tensor, fused: bool) -> None:
    model, inputs = tiny(), batch()
    expected = step(model, **inputs, num_items_in_batch=11)
    use_xent(model, fused_head=fused)
    same(step(model, **inputs, num_items_in_batch=count), expected)


@pytest.mark.parametrize("fused", [False, True], ids=["loss", "fused"])
def test_accumulation_is_one_big_batch(fused: bool) -> None:
    """Micro-batches of unequal numbers of tokens, each divided by the number of all."""
    model, inputs = use_xent(tiny(), fused_head=fused), batch(4)
    expected = step(model, **inputs)
    count = (inputs["labels"][:, 1:] != -100).sum()
    parts = [{key: value[rows] for key, value in inputs.items()} for rows in (slice(0, 1), slice(1, 4))]
    model.zero_grad()
    losses = [model(**part, num_items_in_batch=count).loss for part in parts]
    sum(losses).backward()
    found = sum(losses).detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    same(found, expected)


@pytest.mark.parametrize("fused", [False, True], ids=["loss", "fused"])
def test_shift_labels_and_ignore_index(fused: bool) -> None:
    model, inputs = tiny(), batch()
    shifted = inputs["labels"].flip(1)  # not what the shift of these labels gives
    shifted = shifted.where(shifted != -100, 5)
    options = {"shift_labels": shifted, "ignore_index": 5}
    expected = step(model, **inputs, **options)
    assert abs(expected[0] - step(model, **inputs)[0]) > 1e-3
    use_xent(model, fused_head=fused)
    same(step(model, **inputs, **options), expected)


@pytest.mark.parametrize("fused", [False, True], ids=["loss", "fused"])
def test_no_label_at_all(fused: bool) -> None:
    model, inputs = use_xent(tiny(), fused_head=fused), batch()
    inputs["labels"][:] = -100
    assert model(**inputs).loss.isnan()
    assert model(**inputs, num_items_in_batch=4).loss == 0


@pytest.mark.parametrize("fused", [False, True], ids=["loss", "fused"])
def test_half_precision_loss_is_float32(fused: bool) -> None:
    model, inputs = tiny().bfloat16(), batch()
    expected = model(**inputs).loss
    found = use_xent(model, fused_head=fused)(**inputs).loss
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2 if fused else 2e-6, atol=0)  # fused: logits never rounded


@pytest.mark.parametrize("fused", [False, True], ids=["loss", "fused"])
def test_autocast(fused: bool) -> None:
    model, inputs = tiny(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).loss
        found = use_xent(model, fused_head=fused)(**inputs).loss
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)


def test_masked_language_model() -> None:
    torch.manual_seed(0)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    options = {name: SMALL[name] for name in names}
    config = transformers.ModernBertConfig(**options, pad_token_id=0, cls_token_id=1, sep_token_id=2)
    model, inputs = transformers.ModernBertForMaskedLM(config).train(), batch()
    assert model.loss_function is loss_utils.ForMaskedLMLoss
    expected = step(model, **inputs)
    same(step(use_xent(model), **inputs), expected)
    with pytest.raises(ValueError, match="causal language models, not for ForMaskedLMLoss"):
        use_xent(model, fused_head=True)


def test_frozen_trunk_and_frozen_head() -> None:
    for frozen in ("model.", "lm_head."):
        model, inputs = tiny(), batch()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        expected = step(model, **inputs)
        assert all(not name.startswith(frozen) for name in expected[1])
        same(step(use_xent(model, fused_head=True), **inputs), expected)


def test_gradient_checkpointing() -> None:
    model, inputs = tiny(), batch()
    expected = step(model, **inputs)
    use_xent(model, fused_head=True).activation_checkpointing_enable()
    same(step(model, **inputs), expected)


def test_example_of_the_docstring() -> None:
    result = doctest.testmod(importlib.import_module("xent.integrations.transformers"))
    assert result.failed == 0
    assert result.attempted >= 5


# What is in the place of logits


def test_output_in_the_place_of_logits_is_honest() -> None:
    output = use_xent(tiny(), fused_head=True)(**batch()).logits
    for use in (
        lambda: output + 1,
        lambda: output[:, :-1],
        lambda: list(output),
        lambda: output * torch.ones(V),
        lambda: output / torch.ones(()),
        lambda: torch.softmax(output, -1),
        lambda: torch.tanh(torch.tanh(output)),
        lambda: nn.functional.cross_entropy(output, torch.zeros(3)),
    ):
        with pytest.raises(RuntimeError, match="does not form logits"):
            use()
    with pytest.raises(AttributeError, match=r"logits\.argmax"):
        output.argmax(-1)
    assert not hasattr(output, "dtype")


@pytest.mark.parametrize("before", [lambda x: x * 2, lambda x: 2 * x, lambda x: x / 0.5, lambda x: x.float()])
@pytest.mark.parametrize("cap", [lambda x: x, lambda x: torch.tanh(x / 3) * 3, lambda x: (0.7 * x).tanh() * 2 / 0.4])
def test_recipes_of_logits(before: object, cap: object) -> None:
    """Whatever a forward writes, the loss is that of the logits that it would have made."""
    torch.manual_seed(0)
    hidden, head, target = torch.randn(2, 5, 8), nn.Linear(8, V), torch.randint(V, (2, 5))
    scale, softcap = cap(before(HeadOutput(hidden, head))).contiguous().transform()
    options = {"linear_bias": head.bias, "logit_scale": scale, "softcap": softcap}
    found = xent.linear_cross_entropy(hidden, head.weight, target, **options)
    torch.testing.assert_close(found, xent.cross_entropy(cap(before(head(hidden))), target))


def test_an_unknown_forward_is_stopped() -> None:
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: object) -> object:
            logits = self.lm_head(self.model(input_ids).last_hidden_state) + 1
            return transformers.modeling_outputs.CausalLMOutput(
                loss=self.loss_function(logits, labels, V), logits=logits
            )

    model = use_xent(Odd(transformers.LlamaConfig(**SMALL)), fused_head=True).train()
    with pytest.raises(RuntimeError, match="arithmetic other than a scale"):
        model(**batch())
    assert isinstance(model.lm_head(torch.zeros(1, 16)), Tensor), "the head is itself again after an error"


# What is refused when it is asked for


def refused(model: object, match: str, fused: bool = True) -> None:
    before = dict(vars(model))
    kind = TypeError if match == "PreTrainedModel" else ValueError
    with pytest.raises(kind, match=match):
        use_xent(model, fused_head=fused)
    assert vars(model).keys() == before.keys(), "a refused model is left as it was"


def test_options_that_are_true_or_false() -> None:
    for name in ("fused_head", "restore"):
        with pytest.raises(TypeError, match=f"^{name}: expected a bool, got 'yes'$"):
            use_xent(tiny(), **{name: "yes"})


def test_refusals() -> None:
    refused(nn.Linear(2, 2), "PreTrainedModel")
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=V)
    refused(transformers.T5ForConditionalGeneration(config), "does not call self.loss_function", fused=False)
    refused(transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL)), "its loss is", fused=False)

    model = tiny()
    model.loss_function = lambda *args, **kwargs: 0
    refused(model, "its loss is <lambda>", fused=False)
    model = tiny()
    model.lm_head = nn.Sequential(model.lm_head)
    refused(model, "torch.nn.Linear, got Sequential")
    model = tiny()
    model.forward = model.forward
    refused(model, "call use_xent before that")
    model = tiny()
    model.lm_head.forward = model.lm_head.forward
    refused(model, "its head has a forward put over")
    for register in (nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook):
        model = tiny()
        register(model.lm_head, print)
        refused(model, "forward hooks")


def test_a_head_replaced_afterwards_is_refused() -> None:
    model = use_xent(tiny(), fused_head=True)
    model.lm_head = nn.Linear(16, V)
    with pytest.raises(RuntimeError, match="its head is now a Linear, which is not fused; call use_xent"):
        model(**batch())
    assert isinstance(use_xent(model, fused_head=True)(**batch()).logits, HeadOutput)
