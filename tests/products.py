"""How many matrix products a call takes, and how large."""

from __future__ import annotations

from typing import Any

import torch


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products, and their multiplications."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.work = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = args[-2:]
            self.count += 1
            self.work += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))
