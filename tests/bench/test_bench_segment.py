"""segment.py: what it draws, that both losses give one curve, and that its comparison can fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # where `python benchmarks/segment.py` would find them

import segment  # noqa: E402

TINY = ["--quick", "--steps", "3", "--size", "16", "--batch", "2", "--width", "2"]


def test_two_equal_curves_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "masks.png"
    assert segment.main([*TINY, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    printed = capsys.readouterr().out
    assert "F.cross_entropy" in printed
    assert "largest relative difference of the losses in 3 steps" in printed


@pytest.mark.parametrize(("tolerance", "code"), [([], 1), (["--tolerance", "1e-2"], 0)])
def test_a_loss_that_differs_is_an_error(
    tolerance: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = segment.xent.cross_entropy

    def wrong(logits: Tensor, target: Tensor) -> Tensor:
        return right(logits, target) * 1.001

    monkeypatch.setattr(segment.xent, "cross_entropy", wrong)
    assert segment.main([*TINY, *tolerance, "--out", str(tmp_path / "masks.png")]) == code
    assert ("the losses differ: expected at most 5e-05" in capsys.readouterr().err) == (code == 1)


def test_the_scenes() -> None:
    images, target = segment.scenes(3, 32, torch.Generator().manual_seed(0))
    again, _ = segment.scenes(3, 32, torch.Generator().manual_seed(0))
    assert (images.shape, target.shape) == ((3, 1, 32, 32), (3, 32, 32))
    assert torch.equal(images, again)
    assert set(target.unique().tolist()) == {segment.IGNORE, 0, 1, 2, 3}
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert torch.equal(target == segment.IGNORE, border.expand(3, -1, -1))
    assert images[:, 0][target > 0].mean() > images[:, 0][target == 0].mean() + 1


def test_it_learns() -> None:
    options = segment.parse([*TINY, "--width", "4"])
    learner = segment.Learner("xent", segment.xent.cross_entropy, options)
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        learner.step(*segment.scenes(4, 16, draw))
    assert learner.losses[-1] < 0.9 * learner.losses[0]


@pytest.mark.parametrize("size", ["4", "18"])
def test_bad_sizes(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        segment.main(["--size", size])
    assert ended.value.code == 2
    assert f"--size: expected a multiple of 4 above 4, got {size}" in capsys.readouterr().err
