"""Reference values: numbers from lectures, books and another framework, each computed without this package."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import xent


def lookup_batch() -> tuple[Tensor, Tensor]:
    """A bigram table's logits for 8 words of 3 letters, and the letters that follow."""
    torch.manual_seed(18)
    ids = torch.randint(0, 26, (8, 3))
    table = torch.randn(27, 27)
    targets = torch.randint(0, 26, (8, 3))
    return table[ids], targets


def embedding_batch() -> tuple[Tensor, Tensor]:
    """Logits of an embedding and an output layer of GPT-2's vocabulary, on two lines of four tokens."""
    torch.manual_seed(123)
    embedding = nn.Embedding(50257, 100)
    head = torch.randn(100, 50257)
    inputs = torch.tensor([[318, 3519, 284, 40709], [40709, 2994, 290, 703]])
    targets = torch.tensor([[3519, 284, 40709, 13], [2994, 290, 703, 340]])
    return (embedding(inputs) @ head).detach(), targets


def test_lookup_table() -> None:
    """(B, T, V) logits as they are, and the same by exp, sum, pick, log and mean on the 24 rows."""
    x, y = lookup_batch()
    assert x.shape == (8, 3, 27)
    assert xent.cross_entropy(x, y).item() == pytest.approx(3.7759037, abs=1e-7)
    counts = x.view(24, 27).exp()
    by_hand = -(counts / counts.sum(1, keepdim=True))[torch.arange(24), y.view(24)].log().mean()
    assert by_hand.item() == pytest.approx(3.7759037, abs=1e-6)
    assert xent.cross_entropy(x.view(24, 27), y.view(24)).item() == pytest.approx(by_hand.item(), abs=1e-6)


def test_embedding_and_head() -> None:
    x, y = embedding_batch()
    assert xent.cross_entropy(x, y).item() == pytest.approx(47.0335083, rel=1e-7)


def test_embedding_and_head_gradient() -> None:
    """(softmax - one-hot) / 8."""
    x, y = embedding_batch()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(xent.cross_entropy(x, y), x)
    classic = (x.softmax(-1) - F.one_hot(y, 50257)) / 8
    assert torch.allclose(grad, classic)
    (torchs,) = torch.autograd.grad(F.cross_entropy(x.view(8, 50257), y.view(8)), x)
    assert torch.allclose(grad, torchs)
    assert grad.abs().max() > 0.1, "there is something to compare"


def test_four_rows_of_three() -> None:
    torch.manual_seed(0)
    loss = xent.cross_entropy(torch.randn(4, 3), torch.tensor([0, 1, 2, 1]))
    assert loss.item() == pytest.approx(1.4411566, abs=1e-7)
    assert f"{loss.item():.4f}" == "1.4412"


@pytest.mark.parametrize(("p", "nats"), [(0.8, 0.2231), (0.6, 0.5108), (0.7, 0.3567), (0.5717, 0.5591)])
def test_probability_of_the_target(p: float, nats: float) -> None:
    """Logits log p are probabilities: the loss is -log p, in nats."""
    x = torch.tensor([[p, (1 - p) / 2, (1 - p) / 2]]).log()
    loss = xent.cross_entropy(x, torch.tensor([0])).item()
    assert loss == pytest.approx(-math.log(p), abs=1e-6)
    assert f"{loss:.4f}" == str(nats)


def test_confidently_wrong_and_right() -> None:
    p = 4.6965e-07
    x = torch.tensor([[p, 1 - p], [0.0, 1.0]], dtype=torch.float64).log()
    losses = xent.cross_entropy(x, torch.tensor([0, 1]), reduction="none")
    assert losses[0].item() == pytest.approx(14.5713, abs=5e-5)
    assert losses[1].item() == 0


@pytest.mark.parametrize(("p", "bits"), [((0.488, 0.512), 0.9996), ((0.177, 0.823), 0.6735)], ids=["fair", "biased"])
def test_coin(p: tuple[float, float], bits: float) -> None:
    """The cross-entropy of a distribution with itself is its entropy; divided by log 2, in bits."""
    q = torch.tensor([p])
    loss = xent.cross_entropy(q.log(), q).item() / math.log(2)
    assert f"{loss:.4f}" == str(bits)


@pytest.mark.parametrize("C", [1, 2, 10, 1000, 50257])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_uniform_logits(C: int, label_smoothing: float) -> None:
    x, y = torch.full((3, C), 0.7, dtype=torch.float64), torch.tensor([0, C // 2, C - 1])
    loss = xent.cross_entropy(x, y, label_smoothing=label_smoothing)
    assert loss.item() == pytest.approx(math.log(C), rel=1e-13)


# Computed once with tensorflow-cpu 2.21.0 and Keras 3.15.1, in float64:
#     x = tf.constant([[((31 * n + 17 * c) % 23 - 11) * 0.75 for c in range(7)] for n in range(6)], tf.float64)
#     y = tf.constant([(5 * n + 2) % 7 for n in range(6)])
#     tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=x)
#     tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, x)
TENSORFLOW = [8.284415321628, 8.644649827180, 9.034416580260, 9.398004514133, 13.144649827180, 13.534416580260]
KERAS_MEAN = 10.340092108439858


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tensorflow_and_keras(dtype: torch.dtype) -> None:
    x = torch.tensor([[((31 * n + 17 * c) % 23 - 11) * 0.75 for c in range(7)] for n in range(6)], dtype=dtype)
    y = torch.tensor([(5 * n + 2) % 7 for n in range(6)])
    losses = xent.cross_entropy(x, y, reduction="none")
    torch.testing.assert_close(losses, torch.tensor(TENSORFLOW, dtype=dtype), rtol=0, atol=1e-6)
    assert xent.cross_entropy(x, y).item() == pytest.approx(KERAS_MEAN, abs=1e-6)
