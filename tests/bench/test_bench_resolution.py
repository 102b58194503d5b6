"""resolution.py: its text, that sparse gradients are what it trains with, its curves, and what it keeps in files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # where `python benchmarks/resolution.py` would find them
pytest.importorskip("tokenizers")

import gpt  # noqa: E402
import resolution  # noqa: E402

TINY = ["--context", "8", "--width", "16", "--heads", "2", "--batch", "2", "--steps", "6", "--vocabulary", "300"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{n} quick brown foxes, {n * n % 97} lazy dogs\n" for n in range(300)), encoding="utf-8")
    return file


def test_tokens_are_the_text(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gpt.Tokens(text, 8, 300)
    assert len(data.symbols) == 300
    written = "".join(data.symbols[i] for i in [*data.train.tolist(), *data.validation.tolist()])
    assert written.replace("Ġ", " ").replace("Ċ", "\n") == text.read_text(encoding="utf-8")
    for name in ("b.py", "a.py", "test/c.py", "site-packages/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(gpt.sysconfig, "get_path", lambda name: str(tmp_path))
    assert gpt.Tokens.texts(data) == ["a.py", "b.py"]
    with pytest.raises(ValueError, match=r"\d tokens, expected at least 91"):
        gpt.Tokens(tmp_path / "a.py", 8, 300)


def test_curves_are_trained_once_and_drawn(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every learner with its own resolution, on the same batches from the same weights; and a head is left behind."""
    seen: list[Any] = []
    loss = resolution.Learner.evaluate.__globals__["fused"]

    def fused(model: Any, tokens: torch.Tensor, target: torch.Tensor, r: float | None) -> torch.Tensor:
        seen.append((r, tokens.tolist()))
        return loss(model, tokens, target, r)

    monkeypatch.setitem(resolution.Learner.evaluate.__globals__, "fused", fused)
    curves, picture, head = (tmp_path / name for name in ("c.json", "c.svg", "h.pt"))
    options = ["--text", str(text), "--json", str(curves), "--out", str(picture), *TINY]
    assert resolution.main([*options, "--seeds", "0", "1", "--head", str(head), "--threads", "1"]) == 0
    assert [r for r, _ in seen[:3]] in ([None, 1 / 256, 1 / 1024], [1 / 1024, 1 / 256, None])
    assert seen[0][1] == seen[1][1] == seen[2][1] != seen[3][1]
    runs = json.loads(curves.read_text())["runs"]
    assert list(runs) == ["0", "1"]
    for run in runs.values():
        assert list(run) == [resolution.EXACT, "1/256", "1/1024"]
        exact, coarse, fine = (run[name]["losses"] for name in run)
        assert exact[0] == coarse[0] == fine[0], "the loss is exact"
        assert len(exact) == 6
        assert exact != coarse
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("seed 1", "inside", "1/1024", str(picture)[-5:]))
    assert picture.read_text().startswith("<?xml")
    saved = torch.load(head)
    assert saved["hidden"].shape == (320, 16)
    assert saved["weight"].shape == (300, 16)
    before = len(seen)
    assert resolution.main([*options, "--seeds", "0", "1"]) == 0
    assert len(seen) == before, "nothing is trained again"
    with pytest.raises(SystemExit):
        resolution.main([*options, "--lr", "1"])
    assert "expected curves of" in capsys.readouterr().err


def test_inside_the_spread_of_the_seeds() -> None:
    """Of given curves: their mean, in the band from the lowest to the highest seed of the exact gradient or outside.

    A biased gradient is found by `test_mean_and_variance` of the head, whose bound is far below this band.
    """
    levels = {resolution.EXACT: (1.0, 3.0), "1/64": (0.0, 1.0), "1/256": (2.0, 2.5), "1/1024": (2.0, 5.0)}
    runs = {str(seed): {name: {"losses": [level[seed]] * 40} for name, level in levels.items()} for seed in range(2)}
    assert resolution.inside(runs, "1/256") == 1
    assert resolution.inside(runs, "1/64") == resolution.inside(runs, "1/1024") == 0
    assert resolution.curves(runs, "1/256").shape == (2, 16)
