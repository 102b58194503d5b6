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


def do_once() -> None:
    """Make the interpreter do once what it does again and again, which is more than half of all its time.

    It patches the language for a kernel, and then for each function that this one calls; and for the dtype of each
    number it makes a table of all dtypes.
    """
    if not INTERPRETED:
        return
    try:
        from triton import language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, find_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    dtypes: dict[str, Any] = {}

    @functools.cache
    def languages(fn: Any) -> list[ModuleType]:
        return [lang for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values())]

    def patch_lang(fn: Any) -> Any:
        patched = not any(tl.core.is_builtin(lang.load) for lang in languages(fn))
        return interpreter._LangPatchScope() if patched else patch(fn)

    def np_dtype(of: Any) -> Any:
        if of.name not in dtypes:
            dtypes[of.name] = find_dtype(of)
        return dtypes[of.name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_lang, np_dtype
