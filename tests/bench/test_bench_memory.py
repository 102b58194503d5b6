"""memory.py: what it measures, what it says of a process that failed, and its table."""

from __future__ import annotations

import pytest
import torch

from benchmarks import memory
from benchmarks.memory import peak_of


def test_torch_holds_three_buffers() -> None:
    ballast = torch.ones(64 * 2**20)  # a large parent must not hide the growth of its child
    peak = peak_of("F.cross_entropy(logits, target)", (512, 50257), "float32")
    assert 2.9 < peak < 3.1, ballast.shape


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"NameError.*no_such_loss"):
        peak_of("no_such_loss(logits)", (2, 3), "float32")


def test_the_table_of_a_transformers_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "find_spec", lambda _: True)
    monkeypatch.setattr(memory, "in_fresh_process", lambda *_, **__: [memory.B * memory.T * memory.V * 8.0, 1.0, 2.5])
    memory.main([])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(memory.MODES)
    assert all("2.00 logits" in line and "loss 2.500000" in line for line in printed[1:])


def test_without_transformers_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "find_spec", lambda _: None)
    monkeypatch.setattr(memory, "in_fresh_process", lambda *_, **__: pytest.fail("it measures"))
    with pytest.raises(SystemExit):
        memory.main([])
    assert "pip install -e '.[bench,transformers]'" in capsys.readouterr().err
