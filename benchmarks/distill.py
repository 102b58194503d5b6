"""Teach a small GPT with a larger one, from the teacher's 64 best classes of each token, which were stored once.

    python benchmarks/distill.py                        a few minutes on one core
    python benchmarks/distill.py --text FILE --out distill.svg

The symbols are pairs of characters, a few thousand of them. First the teacher is trained on labels. Then its K best
classes and their probabilities are stored for every place of the training text: 4 K bytes a token, where all of them
would be 2 V. Two students begin from the same weights and see the same windows: one learns the labels, the other the
stored classes, by `xent.linear_cross_entropy(hidden, weight, classes, target_prob=q)`, which holds no logits and makes
no (N, V) target. The picture shows the loss of both on the validation text, and the teacher's.

Exit code: 0; 2 for bad options or a text that cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import common
import torch
from common import GREY, XENT, figure_style, natural, picture, refusal
from gpt import GPT, Text
from rich.console import Console
from torch import Tensor, nn

import xent


class Pairs(Text):
    """A text as numbers of pairs of characters, cut into windows (n, context + 1)."""

    def __init__(self, path: Path | None, context: int) -> None:
        super().__init__(path, context)
        pairs = [part[: len(part) // 2 * 2].view(-1, 2) for part in (self.train, self.validation)]
        codes = [first * len(self.symbols) + second for first, second in (pair.unbind(1) for pair in pairs)]
        kinds, numbers = torch.cat(codes).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        self.kinds = len(kinds)
        parts = numbers.split([len(code) for code in codes])
        if min(map(len, parts)) <= context:
            raise ValueError(f"{self.name}: {self.length} characters, expected more than {20 * (context + 1)}")
        self.windows, self.unseen = (part.unfold(0, context + 1, context) for part in parts)


class Stored:
    """The teacher's best classes of each place of the windows: (n, context, K) int16, and float16 probabilities."""

    @torch.no_grad()
    def __init__(self, teacher: GPT, windows: Tensor, best: int) -> None:
        parts = [teacher(some[:, :-1]).softmax(-1).topk(best) for some in windows.split(16)]  # type: ignore[no-untyped-call]
        self.q = torch.cat([part.values.half() for part in parts])
        self.classes = torch.cat([part.indices.to(torch.int16) for part in parts])


def build(text: Pairs, width: int, layers: int, options: argparse.Namespace) -> GPT:
    """A model with the weights of the seed."""
    torch.manual_seed(options.seed)
    return GPT(text.kinds, options.context, width, layers, options.heads).to(options.device)


def labels(model: GPT, windows: Tensor) -> Tensor:
    """The loss of the next symbol, nats per pair of characters."""
    return xent.linear_cross_entropy(model.trunk(windows[:, :-1]), model.head.weight, windows[:, 1:])


def train(model: GPT, text: Pairs, steps: int, stored: Stored | None, options: argparse.Namespace) -> list[float]:
    """Steps on the same windows for everyone; the validation losses, one every `options.every` steps."""
    optimizer = torch.optim.AdamW(model.parameters(), options.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps, pct_start=0.1)
    draw, found = torch.Generator().manual_seed(options.seed), []
    for step in range(steps):
        rows = torch.randint(len(text.windows), (options.batch,), generator=draw)
        windows = text.windows[rows].to(options.device)
        if stored is None:
            loss = labels(model, windows)
        else:
            hidden = model.trunk(windows[:, :-1])
            classes, q = stored.classes[rows.to(stored.q.device)], stored.q[rows.to(stored.q.device)]
            loss = xent.linear_cross_entropy(hidden, model.head.weight, classes, target_prob=q)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % options.every == 0 or step + 1 == steps:
            found.append(validate(model, text, options))
    return found


@torch.no_grad()
def validate(model: GPT, text: Pairs, options: argparse.Namespace) -> float:
    """The loss on the first windows of the unseen text."""
    return labels(model, text.unseen[: options.windows].to(options.device)).item()


def plot(path: Path, curves: dict[str, list[float]], teacher: float, options: argparse.Namespace) -> None:
    """The students' losses, and the teacher's as a line."""
    plt = figure_style()
    figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
    steps = [min(options.steps, (i + 1) * options.every) for i in range(len(next(iter(curves.values()))))]
    for (name, losses), color in zip(curves.items(), ("#e76f51", XENT), strict=True):
        ax.plot(steps, losses, label=name, color=color, linewidth=2)
    ax.axhline(teacher, color=GREY, linestyle="--", label="teacher")
    ax.set(xlabel="step of the student", ylabel="validation loss, nats per pair of characters")
    ax.legend(frameon=False)
    figure.savefig(path, dpi=150, transparent=True)
    plt.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to learn; default: Python's own documentation")
    add("--out", type=picture, metavar="FILE", default=Path("distill.png"), help="the curves; default: distill.png")
    sizes = {"best": 64, "steps": 600, "teacher-steps": 1200, "batch": 16, "context": 64, "width": 32, "layers": 2}
    sizes |= {"teacher-width": 128, "teacher-layers": 3, "heads": 4, "every": 25, "windows": 200}
    for name, default in sizes.items():
        add(f"--{name}", type=natural, default=default, help=f"default: {default}")
    add("--lr", type=float, default=2e-3, help="of AdamW, the largest of its cycle; default: 0.002")
    add("--seed", type=int, default=0, help="of weights and windows; default: 0")
    options = parser.parse_args(argv)
    for name in ("width", "teacher_width"):
        if getattr(options, name) % options.heads:
            parser.error(f"--{name.replace('_', '-')}: expected a multiple of --heads, got {getattr(options, name)}")
    if reason := refusal(options.device, options.out):
        parser.error(reason)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    options = parse(argv)
    console = Console(highlight=False)
    try:
        text = Pairs(options.text, options.context)
    except ValueError as error:
        print(f"distill.py: {error}", file=sys.stderr)
        return 2
    if options.best > text.kinds or text.kinds > 2**15:
        print(f"distill.py: {text.kinds} symbols, expected {options.best} to {2**15}", file=sys.stderr)
        return 2
    console.print(f"{text.name}: {text.length:,} characters, {text.kinds:,} pairs of them", soft_wrap=True)
    teacher = build(text, options.teacher_width, options.teacher_layers, options)
    of_teacher = train(teacher, text, options.teacher_steps, None, options)[-1]
    stored = Stored(teacher, text.windows.to(options.device), options.best)
    mass = stored.q.float().sum(-1).mean().item()
    console.print(f"teacher: {of_teacher:.4f}; its {options.best} best classes hold {mass:.1%} of the probability")
    names = {"labels alone": None, f"the teacher's {options.best} best classes": stored}
    curves = {}
    for name, source in names.items():
        curves[name] = train(build(text, options.width, options.layers, options), text, options.steps, source, options)
        console.print(f"student, {name}: {curves[name][-1]:.4f} after {options.steps} steps", soft_wrap=True)
    plot(options.out, curves, of_teacher, options)
    console.print(f"curves: {options.out}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
