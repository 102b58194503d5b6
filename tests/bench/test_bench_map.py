"""bench.py --map: its cells, its table, its picture, and that a wrong loss has no ratio."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # where `python benchmarks/bench.py` would find them

import bench  # noqa: E402
import grid  # noqa: E402
from common import Row  # noqa: E402
from contenders import Contender  # noqa: E402

TINY = ["1x2", "30x5", "2x3x5x4", "2x3x5x4:channels_last", "2x3x5x4:weight", "30x5:smoothing", "30x5:probabilities",
        "30x5:none", "2x3x5x4:inplace", "2x6x5"]  # fmt: skip


def pair(case: str, ratio: float) -> list[Row]:
    """F.cross_entropy and xent, which takes `ratio` of its time."""
    return [
        Row("map", case, "float32", "cpu", name, 1, ms=ms, ratio=ms)
        for name, ms in (("F.cross_entropy", 1.0), ("xent", ratio))
    ]


def printed(rows: list[Row]) -> list[str]:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(grid.table(rows))
    return capture.get().splitlines()


def test_a_tiny_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "MOST_COPIES", 2)
    out, png = tmp_path / "map.json", tmp_path / "map.png"
    options = ["--rounds", "1", "--threads", str(torch.get_num_threads()), "--json", str(out), "--png", str(png)]
    assert bench.main(["--map", *TINY, *options]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows[::2]] == TINY
    assert {row["dtype"] for row in rows} == {"float32"}
    assert all(row["status"] == "ok" and row["ms"] > 0 and row["error"] <= 1e-5 for row in rows)
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "F / xent" in capsys.readouterr().out


def test_it_says_where_xent_is_slower() -> None:
    fast, slow = printed(pair("10x2", 0.5) + pair("1x2", 1.25))[-3:-1]
    assert "2.00" in fast
    assert "slower" not in fast
    assert "0.80" in slow
    assert "slower" in slow


def test_a_wrong_loss_has_no_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = grid.Cell.contenders

    def contenders(cell: grid.Cell) -> dict[str, Contender]:
        return {**right(cell), "xent": Contender(lambda: lambda x, y: cell.truth()(x, y) * 1.001)}

    monkeypatch.setattr(grid.Cell, "contenders", contenders)
    png = tmp_path / "map.svg"
    assert bench.main(["--map", "30x5", "--rounds", "1", "--png", str(png)]) == 1
    assert "xent on 30x5 float32: wrong" in capsys.readouterr().err
    assert png.exists()


def test_the_inputs_are_as_written() -> None:
    logits, target, weight = grid.Cell.parse("4x3x8x8:weight").inputs("float32", "cpu")
    assert (logits.shape, target.shape, weight.shape) == ((4, 3, 8, 8), (4, 8, 8), (3,))
    assert (target == -100).any()
    assert target.max() == 2
    logits, _ = grid.Cell.parse("4x3x8x8:channels_last").inputs("bfloat16", "cpu")
    assert (logits.dtype, logits.stride(1)) == (torch.bfloat16, 1)


def test_an_interrupted_map_keeps_its_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the table, too, which is of all cells together."""

    def measure(cell: grid.Cell, dtype: str, options: argparse.Namespace) -> list[Row]:
        if str(cell) == "30x5":
            raise KeyboardInterrupt
        return pair(str(cell), 0.5)

    monkeypatch.setattr(bench, "measure", measure)
    out, png = tmp_path / "map.json", tmp_path / "map.png"
    assert bench.main(["--map", "1x2", "30x5", "10x2", "--json", str(out), "--png", str(png)]) == 130
    assert [row["case"] for row in json.loads(out.read_text())["rows"]] == ["1x2"] * 2
    assert png.exists()
    assert "2.00" in capsys.readouterr().out


def test_large_cells_take_fewer_rounds() -> None:
    assert [grid.Cell.parse(text).rounds(15) for text in ("100x100", "1000x10000", "1000000x32")] == [15, 6, 3]
    assert grid.Cell.parse("1000000x32").rounds(2) == 2


def test_the_whole_map_can_be_asked_for() -> None:
    assert [grid.Cell.parse(str(cell)) for cell in grid.CELLS] == grid.CELLS
    shapes = [cell.shape for cell in grid.CELLS]
    assert {(1, 2), (1, 262144), (10**6, 2), (10**6, 32), (8, 21, 256, 256)} < set(shapes)
    assert max(torch.Size(shape).numel() for shape in shapes) <= grid.LARGEST


@pytest.mark.parametrize(
    "bad", ["8", "0x3", "3x1", "2x3x4:none", "2x3x0x4", "3x4:", "3x4:channels_last", "3x4:other", "axb"]
)
def test_bad_cells(bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--map", bad])
    assert ended.value.code == 2
    assert "argument --map: invalid" in capsys.readouterr().err


def test_the_map_comes_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--map", "--small"])
    assert "--map: expected alone" in capsys.readouterr().err
