"""How much memory forward + backward adds, in logits-sized buffers, each in a fresh process."""

from __future__ import annotations

import pytest

from benchmarks.memory import peak_of

SHAPE = (4, 256, 50257)


def test_torch_holds_three_buffers() -> None:
    """The measure itself: log-softmax, its gradient and the gradient."""
    assert 2.9 < peak_of("F.cross_entropy(logits.view(-1, 50257), target.view(-1))", SHAPE, "float32") < 3.1


# Blocks of rows on their way through the caches are a few tens of MB, whatever the number of rows: a fifth of these
# logits of 206 MB (103 MB in half precision), and less the larger they are. A second (N, C) tensor would be 2.0.
CASES = [
    pytest.param("xent.cross_entropy(logits, target)", "float32", 0.95, 1.05, id="the gradient, and nothing beside it"),
    pytest.param("xent.cross_entropy(logits, target, inplace_backward=True)", "float32", 0, 0.1, id="in place"),
    pytest.param("xent.token_stats(logits, target).log_prob.sum()", "float32", 0.95, 1.05, id="token_stats"),
    pytest.param("xent.cross_entropy(logits, target)", "bfloat16", 0.95, 1.5, id="half precision: no float32 copy"),
    pytest.param(
        "xent.cross_entropy(logits, target, label_smoothing=0.1, z_loss=0.1, softcap=30.0)",
        "float32",
        0.95,
        1.5,
        id="options: nothing per class",
    ),
    pytest.param(
        "sum(stat.sum() for stat in xent.token_stats(logits, target, entropy=True)[:3])",
        "float32",
        0.95,
        1.5,
        id="entropy: nothing per class",
    ),
]


@pytest.mark.parametrize(("loss", "dtype", "least", "most"), CASES)
def test_peak(loss: str, dtype: str, least: float, most: float, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process of three is enough: the allocator may keep a freed block or two, but cannot lose a buffer."""
    monkeypatch.setenv("XENT_BACKEND", backend)
    peaks = (peak_of(loss, SHAPE, dtype, setup="import xent") for _ in range(3))
    assert any(least <= peak <= most for peak in peaks)


HVP = """import xent
def product(logits, target, **options):
    (g,) = torch.autograd.grad(xent.cross_entropy(logits, target, **options), logits, create_graph=True)
    torch.autograd.grad(g, logits, logits.detach())
    return logits[0, 0].sum()
"""


@pytest.mark.parametrize(("options", "most"), [("", 2.1), ("softcap=30.0", 2.15), ("z_loss=0.1", 3.05)])
def test_hessian_vector_product(options: str, most: float, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient and the product; beside a z-loss the square of lse adds one of the product's two parts."""
    monkeypatch.setenv("XENT_BACKEND", backend)
    loss = f"product(logits, target, {options})"
    peaks = (peak_of(loss, (1024, 50257), "float32", setup=HVP) for _ in range(3))
    assert any(1.95 <= peak <= most for peak in peaks)
