"""Builds the native backend, if there is a C++ compiler; all else is in pyproject.toml."""

import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

GCC_LIKE = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",  # with the next: what vectorised arithmetic needs of -ffast-math, which itself breaks exp
    "-fno-trapping-math",
    "-fopenmp-simd",  # the pragmas only: threads come from torch's own OpenMP runtime, found at run time
    "-fno-exceptions",
    "-fno-rtti",
]
MSVC = ["/std:c++17", "/O2", "/wd4068"]  # 4068: unknown pragma

STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")  # which a free-threaded Python does not have


class BuildNative(build_ext):
    """build_ext with the flags of the compiler that it found."""

    def build_extension(self, ext: Extension) -> None:
        """Set them for `ext`, which there is only one of."""
        ext.extra_compile_args = MSVC if self.compiler.compiler_type == "msvc" else GCC_LIKE
        super().build_extension(ext)


native = Extension(
    "xent._backends.native._native",
    sources=["xent/_backends/native/native.cpp"],
    depends=[
        f"xent/_backends/native/{part}.h"
        for part in ("blocks", "call", "lanes", "loops", "math", "memory", "rows", "samples", "sparse", "threads")
    ],
    define_macros=[("Py_LIMITED_API", "0x030A0000")] if STABLE_ABI else [],
    py_limited_api=STABLE_ABI,
    optional=True,  # without a compiler the package installs all the same, and runs on its other backends
)

setup(
    ext_modules=[native],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_ABI else {},
)
