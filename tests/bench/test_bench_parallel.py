"""The command line of benchmarks/parallel.py: its figures, and that its checks can fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import parallel  # noqa: E402


def test_a_tiny_case(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert parallel.main(["--case", "20x10", "--world", "2", "--rounds", "1", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["contender"] for row in rows] == ["torch loss_parallel", "xent, group=", "xent, DTensor"]
    assert rows[0]["ratio"] == 1
    assert [row["collectives"] for row in rows] == [3, 1, 1]
    assert rows[0]["bytes"] == 3 * 20 * 4  # of two ranks, an all-reduce is one message
    assert rows[1]["bytes"] == 1024 * 8  # the shortest message there is
    assert all(row["error"] < parallel.TOLERANCE and row["memory"] is None for row in rows)
    for case in ("class weight with ignored rows", "label smoothing", "a target out of range"):
        right = [row["cases"][case].startswith("right") for row in rows]
        assert right == [False, True, True], case


@pytest.mark.parametrize(("error", "case"), [(1.0, "right"), (1e-7, "wrong: error 1"), (float("nan"), "right")])
def test_a_wrong_result_is_an_error(
    error: float, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row: dict[str, Any] = {"contender": "xent, group=", "N": 2, "C": 2, "world": 1, "ratio": 1.0, "ms": 1.0}
    row |= {"error": error, "collectives": 1, "bytes": 0, "memory": None, "cases": {"a case": case}}
    monkeypatch.setattr(parallel, "merged", lambda *arguments: [row])
    assert parallel.main(["--case", "2x2", "--world", "1"]) == 1
    assert "xent, group=: wrong" in capsys.readouterr().err


def test_the_bytes_of_collectives() -> None:
    traffic = parallel.Traffic(4)
    with torch._subclasses.FakeTensorMode(), traffic:  # shapes only: there is no group
        x, ops = torch.zeros(6, dtype=torch.float64), torch.ops._c10d_functional
        ops.all_gather_into_tensor(x, 4, "none")
        assert traffic.bytes == 3 * 48
        ops.all_reduce(x, "sum", "none")
    assert traffic.bytes == 3 * 48 + 2 * 3 / 4 * 48
    assert traffic.count == 2
