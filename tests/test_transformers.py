"""Transformers models with xent's loss, and with a fused head, against the same models as they are."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import pickle

import pytest
import torch
from torch import Tensor, nn

import xent

transformers = pytest.importorskip("transformers")

from transformers.loss import loss_utils  # noqa: E402

from xent.integrations.transformers import FusedHead, HeadOutput, use_xent  # noqa: E402

V, B, T = 61, 3, 7
SMALL = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
MODELS = {
    "GPT2LMHeadModel": {**GPT2, "bos_token_id": 1, "eos_token_id": 2},
    "LlamaForCausalLM": SMALL,
    "Qwen3ForCausalLM": {**SMALL, "tie_word_embeddings": True, "head_dim": 8},
    "Gemma2ForCausalLM": {**SMALL, "final_logit_softcapping": 3.0, "head_dim": 8, "query_pre_attn_scalar": 8},
    "MistralForCausalLM": SMALL,
    "PhiForCausalLM": {**SMALL, "resid_pdrop": 0.0, "embd_pdrop": 0.0},  # its head has a bias
    "GraniteForCausalLM": {**SMALL, "logits_scaling": 0.125},
    "CohereForCausalLM": {**SMALL, "logit_scale": 16.0},
}


def tiny(name: str = "LlamaForCausalLM", **changes: object) -> nn.Module:
    """A model with logits far enough from uniform that a wrong scale or a forgotten softcap shows."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**{**MODELS[name], **changes})).train()
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.normal_(std=0.6)
        if head.bias is not None:
            head.bias.normal_()
    return model


def batch(rows: int = B) -> dict[str, Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(3, V, (rows, T))
    labels = tokens.clone()
    labels[0, :4] = -100
    labels[-1, -2:] = -100
    return {"input_ids": tokens, "labels": labels}


def step(model: nn.Module, **inputs: object) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and every gradient."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Equal to float32 rounding, each gradient by its own norm: entries of a large head are small."""
    assert found[0].dtype == expected[0].dtype
    torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=0)
    assert found[1].keys() == expected[1].keys()
    assert found[1]
    scale = max(gradient.norm() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        error = (found[1][name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-7 * scale, f"{name}: {error / gradient.norm()}"


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
    hidden, weight, target = torch.randn(2, 5, 8), torch.randn(V, 8), torch.randint(V, (2, 5))
    scale, softcap = cap(before(HeadOutput(hidden, weight, None))).contiguous().transform()
    found = xent.linear_cross_entropy(hidden, weight, target, logit_scale=scale, softcap=softcap)
    torch.testing.assert_close(found, xent.cross_entropy(cap(before(hidden @ weight.T)), target))


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
    model = tiny()
    model.lm_head.register_forward_hook(print)
    refused(model, "forward hooks")


def test_a_head_replaced_afterwards_is_refused() -> None:
    model = use_xent(tiny(), fused_head=True)
    model.lm_head = nn.Linear(16, V)
    with pytest.raises(RuntimeError, match="its head is now a Linear, which is not fused; call use_xent"):
        model(**batch())
    assert isinstance(use_xent(model, fused_head=True)(**batch()).logits, HeadOutput)


# The model is still the model


@pytest.mark.parametrize("fused", [False, True], ids=["loss", "fused"])
def test_restore(fused: bool) -> None:
    model = tiny()
    kinds, names = [type(module) for module in model.modules()], vars(model).keys() | set()
    use_xent(use_xent(model, fused_head=fused), fused_head=fused)  # twice is once
    assert use_xent(model, restore=True) is model
    assert [type(module) for module in model.modules()] == kinds
    assert vars(model).keys() == names
    assert not hasattr(model.lm_head, "deferring")
    assert model.loss_function is loss_utils.ForCausalLMLoss
    assert isinstance(model(**batch()).logits, Tensor)
    use_xent(model, restore=True)


def test_class_and_signature() -> None:
    model = tiny()
    kind, signature = type(model), inspect.signature(model.forward)
    use_xent(model, fused_head=True)
    assert isinstance(model, kind)
    assert isinstance(model.lm_head, nn.Linear)
    assert isinstance(model.lm_head, FusedHead)
    assert (type(model).__name__, type(model).__module__) == (kind.__name__, kind.__module__)
    assert inspect.signature(model.forward) == signature


def test_a_copy_runs_its_own_weights() -> None:
    model = use_xent(tiny(), fused_head=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    expected = step(use_xent(copy.deepcopy(twin), restore=True), **batch())
    same(step(twin, **batch()), expected)
    assert abs(model(**batch()).loss - expected[0]) > 1e-3
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("fused", [False, True], ids=["loss", "fused"])
def test_save_and_load(fused: bool, tmp_path: object) -> None:
    model = tiny("Qwen3ForCausalLM")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    use_xent(model, fused_head=fused).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.Qwen3ForCausalLM
    assert loaded.config.architectures == ["Qwen3ForCausalLM"]
    assert loaded.state_dict().keys() == state.keys()
    for name, value in loaded.state_dict().items():
        assert value.equal(state[name]), name
    same(step(loaded.train(), **batch()), step(model, **batch()))
    pickle.loads(pickle.dumps(model.state_dict()))


def test_generate_in_eval_and_training_mode() -> None:
    model, tokens = tiny(), batch()["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.eval().generate(tokens, **options)
    use_xent(model, fused_head=True)
    assert model.generate(tokens, **options).equal(expected)
    assert model.train().generate(tokens, **options).equal(expected)


@pytest.mark.usefixtures("unchecked")  # a compiler cannot read the checks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, met while it compiles
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_compile_in_one_graph(name: str) -> None:
    model, inputs = tiny(name), batch()
    expected = step(model, **inputs)
    use_xent(model, fused_head=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    same(step(compiled, **inputs), (expected[0], {f"_orig_mod.{k}": v for k, v in expected[1].items()}))


@pytest.mark.parametrize("fused", [False, True], ids=["loss", "fused"])
def test_trainer(fused: bool, tmp_path: object) -> None:
    """A few steps with accumulation: the same weights, losses and evaluation as without xent; and it saves."""

    def trained(patch: bool, folder: str) -> tuple[list[float], dict[str, Tensor]]:
        model = tiny()
        if patch:
            use_xent(model, fused_head=fused)
        data = [{key: value[i] for key, value in batch(8).items()} for i in range(8)]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=3,
            logging_steps=1,
            save_steps=3,
            optim="sgd",
            learning_rate=0.5,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        losses.append(trainer.evaluate()["eval_loss"])
        assert trainer.predict(data).predictions.shape == (8, T, V)
        saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path / folder / "checkpoint-3").state_dict()
        return losses, saved

    losses, weights = trained(True, "xent")
    expected, expected_weights = trained(False, "torch")
    assert len(losses) == 4
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=0)
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5, msg=name)
