"""Triton's interpreter, which stands for the device where there is none, put right where it differs from every device.

It cuts off the bits that bfloat16 has no room for. Hardware rounds to nearest (test_triton_compile.py reads that in the
assembly), and a rounding error is what the tests measure.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def fewer(few: int, many: int) -> int:
    """How much of something a test needs: it takes the interpreter milliseconds a step."""
    return few if INTERPRETED else many


def round_to_nearest() -> None:
    """Make the interpreter round float32 to bfloat16 as torch does. Does nothing where nothing is interpreted."""
    if not INTERPRETED:
        return
    try:
        from triton import language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:
        return  # the `backend` fixture will say so
    truncate = InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return truncate(self, source, dtype)
        bits = torch.from_numpy(source.data).bfloat16().view(torch.uint16)
        return TensorHandle(bits.numpy(), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast


def patch_once() -> None:
    """Make the interpreter patch the language once for each kernel, and not again for each function that it calls.

    That was half of all its time: a look at every member of several modules, all of which are patched already.
    """
    if not INTERPRETED:
        return
    try:
        from triton import language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang

    @functools.cache
    def languages(fn: Any) -> list[ModuleType]:
        return [lang for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values())]

    def patch_lang(fn: Any) -> Any:
        ready = not any(tl.core.is_builtin(lang.load) for lang in languages(fn))
        return interpreter._LangPatchScope() if ready else patch(fn)

    interpreter._patch_lang = patch_lang
