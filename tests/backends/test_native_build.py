"""sdist -> wheel -> another environment: what is packed, and that the installed backend works away from the source."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest
from setuptools.command.build_ext import get_abi3_suffix

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = sorted(path.name for pattern in ("*.cpp", "*.h") for path in (ROOT / "xent/_backends/native").glob(pattern))
TOOLS = ["conftest.py", "interpreter.py", "oracle.py", "pairs.py", "ranks.py"]
SUITE = ["backends/test_native.py", "backends/test_primitives.py"]

pytestmark = [pytest.mark.build, pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")]


def run(*command, cwd, **environment):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: pathlib.Path, out: pathlib.Path, **environment: str) -> pathlib.Path:
    """Through the hooks of PEP 517, with the setuptools at hand: a frontend would download one."""
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(out)!r})"
    run(sys.executable, "-c", code, cwd=source, **environment)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built from a copy of what is tracked or would be, so that no build output is mistaken for a source."""
    tmp = tmp_path_factory.mktemp("sdist")
    ignore = shutil.ignore_patterns("*.so", "*.pyd", "build", "dist", "*.egg-info", "__pycache__", ".git", ".*_cache")
    shutil.copytree(ROOT, tmp / "source", ignore=ignore)
    (tmp / "out").mkdir()
    return build("sdist", tmp / "source", tmp / "out")


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # which Python has since 3.11.4
        archive.extractall(tmp)
    return tmp / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"))


def environment_with(wheel, tmp_path) -> pathlib.Path:
    """A fresh environment that holds the wheel, and finds torch where this one has it."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / ("env/Scripts/python.exe" if os.name == "nt" else "env/bin/python")
    where = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    site = pathlib.Path(where.strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "torch_of_the_tests.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_the_sdist_holds_every_source(unpacked):
    for name in SOURCES:
        assert (unpacked / "xent/_backends/native" / name).is_file(), name
    assert (unpacked / "setup.py").is_file()


def test_the_readme_of_an_index_links_to_the_site(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(name).decode()
    (site,) = re.findall(r"^Project-URL: Documentation, (.+)$", text, re.MULTILINE)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 10
    assert all(link.startswith(site) for link in links), links


def test_the_wheel_is_for_every_python_from_3_10(wheel):
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if "_native.abi3" in n or n.endswith("_native.pyd")]
    assert not [n for n in names if n.startswith(("tests", "benchmarks"))]


def test_the_build_needs_no_torch(unpacked, tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/torch.py").write_text("raise ImportError('the build imports torch')")
    (tmp_path / "out").mkdir()
    wheel = build("wheel", unpacked, tmp_path / "out", PYTHONPATH=str(tmp_path / "hidden"))
    assert any("_native" in name for name in zipfile.ZipFile(wheel).namelist())


def test_the_installed_wheel_passes_the_suite(wheel, tmp_path):
    python = environment_with(wheel, tmp_path)
    (tmp_path / "tests/backends").mkdir(parents=True)
    for name in (*TOOLS, *SUITE):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    where = run(python, "-c", "import xent._backends.native._native as n; print(n.__file__)", cwd=tmp_path)
    assert where.startswith(str(tmp_path / "env"))
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SUITE]
    output = run(*command, cwd=tmp_path / "tests", XENT_BACKEND="native")
    assert " passed" in output
    assert "failed" not in output


def test_without_a_compiler_it_installs_and_says_why(unpacked, tmp_path):
    (tmp_path / "out").mkdir()
    source = shutil.copytree(unpacked, tmp_path / "source", ignore=shutil.ignore_patterns("build"))
    wheel = build("wheel", source, tmp_path / "out", CC="no-such-compiler", CXX="no-such-compiler")
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if "_native" in n]
    python = environment_with(wheel, tmp_path)
    code = "from xent._rows import dispatch as p; print(p.load('native')); print(p.load('eager').__name__)"
    reason, eager = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert "extension does not load from" in reason
    assert "C++17 compiler" in reason
    assert "No module named" in reason
    assert "circular" not in reason  # what Python adds to a name that a package does not have
    assert eager == "xent._backends.eager"
    code = "import torch, xent; print(xent.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 1])))"
    assert "1.3863" in run(python, "-c", code, cwd=tmp_path)  # log 4, by the next backend


@pytest.mark.skipif(os.name == "nt", reason="the compiler here is a shell script")
@pytest.mark.parametrize("changed", [None, "native.cpp", "rows.h"])
def test_an_editable_installation_compiles_only_what_has_changed(unpacked, tmp_path, changed):
    """The library in the tree, newer than all its sources, stays as it is."""
    source = shutil.copytree(unpacked, tmp_path / "source", ignore=shutil.ignore_patterns("build"))
    folder = source / "xent/_backends/native"
    library = folder / f"_native{get_abi3_suffix()}"
    library.write_text("of an earlier installation")
    newer = library.stat().st_mtime + 10
    os.utime(folder / changed if changed else library, (newer, newer))
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\ntouch {tmp_path / 'called'}\nexit 1\n")
    compiler.chmod(0o755)
    (tmp_path / "out").mkdir()
    build("editable", source, tmp_path / "out", CC=str(compiler), CXX=str(compiler))
    assert (tmp_path / "called").exists() == (changed is not None)
    assert library.read_text() == "of an earlier installation"
