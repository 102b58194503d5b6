"""What Transformers, its Trainer, PEFT, FSDP and torch.compile do to a model works on one with xent's loss, too."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from ranks import Ranks, mesh_of
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import fully_shard

transformers = pytest.importorskip("transformers")

from tiny import T, V, batch, same, step, tiny  # noqa: E402
from transformers.loss import loss_utils  # noqa: E402

from xent.integrations.transformers import FusedHead, use_xent  # noqa: E402


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
    model, inputs = tiny(name, num_hidden_layers=1), batch()
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


# Low-rank adapters


def adapted(model: nn.Module, **options: object) -> nn.Module:
    """With adapters that are not zero in the beginning, so that all their gradients show."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    options = {"target_modules": ["q_proj"], "r": 2, "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)).train()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # what PEFT uses of Transformers
@pytest.mark.parametrize("fused", [False, True], ids=["loss", "fused"])
def test_peft(fused: bool) -> None:
    """Patched before or, inside, after; a head that PEFT has then replaced is refused where it would be bypassed."""
    expected = step(adapted(tiny()), **batch())
    assert all("lora" in name for name in expected[1])
    same(step(adapted(use_xent(tiny(), fused_head=fused)), **batch()), expected)
    model = adapted(tiny())
    with pytest.raises(TypeError, match=r"got PeftModelForCausalLM; of a PEFT model patch its get_base_model\(\)"):
        use_xent(model, fused_head=fused)
    use_xent(model.get_base_model(), fused_head=fused)
    same(step(model, **batch()), expected)
    for options in ({"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}):
        model = adapted(use_xent(tiny(), fused_head=fused), **options)
        if fused:
            with pytest.raises(RuntimeError, match="its head is now a"):
                model(**batch())
        else:
            same(step(model, **batch()), step(adapted(tiny(), **options), **batch()))


# Sharded parameters


def sharded(group: ProcessGroup, head_apart: bool) -> None:
    """The layers in units of their own, the root with the rest, of which the head may be one too."""
    model, alone = use_xent(tiny(), fused_head=True), tiny()
    mesh = mesh_of(group, 1)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if head_apart:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    inputs = batch()
    loss, gradients = step(model, **inputs)
    full = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    same((loss, full), step(alone, **inputs))


@pytest.mark.parametrize("head_apart", [False, True], ids=["root", "apart"])
def test_fully_sharded_model(head_apart: bool, ranks: Ranks) -> None:
    assert ranks.run(sharded, 2, head_apart) == [None, None]
