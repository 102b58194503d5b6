"""bench.py and memory.py: what they refuse, what they leave behind, and that their checks can fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # where `python benchmarks/bench.py` would find them

import bench  # noqa: E402
import cases  # noqa: E402
import common  # noqa: E402
import contenders  # noqa: E402
from contenders import Contender  # noqa: E402

F_NAME = "F.cross_entropy"
LIMITS = ("logits.clone()", "warm copy_", "three bare products", "one bare product")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, few copies, and no torch.compile, which takes half a minute where it has not run before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(bench, "MOST_COPIES", 2)
    for module in ("LOGITS", "HEADS", "SPARSE"):
        some = {name: c for name, c in getattr(contenders, module).items() if "compile" not in name}
        monkeypatch.setattr(cases, module, some)
    yield
    torch.set_num_threads(before)


def run(tmp_path: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    file = tmp_path / "out.json"
    code = bench.main(["--dtype", "float32", "--rounds", "2", "--json", str(file), *options])
    return code, json.loads(file.read_text())["rows"]


def beside_torch(monkeypatch: pytest.MonkeyPatch, **others: Contender) -> None:
    """Only these in the loss section."""
    named = {name.replace("_", " "): contender for name, contender in others.items()}
    monkeypatch.setattr(cases, "LOGITS", {F_NAME: contenders.LOGITS[F_NAME], **named})


def trained(folder: Path) -> Path:
    """A file as of resolution.py, of 5 features."""
    found = {"hidden": torch.randn(40, 5), "weight": torch.randn(30, 5), "target": torch.randint(30, (40,))}
    torch.save(found, folder / "head.pt")
    return folder / "head.pt"


def test_everyone_is_checked_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All sections, and the two numbers of threads."""
    shapes = ["--case", "3x5x7", "--linear", "64x16x50", "--small", "--dtype", "float32", "bfloat16"]
    shapes += ["--sparse", "64x16x50@4", str(trained(tmp_path))]
    code, rows = run(tmp_path, *shapes, "--no-memory", "--threads", "1", "2", "--rounds", "1")
    printed = capsys.readouterr().out
    assert code == 0
    rows = [row for row in rows if row["status"] == "ok"]
    expected = {"loss": ["xent eager", "xent eager, in place", *LIMITS[:2]], "small": ["xent"], "linear": ["xent"]}
    expected["linear"] += ["xent, reduction none", "F.linear + F.cross_entropy"]
    if hasattr(F, "linear_cross_entropy"):  # new in torch 2.13
        expected["linear"].append("F.linear_cross_entropy, 512 rows")
    expected["sparse"] = ["xent, exact gradient", "xent, 1/256", "xent, 1/1024, token stats"]
    for section, names in expected.items():
        base = {"linear": LIMITS[2], "sparse": LIMITS[3]}.get(section, F_NAME)
        for setting in product(("float32", "bfloat16"), (1, 2)):
            mine = [row for row in rows if (row["section"], row["dtype"], row["threads"]) == (section, *setting)]
            assert {base, *names} <= {row["contender"] for row in mine}
            base_ms = {row["case"]: row["ms"] for row in mine if row["contender"] == base}
            assert all(row["ratio"] == pytest.approx(row["ms"] / base_ms[row["case"]]) for row in mine)
    for row in rows:
        assert row["contender"][:10] in printed
        assert row["ms"] > 0
        assert row["ratio"] > 0
        assert row["memory"] == []
        assert row["error"] is None if row["contender"] in LIMITS else row["error"] <= bench.TOLERANCE[row["dtype"]]
    assert {f"32x27 {option}" for option in contenders.OPTIONS} < {row["case"] for row in rows}
    assert "the ratio to F.cross_entropy" in printed
    about = json.loads((tmp_path / "out.json").read_text())
    assert about["machine"]["torch"] == torch.__version__
    assert about["options"]["rounds"] == 1


def test_a_picture(tmp_path: Path) -> None:
    chart = tmp_path / "chart.png"
    options = ["--case", "3x5x7", "--linear", "8x4x9", "--no-memory", "--threads", "1", "2", "--png", str(chart)]
    assert run(tmp_path, *options)[0] == 0
    assert chart.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def right(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x.flatten(0, -2), y.flatten())


def picked(x: Tensor, y: Tensor) -> Tensor:
    return x.gather(-1, y.clamp(min=0)[..., None])[..., 0][y != -100]


def unseen(x: Tensor) -> Tensor:
    """A gradient without a value."""
    return x - x.detach()


CHEATS: dict[str, contenders.Loss] = {
    "value": lambda x, y: right(x, y) + 0.001,
    "gradient": lambda x, y: right(x, y) + 0.001 * unseen(right(x, y)),
    "NaN": lambda x, y: right(x, y) + 0 * unseen(x).sqrt().sum(),
    "targets": lambda x, y: right(x, y) + unseen(0.001 * picked(x, y).mean()),
    "others": lambda x, y: right(x.detach(), y) + unseen(picked(x * (x.detach().softmax(-1) - 1), y).mean()),
    "ignored": lambda x, y: right(x, y) + unseen(1e-6 * x[y == -100].sum()),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("wrong", CHEATS)
def test_a_wrong_contender_is_named_and_not_timed(
    wrong: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong in one place each. Of many classes, those beside the target have hardly any of a row's norm."""
    case = "2x4x5000:0.5"
    beside_torch(monkeypatch, cheat=Contender(lambda: CHEATS[wrong]))
    code, rows = run(tmp_path, "--case", case, "--dtype", dtype, "--no-memory")
    assert code == 1
    assert [(row["status"], row["ms"] is None) for row in rows] == [("ok", False), ("wrong", True)]
    assert f"bench.py: cheat on {case} {dtype}: wrong" in capsys.readouterr().err


def test_a_wrong_head_and_a_wrong_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = {"xent": Contender(lambda: lambda h, W, y: cases.plain(h, W, y) * 1.001)}
    monkeypatch.setattr(cases, "HEADS", head)
    unsmoothed = SimpleNamespace(cross_entropy=lambda x, y, w=None, **o: F.cross_entropy(x, y, w))
    monkeypatch.setattr(cases, "xent", unsmoothed)
    code, rows = run(tmp_path, "--linear", "64x16x50", "--small", "3x5")
    assert code == 1
    wrong = [row["case"] for row in rows if row["status"] == "wrong"]
    assert wrong == ["64x16x50", "3x5 sum", "3x5 none", "3x5 label_smoothing=0.1"]


def explode(*_: object, **__: object) -> Any:
    raise RuntimeError("no kernel image")


def test_a_contender_that_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another package's failure, or a backend that is not there, is a note; a failure of xent is an error."""
    beside_torch(monkeypatch, peer=Contender(lambda: explode), xent_eager=contenders.LOGITS["xent eager"])
    with monkeypatch.context() as patch:
        patch.setattr(contenders.dispatch, "load", lambda name: "no compiler")
        code, rows = run(tmp_path, "--case", "3x5x7")
    assert (code, [row["status"] for row in rows]) == (0, ["ok", "unavailable", "unavailable"])
    assert [row["note"] for row in rows] == ["", "RuntimeError: no kernel image", "no compiler"]
    assert "peer: unavailable" in capsys.readouterr().out
    beside_torch(monkeypatch, xent_eager=Contender(lambda: explode))
    code, rows = run(tmp_path, "--case", "3x5x7")
    assert (code, rows[1]["status"], rows[1]["note"]) == (1, "failed", "RuntimeError: no kernel image")


def test_a_memory_that_cannot_be_measured_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside_torch(monkeypatch)
    monkeypatch.setattr(cases, "SMALLEST", 0)
    monkeypatch.setattr(cases, "in_fresh_process", explode)
    code, (row,) = run(tmp_path, "--case", "3x5x7")
    assert (code, row["status"], row["note"]) == (0, "ok", "peak memory: no kernel image")
    assert row["ms"] > 0


def test_ctrl_c_saves_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = bench.measure

    def interrupted(case: cases.Case, dtype: str, options: Any) -> Iterator[common.Row]:
        if dtype == "float64":
            raise KeyboardInterrupt
        yield from measure(case, dtype, options)

    monkeypatch.setattr(bench, "measure", interrupted)
    code, rows = run(tmp_path, "--case", "3x5x7", "--dtype", "float32", "float64")
    assert code == 130
    assert {row["dtype"] for row in rows} == {"float32"}
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    "bad",
    [f"--case {text}" for text in ("8", "0x3", "3x1", "3x4:1", "3x4:-0.1", "axb")]
    + [f"--linear {text}" for text in ("3x4", "1x2x3", "2x3xa", "4x4x4x4")]
    + ["--sparse 3x4", "--sparse missing.pt", "--small 3x4x5"],
)
def test_bad_cases(bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    option, text = bad.split()
    with pytest.raises(SystemExit) as ended:
        bench.main([option, text])
    assert ended.value.code == 2
    assert f"argument {option}: invalid" in capsys.readouterr().err


def test_the_cases_can_be_asked_for() -> None:
    for case in [*cases.CASES, *cases.CUDA_CASES, *cases.QUICK, cases.HEAD, *cases.SPARSE_HEADS]:
        assert type(case).parse(str(case)) == case


def test_a_trained_head_as_a_case(tmp_path: Path) -> None:
    """Filled up with zeros: the logits are what they were."""
    file = trained(tmp_path)
    case = cases.Sparse.parse(str(file))
    assert case.shape == (40, cases.FEATURES, 30)
    assert cases.Sparse.parse(str(case)) == case
    h, W, y = case.inputs("float32", "cpu")
    saved = torch.load(file)
    torch.testing.assert_close(F.linear(h, W), F.linear(saved["hidden"], saved["weight"]))
    assert torch.equal(y, saved["target"])
    truth = F.cross_entropy(F.linear(h.double(), W.double()), y)
    torch.testing.assert_close(case.exact([h, W, y])[0].squeeze(), truth)
    wrong = Contender(lambda: lambda h, W, y: cases.plain(h, W, y) * 1.001)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "SPARSE", {"xent": wrong})
        assert [row["status"] for row in run(tmp_path, "--sparse", str(file))[1]] == ["wrong"]


def test_the_bytes_are_counted_as_written() -> None:
    logits, target = torch.zeros(8, 100), torch.tensor([0, 1] + [-100] * 6)
    case = cases.Case((8, 100))
    assert case.bytes_moved(False, [logits, target.clamp(min=0)]) == 3 * 3200
    assert case.bytes_moved(False, [logits, target]) == 3200 * 0.25 * 3 + 3200 * 0.75
    assert case.bytes_moved(True, [logits, target]) == 2 * 3200


def test_shares_of_a_copy_and_speed_up(tmp_path: Path) -> None:
    """The copy itself has 1; a loss that moves 3 bytes where the copy moves 2 has what its time makes of that."""
    _, rows = run(tmp_path, "--case", "64x50")
    copy = next(row for row in rows if row["contender"] == "warm copy_")
    assert copy["of_copy"] == 1
    for row in rows:
        ok = row["status"] == "ok"
        assert row["of_copy"] == (pytest.approx(row["gb_per_s"] / copy["gb_per_s"]) if ok else None)
    one = [common.Row("loss", "3x4", "float32", "cpu", "one", count, ms=ms) for count, ms in ((1, 10.0), (2, 4.0))]
    last = common.table(one).columns[-1]
    assert (last.header, list(last.cells)) == ("speed-up", ["1.00", "2.50"])


def test_a_fresh_process_runs_one_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of 72 MiB xent holds logits of 40 MiB once, besides the gradients."""
    case = cases.Linear((1024, 16, 10_000))
    gradients = (1024 + 10_000) * 16 * 4 / 2**20
    assert 35 < case.grown("xent", "float32", "cpu") / 2**20 - gradients < 50
    monkeypatch.setattr(cases.Linear, "grown", lambda self, *_: 2.0**20 * self.shape[0])
    assert case.peak("xent", "float32", "cpu") == pytest.approx([1024 - gradients, 8192 - gradients - 7 * 0.0625])
    half = gradients / 2 + 10_000 * 16 * 4 / 2**20  # and the float32 sum of the head's
    assert case.peak("xent", "bfloat16", "cpu")[0] == pytest.approx(1024 - half)
    monkeypatch.setattr(cases.Case, "grown", lambda self, *_: 8.0 * 2**20)
    assert cases.Case((2**11, 2**10)).peak(F_NAME, "float32", "cpu") == [1.0]
    assert cases.Case((2**11, 2**10)).peak(F_NAME, "bfloat16", "cpu") == []


def test_a_backend_that_is_there_is_measured() -> None:
    logits, target = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    there = [name for name in ("native", "eager") if not isinstance(contenders.dispatch.load(name), str)]
    assert [contenders.missing(name, logits, target) for name in there] == [None] * len(there)
