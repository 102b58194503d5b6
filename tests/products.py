"""How many matrix products a call takes, and how large."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xent._rows import dispatch


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products, torch's and those of the primitive `linear`, and their multiplications."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.work = 0
        self.linear = dispatch.linear

    def __enter__(self) -> Products:
        dispatch.linear = self._linear
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        dispatch.linear = self.linear
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self._add(*args[-2:])
        return func(*args, **(kwargs or {}))

    def _add(self, a: Tensor, b: Tensor) -> None:
        self.count += 1
        self.work += a.shape[0] * a.shape[1] * b.shape[1]

    def _linear(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        self._add(hidden, weight.t())
        with torch.utils._python_dispatch._disable_current_modes():
            self.linear(hidden, weight, out)
