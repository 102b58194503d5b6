"""Train a small GPT with the exact gradient of its head and with sparse ones: do they learn alike, and how fast?

    pip install -e '.[bench,transformers]'                                       for its tokenizers
    python benchmarks/resolution.py --json curves.json --out curves.svg          about 15 minutes on one core

The text is the source of Python's standard library, in tokens of a vocabulary that is trained on it. For each seed, the
same for all, one model has the exact gradient, and one each a resolution: they begin from the same weights and see the
same batches, step by step. The picture shows the mean of the seeds, in the band from their lowest to their highest, and
below it how far the means are from that of the exact gradient, beside how far its own seeds are.

A file of --json keeps the curves: seeds that are in it are not trained again, and with all of them there the picture is
only drawn. --head FILE saves what the exact model of the last seed has learnt: `bench.py --sparse FILE` measures it.

Exit code: 0; 2 for bad options, a text that cannot be used, or a file of other options; 130 after Ctrl-C, with the
seeds that were finished.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import common
import torch
from common import GREY, XENT, figure_style, natural, picture, refusal
from gpt import Tokens
from rich.console import Console
from torch import Tensor
from train import Learner, Stop, add_sizes, train

EXACT = "exact"
LOOKS = {EXACT: GREY, "1/256": "#e76f51", "1/1024": XENT}
WINDOW = 25  # steps that a curve is the mean of: the loss of a batch is mostly the batch's own
ROWS = 2048  # of a saved head
Runs = dict[str, dict[str, dict[str, Any]]]  # of each seed, of each learner: losses, ms, validation


def learners(seed: int, symbols: int, options: argparse.Namespace) -> list[Learner]:
    """The exact one first."""
    options.seed = seed
    found = [Learner(EXACT, None, symbols, options)]
    for n in options.resolutions:
        found.append(Learner(f"1/{n}", None, symbols, options))
        found[-1].resolution = 1 / n
    return found


def batches(text: Tokens, options: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """To validate with: the same for all seeds."""
    draw = torch.Generator().manual_seed(0)
    return [text.batch(text.validation, options.batch, draw) for _ in range(20)]


def run(text: Tokens, runs: Runs, options: argparse.Namespace, console: Console, stop: Stop) -> None:
    """Train every seed that is not there into `runs`, and save it at once."""
    validation = batches(text, options)
    for seed in options.seeds:
        if str(seed) in runs:
            continue
        console.print(f"seed {seed}")
        group = learners(seed, len(text.symbols), options)
        train(group, text, options, console, stop)
        if stop.asked:
            return
        runs[str(seed)] = {
            learner.name: {
                "losses": learner.losses,
                "ms": median(learner.seconds) * 1e3,
                "validation": learner.validate(validation),
            }
            for learner in group
        }
        if options.json:
            options.json.write_text(json.dumps({"options": described(options), "runs": runs}))
        if options.head and seed == options.seeds[-1]:
            save_head(options.head, group[0], validation)


@torch.no_grad()
def save_head(path: Path, learner: Learner, validation: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Hidden states of the validation text, the weight of the head, and the targets."""
    hidden = torch.cat([learner.model.trunk(tokens.to(learner.device)).flatten(0, 1) for tokens, _ in validation])
    target = torch.cat([target.flatten() for _, target in validation])
    found = {"hidden": hidden[:ROWS], "weight": learner.model.head.weight.detach(), "target": target[:ROWS]}
    torch.save({name: tensor.float().cpu() if name != "target" else tensor for name, tensor in found.items()}, path)


def described(options: argparse.Namespace) -> dict[str, Any]:
    """The options that make the curves what they are, and the machine that made the times."""
    names = ("vocabulary", "resolutions", "steps", "batch", "context", "width", "layers", "heads", "lr", "dtype")
    return {"text": str(options.text), **{name: getattr(options, name) for name in names}}


def curves(runs: Runs, name: str) -> Tensor:
    """(seeds, steps - WINDOW + 1): running means of the losses."""
    losses = torch.tensor([run[name]["losses"] for run in runs.values()], dtype=torch.float64)
    return losses.unfold(1, min(WINDOW, losses.shape[1]), 1).mean(2)


def inside(runs: Runs, name: str) -> float:
    """The share of steps in which the mean of the seeds lies between the lowest and the highest of the exact ones."""
    exact, found = curves(runs, EXACT), curves(runs, name).mean(0)
    return ((found >= exact.amin(0)) & (found <= exact.amax(0))).double().mean().item()


def summary(runs: Runs) -> Any:
    """A line for each learner: the mean of the seeds ± half their range; how often it is within that of exact."""
    table = common.empty_table("", ("", "ms/step", "speed-up", "training", "validation", "inside"))
    first = mean(run[EXACT]["ms"] for run in runs.values())
    for name in next(iter(runs.values())):
        ms = mean(run[name]["ms"] for run in runs.values())
        last, validation = curves(runs, name)[:, -1].tolist(), [run[name]["validation"] for run in runs.values()]
        losses = [f"{mean(some):.3f} ± {(max(some) - min(some)) / 2:.3f}" for some in (last, validation)]
        table.add_row(name, f"{ms:.0f}", f"{first / ms:.2f}", *losses, f"{inside(runs, name):.0%}")
    return table


def plot(path: Path, runs: Runs, title: str) -> None:
    """The curves, and below them how far they are from the exact ones' mean."""
    plt = figure_style()
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained", height_ratios=(3, 2))
    center = curves(runs, EXACT).mean(0)
    for name in next(iter(runs.values())):
        found, color = curves(runs, name), LOOKS.get(name, "#457b9d")
        steps = range(len(runs[min(runs)][name]["losses"]))[-found.shape[1] :]
        style = {"color": color, "linewidth": 3 if name == EXACT else 1.3}
        above.plot(steps, found.mean(0), label=name, **style)
        below.plot(steps, found.mean(0) - center, **style)
        for ax, band in ((above, found), (below, found - center)):
            if ax is above or name == EXACT:
                ax.fill_between(steps, band.amin(0), band.amax(0), color=color, alpha=0.2, linewidth=0)
    above.set(title=title, ylabel=f"training loss, nats per token\n(mean of {WINDOW} steps)")
    above.legend(frameon=False)
    below.set(ylabel="difference to the mean of\nthe exact gradient, nats", xlabel="step")
    figure.savefig(path, dpi=150, transparent=True)
    plt.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, completed and checked."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--resolutions", type=natural, nargs="+", default=[256, 1024], metavar="n", help="1/n; default: 256 1024")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to learn; default: the source of the standard library")
    add("--out", type=picture, metavar="FILE", default=Path("curves.png"), help="the picture; default: curves.png")
    add("--json", type=Path, metavar="FILE", help="the curves, which are not trained again")
    add("--head", type=Path, metavar="FILE", help="save a trained head for bench.py --sparse")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: autocast")
    add("--threads", type=natural, default=torch.get_num_threads(), help="default: torch's own choice")
    add("--lr", type=float, default=2e-3, help="of AdamW, after 20 steps of warm-up; default: 0.002")
    sizes = {"vocabulary": 16384, "steps": 300, "batch": 8, "context": 64, "width": 256, "layers": 1, "heads": 4}
    add_sizes(parser, sizes)
    options = parser.parse_args(argv)
    if options.width % options.heads:
        parser.error(f"--width {options.width} --heads {options.heads}: expected a width that the heads divide")
    if reason := refusal(options.device, options.out, options.json, options.head):
        parser.error(reason)
    options.runs = {}
    if options.json and options.json.exists():
        saved = json.loads(options.json.read_text())
        if saved["options"] != described(options):
            parser.error(f"--json {options.json}: expected curves of {described(options)}, got {saved['options']}")
        options.runs = saved["runs"]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    options = parse(argv)
    console, runs = Console(highlight=False), options.runs
    torch.set_num_threads(options.threads)
    stop = Stop()
    if any(str(seed) not in runs for seed in options.seeds):
        try:
            text = Tokens(options.text, options.context, options.vocabulary)
        except ValueError as error:
            print(f"resolution.py: {error}", file=sys.stderr)
            return 2
        console.print(f"{text.name}: {text.length:,} tokens of {len(text.symbols):,}", soft_wrap=True)
        with stop:
            run(text, runs, options, console, stop)
    runs = {str(seed): runs[str(seed)] for seed in options.seeds if str(seed) in runs}
    if runs:
        console.print(summary(runs))
        plot(options.out, runs, f"{options.vocabulary:,} tokens, {len(runs)} seeds")
        console.print(f"curves: {options.out}", soft_wrap=True)
    if stop.asked:
        console.print("interrupted")
    return 130 if stop.asked else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # the second one
        sys.exit(130)
