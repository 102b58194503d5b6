"""The command lines of benchmarks/: what they refuse, what they leave behind, and that their checks can fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from xent import _primitives

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # where `python benchmarks/bench.py` would find them

import bench  # noqa: E402
import contenders  # noqa: E402
import gpt  # noqa: E402
import loss  # noqa: E402
import memory  # noqa: E402
import report  # noqa: E402
import timing  # noqa: E402
import train  # noqa: E402

TINY = ["--context", "8", "--width", "16", "--layers", "1", "--heads", "2", "--batch", "2"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. Größe!\n" * 20, encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors on a busy machine: threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr, if it is one line and nothing went to stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


# train.py


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, "No such file or directory"),
        ("", None, "Is a directory"),
        ("latin.txt", "Größe".encode("latin-1") * 100, "not UTF-8 text"),
        ("short.txt", b"x" * 1290, "1290 characters, expected at least 1291"),
        ("empty.txt", b"", "0 characters"),
    ],
)
def test_a_text_that_cannot_be_used_gets_one_line(
    name: str, content: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    assert train.main(["--text", str(file), "--out", str(tmp_path / "out.png"), "--steps", "1"]) == 2
    line = one_line(capsys)
    assert str(file) in line
    assert words in line


def test_the_shortest_text_that_is_long_enough(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x" * 1291)
    assert gpt.Text(tmp_path / "short.txt", context=128).length == 1291


def test_a_batch_is_text_and_the_next_characters(text: Path) -> None:
    data = gpt.Text(text, context=8)
    tokens, target = data.batch(data.train, 64, torch.Generator().manual_seed(0))
    assert tokens.shape == target.shape == (64, 8)
    torch.testing.assert_close(tokens[:, 1:], target[:, :-1], rtol=0, atol=0)
    for row, following in zip(tokens, target, strict=True):
        words = "".join(data.symbols[i] for i in [*row.tolist(), following[-1].item()])
        assert words in text.read_text(encoding="utf-8")


def test_the_default_text_comes_with_python() -> None:
    data = gpt.Text(None, context=128)
    assert len(data.train) + len(data.validation) == data.length > 300_000
    assert 80 < len(data.symbols) < 200


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_comparison_of_a_few_steps(
    dtype: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "curves.png"
    tolerance = {"float32": "1e-6", "float64": "1e-13", "bfloat16": "1e-2"}[dtype]
    options = ["--text", str(text), "--out", str(out), "--dtype", dtype, "--steps", "3", "--compare"]
    assert train.main([*options, "--tolerance", tolerance, *TINY]) == 0
    printed = capsys.readouterr().out
    for words in ("F.cross_entropy", "tokens/s", "validation", "largest difference in 3 steps", str(out)):
        assert words in printed.replace("\n", " ")
    assert out.read_bytes().startswith(PNG)


def test_training_learns(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[train.Learner] = []
    monkeypatch.setattr(train, "plot", lambda path, learners, title: seen.extend(learners))
    assert (
        train.main(["--text", str(text), "--out", str(tmp_path / "x.png"), "--steps", "60", "--lr", "0.01", *TINY]) == 0
    )
    assert [learner.name for learner in seen] == ["xent"]
    assert seen[0].losses[0] > 3
    assert seen[0].losses[-1] < 2


def value_off(x: Tensor, y: Tensor) -> Tensor:
    """With the right gradient."""
    return F.cross_entropy(x.flatten(0, 1), y.flatten()) + 0.001


def gradient_off(x: Tensor, y: Tensor) -> Tensor:
    """With the right value."""
    right = F.cross_entropy(x.flatten(0, 1), y.flatten())
    return right + 0.001 * (right - right.detach())


def gradient_nan(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x.flatten(0, 1), y.flatten()) + 0 * (x - x.detach()).sqrt().sum()


@pytest.mark.parametrize("wrong", [value_off, gradient_off, gradient_nan])
def test_the_quick_comparison_fails_for_a_wrong_loss(
    wrong: loss.Loss,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(train, "ours", wrong)
    options = ["--quick", "--text", str(text), "--out", str(tmp_path / "x.png"), "--steps", "2", *TINY]
    assert train.main(options) == 1
    assert "expected at most 5e-05" in capsys.readouterr().err


def test_ctrl_c_ends_with_the_summary(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "curves.png"
    options = ["--text", str(text), "--out", str(out), "--steps", "1000000", "--threads", "1", "--compare", *TINY]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-u", str(BENCHMARKS / "train.py"), *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, bufsize=1) as process:
        assert process.stdout is not None
        try:
            while "parameters" not in process.stdout.readline():  # the last line before the training
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            printed, complaints = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert complaints == ""
    assert "tokens/s" in printed
    assert "largest difference" in printed
    assert "interrupted" in printed
    assert out.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], "invalid natural value: '0'"),
        (["--width", "10", "--heads", "4"], "expected a width that the heads divide"),
        (["--out", "no/such/folder/x.png"], "no such directory"),
        (["--out", "folder.png"], "is a directory"),
        (["--out", "curves.jpeg"], "curves.jpeg: expected a name that ends in .png or .svg"),
        (["--tolerance", "1"], "expected --compare"),
    ],
)
def test_bad_training_options(
    options: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit) as ended:
        train.main([*options, "--text", "no such file"])  # a broken check is not to begin a long training
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_the_second_ctrl_c_does_not_wait() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with train.Stop() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.asked
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [(2.0, 1.0, 0.5), (1.0, 2.0, 0.5), (0.0, 0.0, 0.0), (float("nan"), float("nan"), float("inf"))],
)
def test_differences_are_relative(one: float, other: float, expected: float) -> None:
    assert train.differences([1.0, one], [1.0, other]) == [0.0, expected]


# bench.py


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[contenders.Contender]:
    """The contenders without torch.compile, which takes half a minute where it has not run before."""
    some = [c for c in contenders.CONTENDERS if "compile" not in c.name]
    monkeypatch.setattr(timing, "MOST_COPIES", 2)
    monkeypatch.setattr(loss, "CONTENDERS", some)
    return some


def run_bench(tmp_path: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    file = tmp_path / "out.json"
    code = bench.main(["--case", "3x5x7", "--dtype", "float32", "--rounds", "2", "--json", str(file), *options])
    return code, json.loads(file.read_text())["rows"]


def test_a_tiny_case(few: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = tmp_path / "chart.png"
    code, rows = run_bench(tmp_path, "--dtype", "float32", "bfloat16", "float64", "--png", str(chart))
    assert code == 0
    assert chart.read_bytes().startswith(PNG)
    timed = [row for row in rows if row["status"] == "ok"]
    names = [row["contender"] for row in timed if row["dtype"] == "float32"]
    assert {"F.cross_entropy", "xent eager", "xent eager, in place", "logits.clone()", "warm copy_"} <= set(names)
    printed = capsys.readouterr().out
    for row in timed:
        assert str(row["contender"])[:10] in printed
        assert row["ms"] > 0
        assert row["ratio"] > 0
        assert row["gb_per_s"] > 0
        assert row["case"] == "3x5x7"
        assert row["memory"] is None  # too small to tell
        limit = row["contender"] in ("logits.clone()", "warm copy_")
        assert row["error"] is None if limit else row["error"] <= loss.TOLERANCE[row["dtype"]]
        assert row["contender"] != "F.cross_entropy" or row["ratio"] == 1
    about = json.loads((tmp_path / "out.json").read_text())
    assert about["machine"]["torch"] == torch.__version__
    assert about["options"]["rounds"] == 2


def only_target(x: Tensor, y: Tensor) -> Tensor:
    """The right value, and a gradient with every other entry zeroed."""
    right = F.cross_entropy(x.flatten(0, -2), y.flatten()).detach()
    p = x.detach().softmax(-1).gather(-1, y[..., None])
    pulled = ((p - 1) * x.gather(-1, y[..., None])).mean()
    return right + pulled - pulled.detach()


def target_off(x: Tensor, y: Tensor) -> Tensor:
    """The right value, and a gradient that is wrong in the targets' entries only."""
    right = F.cross_entropy(x.flatten(0, -2), y.flatten())
    picked = 0.001 * x.gather(-1, y.clamp(min=0)[..., None])[..., 0][y != -100].mean()
    return right + picked - picked.detach()


def ignored_counts(x: Tensor, y: Tensor) -> Tensor:
    """A gradient in the rows to be ignored, too."""
    right = F.cross_entropy(x.flatten(0, -2), y.flatten())
    stray = 1e-6 * x[y == -100].sum()
    return right + stray - stray.detach()


@pytest.mark.parametrize("wrong", [value_off, gradient_off, gradient_nan, only_target, target_off, ignored_counts])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_wrong_contender_is_refused(
    wrong: loss.Loss,
    dtype: str,
    few: list[contenders.Contender],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if wrong is only_target:
        case = "2x4x5000"  # the more classes, the less of the row's norm is in the entries that are missing
    else:
        case = "3x5x7:0.5"
    monkeypatch.setattr(loss, "CONTENDERS", [*few[:1], contenders.Contender("cheat", lambda: wrong)])
    code, rows = run_bench(tmp_path, "--case", case, "--dtype", dtype)
    assert code == 1
    assert [row["status"] for row in rows] == ["ok", "wrong"]
    assert rows[1]["ms"] is None
    assert f"bench.py: cheat on {case} {dtype}: wrong" in capsys.readouterr().err


def explode(*_: object) -> Tensor:
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(("backend", "code", "status"), [(None, 0, "unavailable"), ("eager", 1, "failed")])
def test_a_contender_that_raises(
    backend: str | None,
    code: int,
    status: str,
    few: list[contenders.Contender],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another package's failure is a note, one of xent's is an error."""
    monkeypatch.setattr(loss, "CONTENDERS", [*few[:1], contenders.Contender("broken", lambda: explode, backend)])
    got, rows = run_bench(tmp_path)
    assert (got, rows[1]["status"], rows[1]["note"]) == (code, status, "RuntimeError: no kernel image")
    assert "broken: " + status in capsys.readouterr().out


def test_a_backend_that_this_machine_lacks(
    few: list[contenders.Contender], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = _primitives.load
    monkeypatch.setattr(_primitives, "load", lambda name: "no compiler" if name == "eager" else load(name))
    code, rows = run_bench(tmp_path)
    lacking = [row for row in rows if str(row["contender"]).startswith("xent eager")]
    assert code == 0
    assert len(lacking) == 2
    assert all((row["status"], row["note"]) == ("unavailable", "no compiler") for row in lacking)


def test_a_memory_that_cannot_be_measured_is_a_note(
    few: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> float:
        raise RuntimeError("exit code -9")

    monkeypatch.setattr(loss, "SMALLEST", 0)
    monkeypatch.setattr(loss, "peak_of", fail)
    code, rows = run_bench(tmp_path)
    assert code == 0
    assert rows[0]["ms"] > 0
    assert rows[0]["note"] == "peak memory: exit code -9"
    assert "ok: peak memory: exit code -9" in capsys.readouterr().out


def test_threads_have_rows_of_their_own(few: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, rows = run_bench(tmp_path, "--threads", "1", "2")
    for count in (1, 2):
        mine = [row for row in rows if row["threads"] == count and row["status"] == "ok"]
        assert [row["ratio"] for row in mine if row["contender"] == "F.cross_entropy"] == [1]
        assert len(mine) >= 5
    assert "speed-up" in capsys.readouterr().out


def test_the_speed_up_is_over_the_first_number_of_threads() -> None:
    rows = [report.Row("loss", "3x4", "float32", "cpu", "one", count, ms=ms) for count, ms in ((1, 10.0), (2, 4.0))]
    last = report.table(rows).columns[-1]
    assert last.header == "speed-up"
    assert list(last.cells) == ["1.00", "2.50"]


def test_ctrl_c_saves_what_was_measured(
    few: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = loss.measure

    def interrupted(case: loss.Case, dtype: str, *rest: object) -> Iterator[object]:
        if dtype == "float64":
            raise KeyboardInterrupt
        yield from measure(case, dtype, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loss, "measure", interrupted)
    code, rows = run_bench(tmp_path, "--dtype", "float32", "float64")
    assert code == 130
    assert {row["dtype"] for row in rows} == {"float32"}
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["8", "0x3", "3x1", "3x4:1", "3x4:-0.1", "axb", ""])
def test_bad_cases(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--case", case])
    assert ended.value.code == 2
    assert "argument --case: invalid" in capsys.readouterr().err


def test_the_listed_cases_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--list"]) == 0
    printed = capsys.readouterr().out.split()
    for case in loss.CASES + loss.QUICK[:1]:
        assert str(case) in printed
        assert loss.Case.parse(str(case)) == case


def test_the_bytes_are_counted_as_written() -> None:
    logits = torch.zeros(10, 100)
    work, limit = contenders.CONTENDERS[0], contenders.CONTENDERS[-1]
    assert loss.bytes_moved(logits, 1.0, work) == 3 * 4000
    assert loss.bytes_moved(logits, 0.25, work) == 4000 * 0.25 * 3 + 4000 * 0.75
    assert loss.bytes_moved(logits, 0.25, limit) == 2 * 4000


# timing.py and memory.py


def test_timed_steps_meet_fresh_values_and_the_backend_asked_for() -> None:
    logits = torch.randn(timing.SMALL // 4)
    fresh: list[bool] = []
    backends: list[str | None] = []

    def overwrite(x: Tensor) -> None:
        fresh.append(torch.equal(x, logits))
        backends.append(_primitives.FORCED)
        x.zero_()

    before = _primitives.FORCED
    runs = [timing.Run("in place", overwrite, "eager"), timing.Run("other", lambda x: x.zero_())]
    measured = timing.interleaved(runs, logits, rounds=1, threads=1)
    assert fresh[-1]  # the timed step is the last one; those before it warm up
    assert set(backends) == {"eager"}
    assert before == _primitives.FORCED
    assert measured["in place"].median > 0


def test_a_small_input_is_timed_in_several_copies() -> None:
    steps: list[int] = []
    timing.interleaved([timing.Run("step", lambda x: steps.append(x.data_ptr()))], torch.zeros(10), rounds=1, threads=1)
    assert len(set(steps)) == timing.MOST_COPIES


def test_the_median_is_that_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))  # every reading a second later than the one before
    real = timing.Timer
    monkeypatch.setattr(timing, "Timer", lambda *a, **k: real(*a, timer=lambda: float(next(clock)), **k))
    measured = timing.interleaved([timing.Run("step", lambda x: None)], torch.zeros(10), rounds=3, threads=1)
    assert measured["step"].median == 1 / timing.MOST_COPIES


def test_peak_memory_is_in_units_of_the_logits() -> None:
    ballast = torch.ones(64 * 2**20)  # a large parent must not hide the growth of its child
    peak = memory.peak_of("F.cross_entropy(logits, target)", (4096, 1024), "float32")
    assert peak == pytest.approx(3, abs=0.1), ballast.shape


def test_peak_memory_says_what_went_wrong() -> None:
    with pytest.raises(RuntimeError, match=r"no_such_loss.*NameError"):
        memory.peak_of("no_such_loss(logits)", (2, 3), "float32")


def test_events_time_the_device_from_a_cold_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two events lies the work and nothing else: not the fresh values, and not what empties the cache."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 4.0  # milliseconds

    class Flush:
        def zero_(self) -> None:
            done.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    run = timing.Run("step", lambda x: done.append("step"))
    copies = [torch.zeros(1), torch.zeros(1)]
    timer = timing.EventTimer(run, lambda: done.append("refill"), copies, Flush())
    measured = timer.timeit(1)
    assert measured.median == 0.004
    assert measured.label == "step"
    assert done[:6] == ["refill", "step", "step"] * 2
    assert done[6:] == ["refill", "flush", "event", "step", "step", "event", "wait"]


def test_share_of_a_copy() -> None:
    """The copy itself has 1; a loss that moves 3 bytes where the copy moves 2 has what its time makes of that."""
    rows = list(loss.measure(loss.Case((64, 50)), "float32", "cpu", [1], rounds=1, peak=False))
    copy = next(row for row in rows if row.contender == "warm copy_")
    assert copy.of_copy == 1
    for row in rows:
        if row.status == "ok":
            assert row.of_copy == pytest.approx(row.gb_per_s / copy.gb_per_s)
    assert all(row.of_copy is None for row in rows if row.status != "ok")
