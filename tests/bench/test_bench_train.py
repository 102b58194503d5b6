"""train.py: what it refuses, what it leaves behind, that it learns, and that its comparison can fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # where `python benchmarks/train.py` would find them

import gpt  # noqa: E402
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


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", "1e-6"), ("float64", "1e-13"), ("bfloat16", "1e-2")])
def test_a_comparison_of_a_few_steps(
    dtype: str,
    tolerance: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "curves.png"
    if dtype != "float32":  # one picture is enough
        monkeypatch.setattr(train, "plot", lambda path, *_: path.write_bytes(PNG))
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


def unseen(x: Tensor) -> Tensor:
    """A gradient without a value."""
    return x - x.detach()


WRONG: dict[str, train.Loss] = {
    "value": lambda x, y: train.torchs(x, y) + 0.001,
    "gradient": lambda x, y: train.torchs(x, y) + 0.001 * unseen(train.torchs(x, y)),
    "NaN": lambda x, y: train.torchs(x, y) + 0 * unseen(x).sqrt().sum(),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_quick_comparison_fails_for_a_wrong_loss(
    wrong: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "ours", WRONG[wrong])
    monkeypatch.setattr(train, "plot", lambda *_: None)
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


def test_training_from_hidden_states(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same curve as of a model that holds its logits."""
    monkeypatch.setattr(train, "plot", lambda *_: None)
    paths = ["--text", str(text), "--out", str(tmp_path / "x.png")]
    assert train.main(["--fused-head", "--compare", "--tolerance", "1e-5", "--steps", "3", *TINY, *paths]) == 0
    assert "fused head" in capsys.readouterr().out
