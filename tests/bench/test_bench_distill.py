"""distill.py: what it stores, that the student learns what the teacher knows, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # where `python benchmarks/distill.py` would find them

import distill  # noqa: E402

SIZES = {"best": 4, "steps": 3, "teacher-steps": 4, "batch": 2, "context": 4, "width": 8, "layers": 1}
SIZES |= {"teacher-width": 8, "teacher-layers": 1, "heads": 2, "every": 2, "windows": 3}
TINY = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text").write_text("the teacher taught the other one that. " * 20, encoding="utf-8")
    return str(tmp_path / "text")


def test_curves_and_a_picture(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "curves.svg"
    assert distill.main([*TINY, "--text", text, "--out", str(out)]) == 0
    assert "<svg" in out.read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert "its 4 best classes hold" in printed
    assert "student, the teacher's 4 best classes: " in printed


def test_what_is_stored(text: str) -> None:
    """The teacher's probabilities, rounded once; all classes at once are the whole distribution."""
    options = distill.parse(TINY)
    pairs = distill.Pairs(Path(text), options.context)
    teacher = distill.build(pairs, 8, 1, options)
    stored = distill.Stored(teacher, pairs.windows, 4)
    with torch.no_grad():
        p = teacher(pairs.windows[:, :-1]).softmax(-1)
    assert stored.classes.shape == stored.q.shape == (*p.shape[:2], 4)
    torch.testing.assert_close(stored.q.float(), p.gather(-1, stored.classes.long()), rtol=1e-3, atol=0)
    assert (stored.q[..., -1:] >= p.topk(5).values[..., -1:].half()).all()


def test_the_student_learns_from_the_teacher(text: str) -> None:
    """What it has never seen, and nobody told it but the teacher."""
    options = distill.parse([*TINY, "--steps", "80", "--lr", "0.02", "--batch", "8"])
    pairs = distill.Pairs(Path(text), options.context)
    teacher = distill.build(pairs, 16, 1, options)
    known = distill.train(teacher, pairs, 100, None, options)[-1]
    stored = distill.Stored(teacher, pairs.windows, 4)
    first, *_, last = distill.train(distill.build(pairs, 16, 1, options), pairs, 80, stored, options)
    assert last - known < 0.1 * (first - known)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "7"], "--width: expected a multiple of --heads, got 7"),
        (["--out", "x.txt"], "ends in .png or .svg"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        distill.main([*TINY, *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_too_few_symbols(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill.main([*TINY, "--text", text, "--best", "4000"]) == 2
    assert "symbols, expected 4000 to 32768" in capsys.readouterr().err
