"""Tiny Transformers models with random weights, and one step of training."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

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
