"""What the command lines of train.py and bench.py have in common."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch


def parser(about: str | None) -> argparse.ArgumentParser:
    """With a script's docstring as its help: the first line above the options, the rest below them."""
    first, _, rest = (about or "").partition("\n")
    form = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=form)
    result.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")
    return result


def natural(text: str) -> int:
    """An argparse type: 1, 2, 3, ..."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def picture(text: str) -> Path:
    """An argparse type: a file that matplotlib is to write."""
    if not text.endswith((".png", ".svg")):
        raise argparse.ArgumentTypeError(f"{text}: expected a name that ends in .png or .svg")
    return Path(text)


def refusal(device: str, *results: Path | None) -> str | None:
    """Why a run would fail only at its end, or at once: results that cannot be written, a device that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch finds no CUDA device here"
    for file in filter(None, results):
        folder = file.absolute().parent
        if file.is_dir():
            return f"{file}: is a directory"
        if not folder.is_dir():
            return f"{folder}: no such directory"
        if not os.access(file if file.exists() else folder, os.W_OK):
            return f"{file}: cannot be written"
    return None
