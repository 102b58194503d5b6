"""The native backend, where there is a C++ compiler, and the README of a package index; pyproject.toml has the rest."""

import re
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

GCC_LIKE = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",  # with the next: what vectorised arithmetic needs of -ffast-math, which itself breaks exp
    "-fno-trapping-math",
    "-fwrapv",  # which most Pythons add: without it GCC takes the loops over lanes number by number
    "-fopenmp-simd",  # the pragmas only: threads come from torch's own OpenMP runtime, found at run time
    "-fno-exceptions",
    "-fno-rtti",
]
MSVC = ["/std:c++17", "/O2", "/wd4068"]  # 4068: unknown pragma

STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")  # which a free-threaded Python does not have


class BuildNative(build_ext):
    """build_ext with the flags of the compiler that it found."""

    def build_extension(self, ext: Extension) -> None:
        """Set them for `ext`, which there is only one of.

        An editable installation builds elsewhere, as if for the first time. So it is given what is here already, with
        its time: newer than everything that it is made of, it stays.
        """
        ext.extra_compile_args = MSVC if self.compiler.compiler_type == "msvc" else GCC_LIKE
        here, built = Path(self.get_ext_filename(ext.name)), Path(self.get_ext_fullpath(ext.name))
        if self.editable_mode and here.exists():
            self.mkpath(str(built.parent))
            self.copy_file(str(here), str(built))
        super().build_extension(ext)


native = Extension(
    "xent._backends.native._native",
    sources=["xent/_backends/native/native.cpp"],
    depends=["setup.py", *sorted(map(str, Path("xent/_backends/native").glob("*.h")))],
    define_macros=[("Py_LIMITED_API", "0x030A0000")] if STABLE_ABI else [],
    py_limited_api=STABLE_ABI,
    optional=True,  # without a compiler the package installs all the same, and runs on its other backends
)


def readme() -> str:
    """README.md with links to the site's pages where its own lead to files of a checkout, which an index has not."""
    here = Path(__file__).parent
    project, text = (here / name for name in ("pyproject.toml", "README.md"))
    (site,) = re.findall(r'^Documentation = "(.+)"$', project.read_text(encoding="utf-8"), re.MULTILINE)
    links = {
        r"\]\(\.github/docs/([\w-]+)\.md": rf"]({site}\1/",
        r"\]\(\.github/docs/": f"]({site}",
        r"\]\(\.github/CONTRIBUTING\.md": f"]({site}contributing/",
    }
    found = text.read_text(encoding="utf-8")
    for pattern, address in links.items():
        found = re.sub(pattern, address, found)
    return found


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    ext_modules=[native],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_ABI else {},
)
