"""How much memory a training step of a Transformers model needs, with its own loss, with xent's, with a fused head.

    pip install -e '.[transformers]' && python benchmarks/head.py

A small GPT-2 with the full vocabulary, forward + backward in a fresh process each: the growth of the peak resident set,
beyond the model and gradients of the parameters, which are there before. The losses are printed beside it: they agree.
"""

from __future__ import annotations

import subprocess
import sys
import time

import torch
from memory import growth

MODES = {"as it is": None, "use_xent(model)": False, "use_xent(model, fused_head=True)": True}
B, T, V = 4, 512, 50257


def measure(mode: str) -> tuple[int, float, float]:
    """Bytes, seconds and loss of one step."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from xent.integrations.transformers import use_xent

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=256, n_head=4, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0))
    fused = MODES[mode]
    if fused is not None:
        use_xent(model, fused_head=fused)
    tokens = torch.randint(V, (B, T))
    losses = []

    def step() -> None:
        loss = model.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())

    step()  # the gradients of the parameters stay, and thread pools
    grown = growth(step)
    start = time.perf_counter()
    step()
    return grown, time.perf_counter() - start, losses[0]


def main() -> None:
    """One line per mode; with the name of a mode, that one here."""
    if len(sys.argv) > 1:
        print(*measure(sys.argv[1]))
        return
    unit = 4 * B * T * V
    print(f"GPT-2 of 2 layers, ({B}, {T}) tokens, {V} classes, float32; logits {unit / 2**20:.0f} MiB")
    for mode in MODES:
        child = subprocess.run([sys.executable, __file__, mode], capture_output=True, text=True, check=True)
        grown, seconds, loss = map(float, child.stdout.split()[-3:])
        print(f"{mode:34} {grown / 2**20:7.0f} MiB  {grown / unit:5.2f} logits  {seconds:6.2f} s  loss {loss:.6f}")


if __name__ == "__main__":
    main()
