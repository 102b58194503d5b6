"""Train a small GPT on real text with `xent.cross_entropy`, and watch it match `F.cross_entropy` step by step.

    python benchmarks/train.py --quick                  both losses side by side, about a minute on two cores
    python benchmarks/train.py --text FILE --steps 2000

Without --text the text is the documentation inside Python itself (what help() shows), character by character. With
--compare a second model begins from the same weights, sees the same batches and differs in nothing but the loss
function, so that the two curves may differ by rounding only. In the quick run (float32, seeds 0 to 4) the losses
differed by at most 4.8e-7 nats, a relative 2.0e-7 or two units in the last place, and the norms of the gradients by
a relative 2.6e-6; neither grew along the 150 steps. The tolerance of 5e-5 leaves twenty times that for other
machines, and still sees a loss or a whole gradient that is wrong by a factor of 1.0001 (bench.py sees finer errors,
row by row). Longer runs may drift apart further, since training amplifies whatever differs: they have no tolerance
unless one is given.

Exit code: 0; 1 if the curves differ by more than --tolerance; 2 for bad options or a text that cannot be used;
130 after Ctrl-C, with the summary and the plot of the steps so far (a second Ctrl-C ends at once).
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import common
import torch
from common import GREY, XENT, figure_style, natural, picture, refusal
from gpt import GPT, Text
from memory import growth, reset_peak
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import xent

Loss = Callable[[Tensor, Tensor], Tensor]
TOLERANCE = 5e-5  # see the docstring above


def ours(logits: Tensor, target: Tensor) -> Tensor:
    """(B, T, V) with (B, T), as they are; a float32 loss from bfloat16 logits without a float32 copy of them.

    `dim` only matters where T == V: there (B, T, V) could as well be PyTorch's own layout, and xent would not guess.
    """
    return xent.cross_entropy(logits, target, dim=-1, loss_dtype=torch.promote_types(logits.dtype, torch.float32))


def torchs(logits: Tensor, target: Tensor) -> Tensor:
    """The usual way: flatten, and upcast where the logits are in half precision."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def fused(model: GPT, tokens: Tensor, target: Tensor, resolution: float | None = None) -> Tensor:
    """From the hidden states, without the logits; under autocast the products are in half precision."""
    return xent.linear_cross_entropy(model.trunk(tokens), model.head.weight, target, grad_resolution=resolution)


class Learner:
    """A model, its optimizer and its loss function (None: `fused`), with the record of its steps."""

    resolution: float | None = None  # of `fused`

    def __init__(self, name: str, loss: Loss | None, symbols: int, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)  # every learner begins from the same weights
        self.name, self.loss, self.device = name, loss, options.device
        model = GPT(symbols, options.context, options.width, options.layers, options.heads)
        self.model = model.to(options.device, torch.float64 if options.dtype == "float64" else torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), options.lr)
        self.warmup = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1, (step + 1) / 20))
        self.autocast = torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16")
        self.losses: list[float] = []
        self.norms: list[float] = []  # of the gradients: Adam divides a wrong factor out, so no loss would show it
        self.seconds: list[float] = []
        self.memory: list[int] = []

    def evaluate(self, tokens: Tensor, target: Tensor) -> Tensor:
        """The loss of one batch."""
        tokens, target = tokens.to(self.device), target.to(self.device)
        with self.autocast:
            if self.loss is None:
                return fused(self.model, tokens, target, self.resolution)
            logits = self.model(tokens)
        return self.loss(logits, target)

    def step(self, tokens: Tensor, target: Tensor) -> None:
        """One step of training, timed."""
        start = time.perf_counter()
        loss = self.evaluate(tokens, target)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.warmup.step()
        self.losses.append(loss.item())
        self.norms.append(norm.item())
        self.seconds.append(time.perf_counter() - start)  # item() has waited for the device

    @torch.no_grad()
    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        """The mean loss of some batches."""
        return sum(self.evaluate(*batch).item() for batch in batches) / len(batches)

    def measured_step(self, tokens: Tensor, target: Tensor) -> None:
        """A step that also records what it needs beyond the model and the optimizer: activations, gradients, loss.

        On CPU this is resident memory, which varies by some percent from step to step: the median of a few counts.
        """
        if self.device != "cpu" or reset_peak():
            self.memory.append(growth(lambda: self.step(tokens, target), self.device))
        else:
            self.step(tokens, target)


class Stop:
    """Ctrl-C: let the step end, so that all learners have done the same number. A second one ends at once."""

    asked = False

    def __enter__(self) -> Stop:
        """From here on."""
        self.before = signal.signal(signal.SIGINT, self.ask)
        return self

    def __exit__(self, *_: object) -> None:
        """Up to here."""
        signal.signal(signal.SIGINT, self.before)

    def ask(self, *_: object) -> None:
        """What Ctrl-C calls."""
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def train(learners: Sequence[Learner], text: Text, options: argparse.Namespace, console: Console, stop: Stop) -> None:
    """All learners step by step on the same batches, until the steps are done or somebody presses Ctrl-C."""
    batches = torch.Generator().manual_seed(options.seed)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=options.steps)
        for step in range(options.steps):
            tokens, target = text.batch(text.train, options.batch, batches)
            for learner in learners[:: 1 if step % 2 else -1]:  # nobody is always the first
                if 1 <= step <= 5:  # the very first makes the optimizer's state, which stays
                    learner.measured_step(tokens, target)
                else:
                    learner.step(tokens, target)
            losses = ", ".join(f"{learner.name} {learner.losses[-1]:.4f}" for learner in learners)
            bar.update(task, advance=1, description=losses)
            if stop.asked:
                return


def differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Relative, step by step. Anything else than two numbers (NaN, inf) counts as infinitely different."""

    def difference(a: float, b: float) -> float:
        if not math.isfinite(a + b):
            return math.inf
        return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0  # both may be 0: a text of one symbol

    return [difference(a, b) for a, b in zip(one, other, strict=True)]


def summary(learners: Sequence[Learner], text: Text, options: argparse.Namespace) -> Table:
    """A line for each learner."""
    draw = torch.Generator().manual_seed(options.seed)
    batches = [text.batch(text.validation, options.batch, draw) for _ in range(10)]
    heads = ("loss", "tokens/s", "ms/step", "MiB/step", "training", "validation")
    table = common.empty_table("", heads)
    for learner in learners:
        seconds = median(learner.seconds)
        memory = f"{median(learner.memory) / 2**20:.0f}" if learner.memory else ""
        speed = options.batch * options.context / seconds
        cells = [f"{speed:,.0f}", f"{seconds * 1e3:.1f}", memory, f"{learner.losses[-1]:.4f}"]
        table.add_row(learner.name, *cells, f"{learner.validate(batches):.4f}")
    return table


def plot(path: Path, learners: Sequence[Learner], title: str) -> None:
    """The curves, and below them how far two of them are apart."""
    plt = figure_style()
    figure, axes = plt.subplots(len(learners), 1, figsize=(8, 3 * len(learners)), squeeze=False, layout="constrained")
    looks = [{"color": XENT, "linewidth": 3}, {"color": "#e76f51", "linewidth": 1, "linestyle": "--"}]
    for learner, look in zip(learners, looks, strict=False):
        axes[0, 0].plot(learner.losses, label=learner.name, **look)
    axes[0, 0].set(title=title, ylabel="training loss, nats per character")
    axes[0, 0].legend(frameon=False)
    if len(learners) == 2:
        one, other = learners
        axes[1, 0].plot(differences(one.losses, other.losses), ".", color=XENT, label="loss")
        axes[1, 0].plot(differences(one.norms, other.norms), ".", color=GREY, label="norm of the gradient")
        axes[1, 0].set_ylabel("relative difference")
        axes[1, 0].set_yscale("symlog", linthresh=1e-8)  # a logarithm that bears the 0 of equal steps
        axes[1, 0].legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    axes[-1, 0].set_xlabel("step")
    figure.savefig(path, dpi=150, transparent=True)
    plt.close(figure)


def add_sizes(parser: argparse.ArgumentParser, sizes: dict[str, int]) -> None:
    """An option for each."""
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=natural, default=default, help=f"default: {default}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, completed and checked."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="the same as --compare --steps 150, with --tolerance 5e-5 in float32")
    add("--compare", action=argparse.BooleanOptionalAction, help="train with F.cross_entropy, too, side by side")
    add("--fused-head", action="store_true", help="xent takes the hidden states: the logits are never held")
    add("--tolerance", type=float, help="largest relative difference of losses and gradient norms; else exit code 1")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to learn; default: Python's own documentation")
    add("--out", type=picture, metavar="FILE", default=Path("train.png"), help="the curves; default: train.png")
    add("--dtype", default="float32", choices=["float32", "float64", "bfloat16"], help="bfloat16: autocast")
    add("--threads", type=natural, default=torch.get_num_threads(), help="default: torch's own choice")
    add("--steps", type=natural, help="default: 1000")
    sizes = {"batch": 16, "context": 128, "width": 128, "layers": 4, "heads": 4}
    add_sizes(parser, sizes)
    add("--lr", type=float, default=1e-3, help="of AdamW, after 20 steps of warm-up; default: 0.001")
    add("--seed", type=int, default=0, help="of weights and batches; default: 0")
    options = parser.parse_args(argv)
    if options.compare is None:
        options.compare = options.quick
    if options.quick and options.compare and options.dtype == "float32" and options.tolerance is None:
        options.tolerance = TOLERANCE
    if options.tolerance is not None and not options.compare:
        parser.error("--tolerance: expected --compare with it")
    options.steps = options.steps or (150 if options.quick else 1000)
    if options.width % options.heads:
        parser.error(f"--width {options.width} --heads {options.heads}: expected a width that the heads divide")
    if reason := refusal(options.device, options.out):
        parser.error(reason)
    return options


def verdict(learners: Sequence[Learner], tolerance: float | None, console: Console) -> int:
    """The largest difference of two learners in words; as exit code, whether it is too large."""
    one, other = learners
    nats = max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))
    loss, norm = max(differences(one.losses, other.losses)), max(differences(one.norms, other.norms))
    console.print(
        f"largest difference in {len(one.losses)} steps: loss {nats:.1e} nats, relative {loss:.1e}; "
        f"norm of the gradient, relative {norm:.1e}",
        soft_wrap=True,
    )
    if tolerance is None or max(loss, norm) <= tolerance:
        return 0
    print(f"train.py: the losses differ: expected at most {tolerance:.0e}, got {max(loss, norm):.1e}", file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    options = parse(argv)
    console = Console(highlight=False)
    torch.set_num_threads(options.threads)
    try:
        text = Text(options.text, options.context)
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    pairs: list[tuple[str, Loss | None]] = [("xent, fused head", None) if options.fused_head else ("xent", ours)]
    pairs += [("F.cross_entropy", torchs)] * options.compare
    learners = [Learner(name, loss, len(text.symbols), options) for name, loss in pairs]
    size = sum(weight.numel() for weight in learners[0].model.parameters())
    with Stop() as stop:
        console.print(f"{text.name}: {text.length:,} characters, {len(text.symbols)} symbols", soft_wrap=True)
        console.print(f"GPT: {size:,} parameters, {options.dtype}, {options.device}, threads: {options.threads}")
        train(learners, text, options, console, stop)
        console.print(summary(learners, text, options))
        code = verdict(learners, options.tolerance, console) if options.compare else 0
        plot(options.out, learners, f"{options.dtype}, {options.batch} x {options.context} characters a step")
        console.print(f"curves: {options.out}", soft_wrap=True)
    if stop.asked:
        console.print("interrupted")
    return 130 if stop.asked else code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # the second one
        sys.exit(130)
