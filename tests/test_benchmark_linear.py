"""The linear section of bench.py, on a head that takes milliseconds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # where `python benchmarks/bench.py` would find them

import bench  # noqa: E402
import linear  # noqa: E402
import train  # noqa: E402
from report import Row  # noqa: E402

SHAPE = linear.Shape(64, 16, 50)


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler would take most of the time."""
    monkeypatch.setitem(linear.HEADS, "torch.compile of these", linear.plain)


def measured(dtype: str = "float32") -> dict[str, Row]:
    rows = linear.measure(SHAPE, dtype, "cpu", threads=1, rounds=1, peak=False)
    return {row.contender: row for row in rows}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_everyone_is_checked_and_timed(dtype: str) -> None:
    rows = measured(dtype)
    assert rows[linear.PRODUCTS].ratio == 1
    for name, row in rows.items():
        assert row.status == "ok", f"{name}: {row.note}"
        assert row.ms is not None
        assert name == linear.PRODUCTS or row.error is not None
    torchs = "F.linear_cross_entropy" in linear.HEADS
    assert sum(name.endswith(" rows") for name in rows) == torchs  # of its block sizes the best


def test_a_wrong_head_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear.HEADS, "xent", lambda h, W, y: linear.plain(h, W, y) * 1.001)
    row = measured()["xent"]
    assert row.status == "wrong"
    assert row.ms is None


def test_memory_beyond_the_gradients() -> None:
    """Of logits of 40 MiB the usual way keeps more than one buffer; blocks of 72 MiB take all of them once."""
    shape = linear.Shape(1024, 16, 10_000)
    assert 65 < linear.extra("F.linear + F.cross_entropy", shape, "float32", 1, 1) < 140
    assert 35 < linear.extra("xent", shape, "float32", 1, 1) < 50


@pytest.mark.parametrize("text", ["3", "1x2x3", "2x3xa", "4x4x4x4"])
def test_bad_shapes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(["--linear", text])
    assert stop.value.code == 2
    assert "--linear" in capsys.readouterr().err


def test_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--linear", str(SHAPE), "--dtype", "float32", "--rounds", "1", "--no-memory"]
    assert bench.main(options) == 0
    assert "three bare products" in capsys.readouterr().out


def test_training_from_hidden_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same curve as of a model that holds its logits."""
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    sizes = ["--context", "8", "--width", "16", "--layers", "1", "--heads", "2", "--batch", "2", "--steps", "5"]
    paths = ["--text", str(file), "--out", str(tmp_path / "curve.png")]
    assert train.main(["--fused-head", "--compare", "--tolerance", "1e-5", *sizes, *paths]) == 0
    assert "fused head" in capsys.readouterr().out
